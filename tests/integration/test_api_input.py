"""What the API refuses, and how it says so: always a problem that names the field, never a crash."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from api_server import JOB, Site, assert_problem, start_site
from ncr_upload.entrypoints.api.bodies import MAX_BODY_BYTES


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """One for all tests here that have nothing accepted."""
    with start_site() as site:
        yield site


@pytest.mark.parametrize(
    ("change", "field"),
    [
        *(({"job_id": bad}, "job_id") for bad in ("", ".hidden", "../x", "a/b", "a b", "12;", "é", "x" * 129, "a\n", 7, None)),
        *(({"username": bad}, "username") for bad in ("", "a\nb", "a\x00b", "\u202eabc", "x" * 129, 7, None, ["ann"])),
        *(({"campaign": bad}, "campaign") for bad in ("", "tab\t", "x" * 129, True)),
        *(({"row_id": bad}, "row_id") for bad in (0, -1, 2**63, 1.5, 7.0, "7", True, [])),
        ({"rowid": 7}, "rowid"),
    ],
)
def test_bad_input_is_422_naming_the_field(site: Site, change: dict[str, Any], field: str) -> None:
    body = assert_problem(site.http.post("/process-job", json=JOB | change), 422, "invalid_request")
    assert [error["field"] for error in body["errors"]] == [field]
    assert body["detail"].startswith(f"{field}: ")
    assert site.http.get("/jobs/active").json()["count"] == 0


@pytest.mark.parametrize("field", ["job_id", "username", "campaign"])
def test_a_missing_field_is_named(site: Site, field: str) -> None:
    job = {name: value for name, value in JOB.items() if name != field}
    body = assert_problem(site.http.post("/process-job", json=job), 422, "invalid_request")
    assert [error["field"] for error in body["errors"]] == [field]


@pytest.mark.parametrize("good", ["a", "_", "-x", "A.b-c_9", "x" * 128])
def test_every_job_id_within_the_rules_is_accepted(good: str) -> None:
    with start_site() as site:
        assert site.http.post("/process-job", json=JOB | {"job_id": good}).status_code == 202


@pytest.mark.parametrize("good", [" ann ", "Zoë Ångström", "日本", "x" * 128, "a'; DROP TABLE ncr_jobs; --", "<b>"])
def test_names_are_kept_as_they_were_sent(good: str) -> None:
    with start_site() as site:
        task_id = site.submit(username=good, campaign=good)
        view = site.http.get(f"/job-status/{task_id}").json()
        assert (view["username"], view["campaign"]) == (good, good)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"job-1"',
        b'{"job_id": NaN}',
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"job_id": ' + b"9" * 5000 + b"}",
        b'{"x\\ud800": 1}',
    ],
)
@pytest.mark.parametrize("path", ["/process-job", "/process-batch"])
def test_a_body_that_is_no_job_is_422(site: Site, path: str, body: bytes) -> None:
    assert_problem(site.http.post(path, content=body, headers={"Content-Type": "application/json"}), 422, "invalid_request")


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_only_json_is_read_so_no_web_page_can_post_a_form_here(site: Site, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    answer = site.http.post("/process-job", content=b'{"job_id":"a","username":"a","campaign":"a"}', headers=headers)
    body = assert_problem(answer, 422, "invalid_request")
    assert "application/json" in body["detail"]


def test_a_body_over_the_limit_is_413_before_any_of_it_is_sent(site: Site) -> None:
    url = site.http.base_url
    with socket.create_connection((url.host, url.port or 0), timeout=20) as connection:
        lines = (
            "POST /process-job HTTP/1.1",
            f"Host: {url.host}",
            "Content-Type: application/json",
            f"Content-Length: {MAX_BODY_BYTES + 1}",
        )
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = connection.makefile("rb").read()  # to the end: the connection is closed too
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"application/problem+json" in answer


def test_a_caller_that_sends_all_of_a_huge_body_first_still_gets_the_answer(site: Site) -> None:
    size = 200 * 1024**2
    url = site.http.base_url
    connection = http.client.HTTPConnection(str(url.host), url.port, timeout=60)
    chunks = (bytes(2**20) for _ in range(size // 2**20))
    headers = {"Content-Type": "application/json", "Content-Length": str(size)}
    connection.request("POST", "/process-batch", body=chunks, headers=headers)
    answer = connection.getresponse()
    assert answer.status == 413
    assert json.loads(answer.read())["code"] == "body_too_large"
    connection.close()


def test_a_chunked_body_over_the_limit_is_413_too(site: Site) -> None:
    chunks = (b" " * 65536 for _ in range(MAX_BODY_BYTES // 65536 + 1))
    assert_problem(
        site.http.post("/process-job", content=chunks, headers={"Content-Type": "application/json"}), 413, "body_too_large"
    )


def test_a_body_at_the_limit_is_read(site: Site) -> None:
    answer = site.http.post(
        "/process-batch", content=b'[{"job_id":"."}]'.ljust(MAX_BODY_BYTES), headers={"Content-Type": "application/json"}
    )
    assert_problem(answer, 422, "invalid_request")


def test_an_unknown_address_and_a_wrong_method_are_problems(site: Site) -> None:
    assert_problem(site.http.get("/nowhere"), 404, "not_found")
    answer = site.http.get("/process-job")
    assert_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


def test_head_is_answered_as_get_without_the_body(site: Site) -> None:
    task_id = site.submit()
    for path in ("/", "/livez", "/health", f"/job-status/{task_id}", "/jobs/active"):
        whole, head = site.http.get(path), site.http.head(path)
        assert (path, head.status_code, head.content) == (path, whole.status_code, b"")
        assert head.headers["content-length"] == str(len(whole.content))
    assert site.http.head("/process-job").status_code == 405
    assert assert_problem(site.http.put("/health"), 405, "method_not_allowed")["detail"].endswith("; send GET or HEAD.")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"get / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /process-job HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["tls", "method", "length", "address"],
)
def test_what_is_no_http_is_answered_with_a_problem_too(site: Site, sent: bytes) -> None:
    url = site.http.base_url
    with socket.create_connection((url.host, url.port or 0), timeout=20) as connection:
        connection.sendall(sent)
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"application/problem+json" in head
    told = json.loads(body)
    assert told["code"] == "malformed_request"
    assert "TLS" in told["next_step"]


def test_an_unknown_id_is_named_and_what_an_old_one_may_be(site: Site) -> None:
    never = "5f3c0a6e-4f0e-4c1e-9d2b-2b7f5c1c7a90"
    for given in (never, "x", "a" * 3000, "%00"):
        task = assert_problem(site.http.get(f"/job-status/{given}"), 404, "task_unknown")
        assert given[:100] in task["detail"].replace("\N{REPLACEMENT CHARACTER}", "%00")
        assert "HISTORY_DAYS" in task["next_step"]
        assert "HISTORY_DAYS" in assert_problem(site.http.get(f"/batch-status/{given}"), 404, "batch_unknown")["next_step"]


@pytest.mark.parametrize(
    ("path", "sent", "told"),
    [
        ("/process-job", [], "body: must be a JSON object"),
        ("/process-job", JOB | {"rowid": 7}, "rowid: is no field of this request"),
        ("/process-batch", JOB, "body: must be a JSON list"),
        ("/process-batch", [], "body: has 0 items, and needs 1 at least"),
        ("/process-batch", [7], "[0]: must be a JSON object"),
    ],
)
def test_what_is_wrong_is_said_in_words_of_json(site: Site, path: str, sent: Any, told: str) -> None:
    assert assert_problem(site.http.post(path, json=sent), 422, "invalid_request")["detail"].startswith(told)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=x", "limit"),
        ("status=done", "status"),
        ("username=%00", "username"),
        ("campaign=", "campaign"),
        ("cursor=%27", "cursor"),
    ],
)
def test_a_bad_filter_is_422_naming_it(site: Site, query: str, field: str) -> None:
    body = assert_problem(site.http.get(f"/jobs/active?{query}"), 422, "invalid_request")
    assert [error["field"] for error in body["errors"]] == [field]


@pytest.mark.parametrize("size", [0, 10_001])
def test_a_batch_has_1_to_10000_jobs(site: Site, size: int) -> None:
    answer = site.http.post("/process-batch", json=batch_of(size))
    assert_problem(answer, 422, "invalid_request")


def test_the_largest_batch_is_accepted() -> None:
    with start_site() as site:
        answer = site.http.post("/process-batch", json=batch_of(10_000))
    assert answer.status_code == 202
    assert len(answer.json()["jobs"]) == 10_000


def test_the_longest_names_fit_into_the_largest_batch() -> None:
    job_ids = [f"{number:0128}" for number in range(10_000)]
    jobs = [
        {"job_id": job_id, "username": "\U0001f680" * 128, "campaign": "\u00e9" * 128, "row_id": 2**63 - 1}
        for job_id in job_ids
    ]
    with start_site() as site:
        answer = site.http.post(
            "/process-batch",
            content=json.dumps(jobs, ensure_ascii=False).encode(),
            headers={"Content-Type": "application/json"},
        )
    assert answer.status_code == 202
    assert answer.json()["total_jobs"] == 10_000


def batch_of(size: int) -> list[dict[str, Any]]:
    return [{"job_id": f"job-{number}", "username": "ann", "campaign": "spring"} for number in range(size)]
