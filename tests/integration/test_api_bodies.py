"""Bodies that are too many, too large, too slow or too full: refused within bounded memory, while others are answered."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from api_server import JOB, Site, assert_problem, start_site
from fault_table import fault
from ncr_upload.entrypoints.api import bodies
from ncr_upload.entrypoints.api.bodies import MAX_BODY_BYTES, MAX_SMALL_BODY_BYTES, BodyBudget
from ncr_upload.entrypoints.api.json_size import TooMuch, check_size
from running_stack import NCR, free_port, until

PEAK_BYTES = 256 * 1024 * 1024
JSON = {"Content-Type": "application/json"}


def repeated(unit: bytes, head: bytes = b"[", tail: bytes = b"]") -> bytes:
    """Return as large a body as is read."""
    count = (MAX_BODY_BYTES - len(head) - len(tail)) // (len(unit) + 1)
    return head + b",".join([unit] * count) + tail


ATTACKS: dict[str, Callable[[], bytes]] = {
    "empty objects": lambda: repeated(b"{}"),
    "objects in an object": lambda: repeated(b"{}", b'{"jobs":[', b"]}"),
    "numbers": lambda: repeated(b"1"),
    "empty strings": lambda: repeated(b'""'),
    "nested lists": lambda: b"[" * MAX_BODY_BYTES,
    "nested objects": lambda: b'{"a":' * (MAX_BODY_BYTES // 5),
    "names of one object": lambda: b"[{" + b",".join(b'"%d":1' % number for number in range(1_400_000)) + b"}]",
    "one name again and again": lambda: repeated(b'"job_id":1', b"[{", b"}]"),
    "one long number": lambda: b"[" + b"9" * (MAX_BODY_BYTES - 2) + b"]",
    "one long text": lambda: b'[{"job_id":"' + b"x" * (MAX_BODY_BYTES - 20) + b'"}]',
    "escapes": lambda: b'[{"job_id":"' + b"\\u0041" * 2_700_000 + b'"}]',
    "no end of a text": lambda: b'["' + b"a" * (MAX_BODY_BYTES - 2),
    "spaces": lambda: b" " * MAX_BODY_BYTES,
    "quotes": lambda: b'"' * MAX_BODY_BYTES,
    "bad jobs": lambda: json.dumps([{"a": 1, "b": 2, "c": 3, "d": 4}] * 10_000).encode(),
}


# --- a real process under attack --------------------------------------------------------------------------------


@contextmanager
def running_api(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_port()
    settings = {
        "API_HOST": "127.0.0.1",
        "API_PORT": str(port),
        "API_KEY": "the-key-of-the-tests",
        "API_ANONYMOUS": "none",
        "REDIS_PORT": "1",
        "DATABASE_URL": f"sqlite:///{folder}/ncr.db",
        "MAX_MEMORY_USAGE_PERCENT": "99.9",
    }
    process = subprocess.Popen([*NCR, "api"], cwd=folder, env=dict(os.environ) | settings, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: is_alive(url), 90)
        yield process, url
    finally:
        process.kill()
        process.wait()


def is_alive(url: str) -> bool:
    try:
        return httpx.get(f"{url}/livez", trust_env=False, verify=False, timeout=30).status_code == 200
    except httpx.TransportError:
        return False


def peak_bytes(process: subprocess.Popen[bytes]) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def post(url: str, body: bytes, path: str = "/process-batch") -> tuple[int, str]:
    headers = JSON | {"X-API-Key": "the-key-of-the-tests"}
    answer = httpx.post(f"{url}{path}", content=body, headers=headers, trust_env=False, verify=False, timeout=120)
    return answer.status_code, answer.json().get("code", "")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    with running_api(tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest.mark.timeout(600)
@fault(
    "API: many large bodies at once",
    injector="32 POSTs of 16 MiB",
    invariants="A",
    outcome="refused with 422 or 503; memory below 256 MB, probes answered",
)
def test_memory_is_bounded_and_probes_are_answered_under_attack(api: tuple[subprocess.Popen[bytes], str]) -> None:
    process, url = api
    probes, ended = Counter[bool](), threading.Event()

    def probe() -> None:
        while not ended.wait(0.05):
            probes[is_alive(url)] += 1

    probing = threading.Thread(target=probe)
    probing.start()
    seen = Counter[tuple[int, str]]()
    try:
        for at_once, name in ((32, "empty objects"), *((2, name) for name in ATTACKS)):  # two are all that are read at once
            body = ATTACKS[name]()
            with ThreadPoolExecutor(at_once) as threads:
                seen.update(threads.map(lambda _, body=body: post(url, body), range(at_once)))
            assert peak_bytes(process) <= PEAK_BYTES, name
    finally:
        ended.set()
        probing.join()
    assert set(seen) <= {(422, "invalid_request"), (503, "bodies_in_flight")}
    assert seen[422, "invalid_request"]
    assert probes[True] > len(ATTACKS)
    assert not probes[False]
    assert post(url, json.dumps(JOB).encode(), "/process-job")[0] == 202


@pytest.mark.timeout(300)
def test_the_largest_batches_at_once_stay_within_the_same_memory(api: tuple[subprocess.Popen[bytes], str]) -> None:
    process, url = api
    wide = {"username": "\U0001f680" * 128, "campaign": "\u00e9" * 128, "row_id": 2**63 - 1}

    def send(number: int) -> tuple[int, str]:
        jobs = [{"job_id": f"{number}-{job:0120}", **wide} for job in range(10_000)]
        return post(url, json.dumps(jobs, ensure_ascii=False).encode())

    with ThreadPoolExecutor(4) as threads:
        seen = Counter(threads.map(send, range(4)))
    refused = {(503, code) for code in ("bodies_in_flight", "database_unavailable", "database_timeout")}
    assert set(seen) <= {(202, ""), *refused}
    until(lambda: send(9)[0] in (202, 409), 60)
    assert peak_bytes(process) <= PEAK_BYTES


@fault("API: bodies that trickle in", injector="half-sent bodies", invariants="A", outcome="408; single jobs go on meanwhile")
def test_half_sent_batches_hold_up_no_job_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "PATIENCE_SECONDS", 3)
    with start_site() as site:
        held = [begin(site, "/process-batch", MAX_BODY_BYTES) for _ in range(4)]
        assert site.http.post("/process-job", json=JOB).status_code == 202
        refused = assert_problem(site.http.post("/process-batch", json=[JOB | {"job_id": "b"}]), 503, "bodies_in_flight")
        assert refused["retry_after_seconds"] > 0
        answers = [connection.makefile("rb").read().partition(b" ")[2][:3] for connection in held]
        assert sorted(answers) == [b"408", b"408", b"503", b"503"]
        assert site.http.post("/process-batch", json=[JOB | {"job_id": "b"}]).status_code == 202


def begin(site: Site, path: str, size: int) -> socket.socket:
    url = site.http.base_url
    connection = socket.create_connection((str(url.host), url.port or 0), timeout=30)
    lines = [f"POST {path} HTTP/1.1", f"Host: {url.host}", "Content-Type: application/json", f"Content-Length: {size}"]
    connection.sendall("\r\n".join([*lines, "", "["]).encode())
    return connection


# --- one body ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with start_site() as site:
        yield site


@pytest.mark.parametrize("name", ["empty objects", "objects in an object", "numbers", "one name again and again"])
def test_a_batch_of_too_much_is_told_the_limit(site: Site, name: str) -> None:
    body = assert_problem(site.http.post("/process-batch", content=ATTACKS[name](), headers=JSON), 422, "invalid_request")
    assert "10000 jobs of 4 fields" in body["detail"]


def test_every_bad_job_of_a_batch_is_counted_and_the_first_are_named(site: Site) -> None:
    body = assert_problem(site.http.post("/process-batch", json=[{}] * 1000), 422, "invalid_request")
    assert "and 2997 more" in body["detail"]
    assert [error["field"] for error in body["errors"][:4]] == ["[0].job_id", "[0].username", "[0].campaign", "[1].job_id"]
    assert len(body["errors"]) == 100


def test_of_very_many_errors_the_first_are_named_too(site: Site) -> None:
    jobs = [JOB | {"job_id": f"good-{number}"} for number in range(150)] + [{"a": 1, "b": "\n"}] * 9_000
    body = assert_problem(site.http.post("/process-batch", json=jobs), 422, "invalid_request")
    assert f"and {5 * 9_000 - 3} more" in body["detail"]
    assert body["errors"][0]["field"] == "[150].job_id"
    assert len(body["errors"]) == 100


def test_a_job_may_be_far_smaller_than_a_batch(site: Site) -> None:
    content = json.dumps(JOB | {"job_id": "at-the-limit"}).encode().ljust(MAX_SMALL_BODY_BYTES)
    assert site.http.post("/process-job", content=content, headers=JSON).status_code == 202
    body = assert_problem(site.http.post("/process-job", content=content + b" ", headers=JSON), 413, "body_too_large")
    assert str(MAX_SMALL_BODY_BYTES) in body["detail"]


@pytest.mark.parametrize("path", ["/jobs/x/cancel", "/batches/x/cancel", "/jobs/x/retry", "/nowhere"])
def test_addresses_that_take_no_body_refuse_a_large_one(site: Site, path: str) -> None:
    assert site.http.post(path, content=b"{}", headers=JSON).status_code == 404
    assert_problem(site.http.post(path, content=bytes(MAX_SMALL_BODY_BYTES + 1), headers=JSON), 413, "body_too_large")


@pytest.mark.parametrize("path", ["/process-job", "/process-batch"])
def test_an_encoded_body_is_refused_by_name(site: Site, path: str) -> None:
    content = gzip.compress(json.dumps(JOB).encode())
    body = assert_problem(
        site.http.post(path, content=content, headers=JSON | {"Content-Encoding": "gzip"}), 415, "encoding_unsupported"
    )
    assert "gzip" in body["detail"]
    assert site.http.post(path, content=b"[", headers=JSON | {"Content-Encoding": "identity"}).status_code == 422


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded"])
def test_a_batch_is_read_from_json_only(site: Site, content_type: str) -> None:
    answer = site.http.post("/process-batch", content=json.dumps([JOB]), headers={"Content-Type": content_type})
    assert "Content-Type: application/json" in assert_problem(answer, 422, "invalid_request")["detail"]


def test_a_chunked_batch_is_read(site: Site) -> None:
    content = json.dumps([JOB | {"job_id": f"chunked-{number}"} for number in range(2000)]).encode()
    chunks = (content[start : start + 1000] for start in range(0, len(content), 1000))
    assert site.http.post("/process-batch", content=chunks, headers=JSON).status_code == 202


def test_a_caller_that_hangs_up_gives_its_room_back() -> None:
    with start_site() as site:
        for _ in range(10):
            connection = begin(site, "/process-batch", MAX_BODY_BYTES)
            connection.close()
        until(lambda: site.http.post("/process-batch", json=[JOB]).status_code in (202, 409), 20)


# --- counting ---------------------------------------------------------------------------------------------------


def counts(text: bytes) -> tuple[int, int]:
    """Return the smallest limits that the text fits into."""
    containers = next(n for n in range(50) if fits(text, n, 10_000))
    values = next(n for n in range(50) if fits(text, 10_000, n))
    return containers, values


def fits(text: bytes, max_containers: int, max_values: int) -> bool:
    try:
        check_size(text, max_containers=max_containers, max_values=max_values, max_gap=16_384)
    except TooMuch:
        return False
    return True


@pytest.mark.parametrize(
    ("value", "containers", "values"),
    [
        ([], 1, 1),
        ([{}, {}], 3, 4),
        ([1, 2, 3], 1, 3),
        ([{"a": "[{,", "b": '\\"[{,'}], 2, 3),
        ({"jobs": [{"a": '"},{"'}]}, 3, 3),
        ("[[[", 0, 1),
    ],
)
def test_only_what_is_in_no_text_is_counted(value: Any, containers: int, values: int) -> None:
    assert counts(json.dumps(value).encode())[0] == containers
    assert counts(json.dumps(value).encode())[1] <= values + 1


@pytest.mark.parametrize("text", [b'["%s"]', b'["%s", 1]', b'{"%s": 1}', b'["%s', b'[1, "%s"]  '])
def test_a_long_text_is_found_wherever_it_stands(text: bytes) -> None:
    assert fits(text % (b"x" * 16_000), 10, 10)
    assert not fits(text % (b"x" * 17_000), 10, 10)


def test_spaces_after_the_end_are_no_text() -> None:
    assert fits(b'[{"a": 1}]' + b" " * 100_000, 10, 10)


@pytest.mark.parametrize("name", [*ATTACKS])
def test_counting_takes_no_memory(name: str) -> None:
    """By the size of the process, since the engine of regular expressions has memory of its own."""
    body = ATTACKS[name]()
    before = rss()
    fits(body, 10_002, 100_000)
    assert rss() - before < 4_000_000


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- the budget -------------------------------------------------------------------------------------------------


def test_the_budget_is_given_in_the_order_of_asking_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "WAIT_SECONDS", 60)

    async def play() -> None:
        budget = BodyBudget(10)
        assert await budget.take(8)
        large, small = (asyncio.create_task(budget.take(count)) for count in (5, 1))
        await asyncio.sleep(0)
        assert not large.done()
        await asyncio.sleep(0.05)
        assert not small.done(), "a small one would otherwise pass a large one for ever"
        large.cancel()
        assert await small
        budget.give_back(8)
        budget.give_back(1)
        assert budget.free == 10

    asyncio.run(play())


def test_one_that_gives_up_while_room_is_given_back_loses_none_of_it() -> None:
    async def play() -> None:
        budget = BodyBudget(10)
        assert await budget.take(10)
        waiting = [asyncio.create_task(budget.take(3)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        budget.give_back(10)
        waiting[1].cancel()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert [isinstance(each, asyncio.CancelledError) for each in ended] == [True, True, False]
        budget.give_back(3)
        assert budget.free == 10

    asyncio.run(play())


def test_the_budget_says_no_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "WAIT_SECONDS", 0.05)
    monkeypatch.setattr(bodies, "MAX_WAITING", 2)

    async def play() -> None:
        budget = BodyBudget(10)
        assert await budget.take(10)
        assert await asyncio.gather(*(budget.take(1) for _ in range(4))) == [False] * 4
        budget.give_back(10)
        assert await budget.take(10)

    asyncio.run(play())
