"""Who may call, and what everybody gets to see: keys, loopback, CORS, crashes, the log."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest
import structlog
from pydantic import SecretStr

from api_server import assert_problem, make_ports
from ledger_twin import MemoryHost, MemoryJobQueue, MemoryLedger, MemoryStatusBoard
from ncr_upload.entrypoints.api.app import create_app
from ncr_upload.entrypoints.settings import Anonymous, Settings

KEY = "k-3y"
ELSEWHERE = "203.0.113.7"
OPEN = ["/", "/livez", "/readyz", "/health", "/docs", "/redoc", "/openapi.json", "/docs-assets/swagger-ui.css"]
CLOSED = ["/jobs/active", "/job-status/x", "/batch-status/x", "/jobs/x/history", "/memory-stats", "/celery-stats", "/nowhere"]


class CrashingLedger(MemoryLedger):
    def active(self, **_: Any) -> Any:
        raise ZeroDivisionError("the secret recipe")


def ask(
    path: str,
    *,
    peer: str = "127.0.0.1",
    host: str = "localhost:8001",
    method: str = "GET",
    headers: dict[str, Any] | None = None,
    json: Any = None,
    **settings: Any,
) -> httpx.Response:
    """One request as it comes from `peer`."""
    ports = make_ports(
        CrashingLedger(),
        MemoryStatusBoard(),
        MemoryJobQueue(),
        MemoryHost(),
        "q",
        lambda: None,
        {},
    )
    app = create_app(ports, Settings(_env_file=None, **settings))

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=(peer, 40000))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return await client.request(method, path, headers=headers, json=json)

    return asyncio.run(send())


def is_let_in(**call: Any) -> bool:
    return ask("/memory-stats", **call).status_code == 200


def test_the_key_opens_from_anywhere() -> None:
    assert is_let_in(peer=ELSEWHERE, host="api.example", headers={"X-API-Key": KEY}, api_key=SecretStr(KEY))


@pytest.mark.parametrize("sent", ["", "k-3", "k-3yy", "K-3Y", b"\xe9"])
def test_a_wrong_key_is_401_saying_what_to_send(sent: str | bytes) -> None:
    answer = ask("/memory-stats", peer=ELSEWHERE, headers={"X-API-Key": sent}, api_key=SecretStr(KEY))
    body = assert_problem(answer, 401, "unauthorized")
    assert "X-API-Key" in body["next_step"]
    assert KEY not in answer.text
    assert answer.headers["www-authenticate"]


def test_without_a_key_set_the_401_says_to_set_one() -> None:
    body = assert_problem(ask("/memory-stats", peer=ELSEWHERE), 401, "unauthorized")
    assert "Set API_KEY" in body["next_step"]


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", ["localhost", "localhost:8001", "LOCALHOST", "127.0.0.1:8001", "[::1]:8001"])
def test_a_caller_on_this_machine_needs_no_key(peer: str, host: str) -> None:
    assert is_let_in(peer=peer, host=host)


@pytest.mark.parametrize("peer", [ELSEWHERE, "10.0.0.1", "172.17.0.1", "::ffff:10.0.0.1", "fe80::1", "", "unix"])
def test_a_caller_elsewhere_does(peer: str) -> None:
    assert not is_let_in(peer=peer)


@pytest.mark.parametrize(
    "header", ["Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP", "Via"]
)
def test_what_a_proxy_passes_on_is_not_from_this_machine(header: str) -> None:
    assert not is_let_in(headers={header: "127.0.0.1"})


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "0.0.0.0:8001", "ncr"])
def test_a_page_that_rebinds_its_name_to_this_machine_is_not_let_in(host: str) -> None:
    assert not is_let_in(host=host)


def test_api_anonymous_none_wants_the_key_from_this_machine_too() -> None:
    assert not is_let_in(api_anonymous=Anonymous.NONE, api_key=SecretStr(KEY))
    assert is_let_in(api_anonymous=Anonymous.NONE, api_key=SecretStr(KEY), headers={"X-API-Key": KEY})


def test_api_anonymous_all_lets_everybody_in() -> None:
    assert is_let_in(api_anonymous=Anonymous.ALL, peer=ELSEWHERE, host="api.example")


@pytest.mark.parametrize("path", OPEN)
def test_probes_and_documentation_are_open(path: str) -> None:
    assert ask(path, peer=ELSEWHERE).status_code == 200


@pytest.mark.parametrize("path", CLOSED)
def test_everything_else_is_closed(path: str) -> None:
    assert_problem(ask(path, peer=ELSEWHERE), 401, "unauthorized")


@pytest.mark.parametrize("path", ["/process-job", "/process-batch"])
def test_nobody_without_access_sends_jobs(path: str) -> None:
    assert_problem(ask(path, peer=ELSEWHERE, method="POST", json=[{}]), 401, "unauthorized")


def test_health_tells_strangers_the_state_but_not_what_is_wrong() -> None:
    assert "problems" not in ask("/health", peer=ELSEWHERE).json()
    assert "problems" in ask("/health").json()
    assert_problem(ask("/health?deep=true", peer=ELSEWHERE), 401, "unauthorized")


def test_no_other_origin_is_let_in_by_default() -> None:
    answer = ask("/livez", headers={"Origin": "https://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_only_the_origins_named_are_let_in_and_never_with_credentials() -> None:
    crm = "https://crm.example"
    wanted = "content-type,idempotency-key,x-api-key"
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": wanted}
    for origin, allowed in ((crm, crm), ("https://evil.example", None)):
        answer = ask(
            "/process-job", peer=ELSEWHERE, method="OPTIONS", headers={"Origin": origin, **preflight}, cors_origins=(crm,)
        )
        assert answer.headers.get("access-control-allow-origin") == allowed
        assert answer.is_success is (allowed is not None)
        assert "access-control-allow-credentials" not in answer.headers


def test_a_crash_is_500_with_a_reference_that_is_in_the_log_and_nothing_of_the_error() -> None:
    with structlog.testing.capture_logs() as logged:
        answer = ask("/jobs/active")
    body = assert_problem(answer, 500, "internal_error")
    assert "secret recipe" not in answer.text
    assert "ZeroDivision" not in answer.text
    (crash,) = [entry for entry in logged if entry.get("exc_info")]
    assert crash["reference"] == body["reference"]


def test_every_request_is_one_log_line_without_its_query() -> None:
    with structlog.testing.capture_logs() as logged:
        ask("/memory-stats?token=abc")
    (line,) = [entry for entry in logged if entry["event"] == "request"]
    assert (line["method"], line["path"], line["status"]) == ("GET", "/memory-stats", 200)
    assert line["duration_ms"] >= 0
    assert "abc" not in str(line)


def test_the_log_line_names_the_task() -> None:
    task_id = "00000000-0000-4000-8000-000000000000"
    with structlog.testing.capture_logs() as logged:
        ask(f"/job-status/{task_id}")
    assert [entry["task_id"] for entry in logged if entry["event"] == "request"] == [task_id]


def test_a_crash_is_not_logged_a_second_time(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), structlog.testing.capture_logs():
        ask("/jobs/active")
    assert caplog.records == []
