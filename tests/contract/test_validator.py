"""What counts as a yes, a no and no answer (docs/contract.md, section 4): the twin, and the real adapter against a scripted
HTTP server."""

from __future__ import annotations

import asyncio
import base64
import email
import email.policy
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from urllib.parse import unquote

import pytest

from certificates import make_certificates
from fault_table import fault
from ncr_upload.adapters import http_validator
from ncr_upload.adapters.http_validator import HttpValidator
from ncr_upload.application.ports import Validator, Verdict
from ncr_upload.domain.errors import Rejected, Unavailable
from patience import allowed
from servers import Answer, HttpServer, start_http
from twins import MemoryValidator

pytestmark = pytest.mark.anyio
KEY = "a-secret-api-key"
VALID = {"result": "Valid"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def scripted() -> Iterator[Callable[..., HttpServer]]:
    with ExitStack() as stack:
        yield lambda *answers: stack.enter_context(start_http(*answers))


def open_validator(server: HttpServer, timeout_seconds: float = 10) -> HttpValidator:
    return HttpValidator(f"{server.url}/validate/", KEY, "X-Studio-Key", timeout_seconds)


def said(*results: str, **more: object) -> Answer:
    return Answer(200, json.dumps({"data": [{"result": result, **more} for result in results]}).encode())


def package(*chunks: bytes) -> Iterable[bytes]:
    return chunks or (b"PK zip",)


async def undecided(validator: Validator, sku: str = "SKU-1") -> Unavailable:
    with pytest.raises(Unavailable) as caught:
        await validator.judge(sku, package())
    assert KEY not in str(caught.value)
    return caught.value


# --- the twin and the real one ----------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "http"])
def judging(request: pytest.FixtureRequest, scripted: Callable[..., HttpServer]) -> Callable[[str], Validator]:
    """A validator that gives one result for ever; 'none' for no answer."""

    def make(result: str) -> Validator:
        if request.param == "http":
            return open_validator(scripted(Answer(503) if result == "none" else said(result)))
        if result == "none":
            return MemoryValidator(Unavailable("validator_undecided", "no answer", "Wait."))
        return MemoryValidator(Verdict(result in ("Valid", "Warning"), result, 200, "{}"))

    return make


@pytest.mark.parametrize(("result", "passed"), [("Valid", True), ("Warning", True), ("Invalid", False), ("valid", False)])
async def test_only_valid_and_warning_pass(judging: Callable[[str], Validator], result: str, passed: bool) -> None:
    verdict = await judging(result).judge("SKU-1", package())
    assert (verdict.passed, verdict.result, verdict.http_status) == (passed, result, 200)


async def test_no_answer_is_never_a_verdict(judging: Callable[[str], Validator]) -> None:
    await undecided(judging("none"))


async def test_a_failure_of_the_package_itself_is_not_the_validators(judging: Callable[[str], Validator]) -> None:
    def broken() -> Iterator[bytes]:
        yield b"PK"
        raise Rejected("object_missing", "there is no object 'k'", "Upload it.")

    with pytest.raises(Rejected, match="no object"):
        await judging("Valid").judge("SKU-1", broken())


# --- what is sent -----------------------------------------------------------------------------------------------


async def test_the_zip_arrives_as_the_field_zip_file_with_the_key_in_its_header(scripted: Callable[..., HttpServer]) -> None:
    server = scripted(said("Valid"))
    await open_validator(server).judge("SKU-1", package(b"PK first ", b"second"))
    (request,) = server.requests
    assert (request.method, request.path) == ("POST", "/validate/SKU-1")
    assert request.headers["x-studio-key"] == KEY
    assert request.headers["transfer-encoding"] == "chunked"
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    (part,) = email.message_from_bytes(head + request.body, policy=email.policy.HTTP).iter_parts()
    assert part["Content-Disposition"].params == {"name": "zip_file", "filename": "SKU-1.zip"}
    assert part.get_content_type() == "application/zip"
    assert part.get_payload(decode=True) == b"PK first second"


@pytest.mark.parametrize("sku", ["a/../b", "50% off?#", 'q"uo\r\nX: y', "größe"])
async def test_any_sku_is_one_segment_of_the_path(scripted: Callable[..., HttpServer], sku: str) -> None:
    server = scripted(said("Valid"))
    await open_validator(server).judge(sku, package())
    path = server.requests[0].path
    assert path.count("/") == 2
    assert unquote(path.rpartition("/")[2]) == sku
    assert "x" not in server.requests[0].headers


async def test_the_package_is_taken_as_it_comes_not_all_at_once(scripted: Callable[..., HttpServer]) -> None:
    """A package that takes longer than the time-out to make is no fault of the validator."""
    server = scripted(said("Valid"))

    def slow() -> Iterator[bytes]:
        for _ in range(4):
            time.sleep(0.7)
            yield b"x" * 100_000

    verdict = await open_validator(server, timeout_seconds=2).judge("SKU-1", slow())
    assert verdict.passed
    assert server.requests[0].body.count(b"x" * 100_000) == 4


# --- what is understood -----------------------------------------------------------------------------------------


async def test_every_entry_must_pass(scripted: Callable[..., HttpServer]) -> None:
    server = scripted(said("Valid", "Warning"), said("Valid", "Broken", "Valid"))
    validator = open_validator(server)
    assert (await validator.judge("SKU-1", package())).result == "Warning"
    verdict = await validator.judge("SKU-1", package())
    assert (verdict.passed, verdict.result) == (False, "Broken")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"null",
        b'{"data": []}',
        b'{"data": {}}',
        b'{"data": ["Valid"]}',
        b'{"data": [{"result": "Valid"}, {}]}',
        b'{"data": [{"result": true}]}',
        b'{"result": "Valid"}',
        b'{"data": [{"result": "Valid"}]',
        b"\xff\xfe",
        b'{"data": ' + b"[" * 100_000,
    ],
)
async def test_a_200_that_holds_no_verdict_is_unknown(scripted: Callable[..., HttpServer], body: bytes) -> None:
    error = await undecided(open_validator(scripted(Answer(200, body))))
    assert error.http_status == 200  # type: ignore[attr-defined]


@fault(
    "Validator: a verdict on another SKU", injector="scripted answer", invariants="O", outcome="no verdict; it is asked again"
)
@pytest.mark.parametrize("field", ["sku_id", "sku", "SKU", "skuId", "product", "product_id"])
@pytest.mark.parametrize("place", ["entry", "top"])
async def test_a_verdict_on_another_sku_is_unknown(scripted: Callable[..., HttpServer], field: str, place: str) -> None:
    named = {field: "SKU-2"}
    answer = said("Valid", **named) if place == "entry" else Answer(200, json.dumps({**named, "data": [VALID]}).encode())
    validator = open_validator(scripted(answer))
    error = await undecided(validator)
    assert "SKU-2" in error.message
    assert (await validator.judge("SKU-2", package())).passed


@pytest.mark.parametrize("nothing", [None, "", 0, {"name": "vase"}])
async def test_a_verdict_that_names_no_sku_is_taken(scripted: Callable[..., HttpServer], nothing: object) -> None:
    assert (await open_validator(scripted(said("Valid", sku_id=nothing))).judge("SKU-1", package())).passed


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
async def test_other_client_errors_are_a_no_with_what_it_said(scripted: Callable[..., HttpServer], status: int) -> None:
    verdict = await open_validator(scripted(Answer(status, b'{"detail": "the zip is too deep"}'))).judge("SKU-1", package())
    assert (verdict.passed, verdict.http_status) == (False, status)
    assert "the zip is too deep" in verdict.reasons[0]
    assert verdict.body == '{"detail": "the zip is too deep"}'


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_is_a_no_that_says_which_setting_to_correct(
    scripted: Callable[..., HttpServer], status: int
) -> None:
    verdict = await open_validator(scripted(Answer(status))).judge("SKU-1", package())
    assert (verdict.passed, verdict.http_status) == (False, status)
    assert "VALIDATOR_API_KEY" in verdict.reasons[0]
    assert KEY not in verdict.reasons[0]


@pytest.mark.parametrize("status", [201, 204, 302, 408, 429, 500, 502, 503, 504])
async def test_what_is_no_verdict_is_unknown_with_its_status(scripted: Callable[..., HttpServer], status: int) -> None:
    server = scripted(Answer(status, headers={"Location": "/elsewhere"} if status == 302 else {}))
    error = await undecided(open_validator(server))
    assert error.http_status == status  # type: ignore[attr-defined]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("7", 7, 7),
        ("in an hour", 3000, 3600),
        ("Mon, 23 Nov 1998 10:00:00 GMT", 0, 0),
    ],
    ids=["seconds", "date", "date gone by"],
)
async def test_its_wish_to_be_asked_later_is_kept(
    scripted: Callable[..., HttpServer], header: str, low: float, high: float
) -> None:
    in_an_hour = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    wish = in_an_hour if header == "in an hour" else header
    error = await undecided(open_validator(scripted(Answer(503, headers={"Retry-After": wish}))))
    assert error.retry_after_seconds is not None
    assert low <= error.retry_after_seconds <= high


@pytest.mark.parametrize("header", ["soon", "-3", "", "Mon, 99 Nov"])
async def test_a_wish_that_cannot_be_read_is_none(scripted: Callable[..., HttpServer], header: str) -> None:
    answer = Answer(503, headers={"Retry-After": header})
    assert (await undecided(open_validator(scripted(answer)))).retry_after_seconds is None


@fault("Validator: silence", injector="scripted answer", invariants="LH", outcome="no verdict within the time-out")
async def test_silence_is_unknown_within_the_time_out(scripted: Callable[..., HttpServer]) -> None:
    error = await undecided(open_validator(scripted(Answer(delay_seconds=5)), timeout_seconds=1))
    assert "in time" in error.message
    assert error.http_status is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("answer", [Answer(cut=True), Answer(200, b'{"data":[', announced=100)])
@fault("Validator: cut", injector="scripted answer", invariants="LO", outcome="no verdict")
async def test_a_cut_connection_is_unknown(scripted: Callable[..., HttpServer], answer: Answer) -> None:
    assert (await undecided(open_validator(scripted(answer)))).code == "validator_undecided"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://nowhere.invalid", "not a url", "ftp://127.0.0.1/x", ""])
async def test_a_validator_that_cannot_be_reached_is_named(url: str) -> None:
    validator = HttpValidator(url, KEY, timeout_seconds=3)
    error = await undecided(validator)
    assert url in error.message
    assert "VALIDATOR_API_URL" in error.next_step


@fault("Validator: endless answer", injector="scripted answer", invariants="LR", outcome="no verdict; memory stays bounded")
async def test_an_endless_answer_is_not_kept(scripted: Callable[..., HttpServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_validator, "MAX_ANSWER_BYTES", 1000)
    error = await undecided(open_validator(scripted(said("Valid", padding="x" * 2000))))
    assert "1000 bytes" in error.message


async def test_its_findings_are_told_in_words_worst_first(scripted: Callable[..., HttpServer]) -> None:
    issues = [
        {"severity": "warning", "code": "UNUSED", "message": "unused mesh", "file": "S/S.glb", "pointer": "/meshes/0"},
        {"severity": 0, "code": "BAD", "message": "accessor\nout of range", "file": "S/S.glb"},
        "plain words",
    ]
    verdict = await open_validator(scripted(said("Invalid", issues=issues))).judge("SKU-1", package())
    assert verdict.reasons == (
        "error: S/S.glb: accessor out of range (BAD)",
        "plain words",
        "warning: S/S.glb /meshes/0: unused mesh (UNUSED)",
    )


async def test_its_findings_are_bounded_in_number_and_length(scripted: Callable[..., HttpServer]) -> None:
    issues = [{"severity": "error", "message": "x" * 10_000}] * 500
    verdict = await open_validator(scripted(said("Invalid", issues=issues))).judge("SKU-1", package())
    assert 0 < len(verdict.reasons) <= 100
    assert all(len(reason) <= 1000 for reason in verdict.reasons)


async def test_its_url_is_told_without_the_login_in_it() -> None:
    assert HttpValidator("https://user:pass@host:8/v/?token=x", None).url == "https://host:8/v/"


async def test_proxies_of_the_environment_are_not_used(
    scripted: Callable[..., HttpServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert (await open_validator(scripted(said("Valid"))).judge("SKU-1", package())).passed


# --- while it is asked ------------------------------------------------------------------------------------------


@contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that treats its one connection as it likes; its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            with suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    serve(connection)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/validate"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(20)
            assert not thread.is_alive()


def endless() -> Iterator[bytes]:
    while True:
        yield bytes(1_000_000)


def until_closed(connection: socket.socket) -> None:
    connection.settimeout(20)
    while connection.recv(1_000_000):
        pass


@pytest.mark.parametrize("status", [401, 413, 503])
async def test_an_answer_before_all_of_the_zip_is_taken_is_an_answer(status: int) -> None:
    def refuse(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 %d No\r\nContent-Length: 2\r\n\r\nno" % status)
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.5)  # what has been sent meanwhile is not read: the connection is reset

    def some() -> Iterator[bytes]:
        for _ in range(10):
            yield bytes(100)
            time.sleep(0.1)

    with listening(refuse) as url:
        if status == 503:
            error = await undecided(HttpValidator(url, KEY))
            assert error.http_status == 503  # type: ignore[attr-defined]
        else:
            verdict = await HttpValidator(url, KEY).judge("SKU-1", some())
            assert (verdict.passed, verdict.http_status) == (False, status)


async def test_interim_answers_are_passed_over() -> None:
    """RFC 9110, 15.2: a client takes any of them at any time before the final one, also one that it does not know."""

    def serve(connection: socket.socket) -> None:
        received, content = b"", said("Valid").body
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(100_000)
        for interim in (b"100 Continue", b"102 Processing", b"103 Early Hints\r\nLink: </style.css>", b"199 What"):
            connection.sendall(b"HTTP/1.1 " + interim + b"\r\n\r\n")
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)

    with listening(serve) as url:
        assert (await HttpValidator(url, KEY).judge("SKU-1", package())).passed


@fault("Validator: takes no more of the zip", injector="socket", invariants="LH", outcome="no verdict within the time-out")
async def test_a_validator_that_takes_no_more_is_given_up_within_the_time_out() -> None:
    gone = threading.Event()
    with listening(lambda _: assert_waited(gone)) as url:
        with pytest.raises(Unavailable, match="in time"):
            await HttpValidator(url, KEY, timeout_seconds=1).judge("SKU-1", endless())
        gone.set()


def assert_waited(event: threading.Event) -> None:
    assert event.wait(20)


async def test_an_answer_that_never_ends_is_given_up_within_the_time_out(scripted: Callable[..., HttpServer]) -> None:
    drip = Answer(200, b" " * 1000, drip_seconds=0.2)
    began = time.monotonic()
    assert "in time" in (await undecided(open_validator(scripted(drip), timeout_seconds=1))).message
    assert time.monotonic() - began < allowed(8)


@pytest.mark.parametrize("silent", ["while it is sent", "while it answers", "while the package is waited for"])
async def test_a_cancellation_waits_for_nobody(silent: str) -> None:
    """And the thread that asked ends."""
    begun, gone = threading.Event(), threading.Event()

    def sending() -> Iterator[bytes]:
        begun.set()
        match silent:
            case "while it is sent":
                yield from endless()
            case "while the package is waited for":
                assert_waited(gone)
        yield b"PK"

    with listening(until_closed if silent != "while it is sent" else lambda _: assert_waited(gone)) as url:
        asking = asyncio.create_task(HttpValidator(url, KEY, timeout_seconds=60).judge("SKU-1", sending()))
        await asyncio.to_thread(begun.wait, 20)
        await asyncio.sleep(0.3)
        asking.cancel()
        async with asyncio.timeout(5):
            with pytest.raises(asyncio.CancelledError):
                await asking
        gone.set()


async def test_a_login_in_its_url_is_sent_as_one(scripted: Callable[..., HttpServer]) -> None:
    server = scripted(said("Valid"))
    await HttpValidator(server.url.replace("//", "//us%40er:pa%3Ass@"), None).judge("SKU-1", package())
    sent = server.requests[0].headers
    assert base64.b64decode(sent["authorization"].removeprefix("Basic ")) == b"us@er:pa:ss"
    assert sent["host"] == server.url.removeprefix("http://")


@pytest.mark.parametrize("key", ["a-secret\r\nX: y", "a-secret-\u0394"])
async def test_a_key_that_no_header_can_hold_is_not_told(scripted: Callable[..., HttpServer], key: str) -> None:
    server = scripted(said("Valid"))
    with pytest.raises(Unavailable, match="API key") as caught:
        await HttpValidator(server.url, key).judge("SKU-1", package())
    assert "secret" not in str(caught.value)
    assert server.requests == []


@pytest.mark.parametrize("trusted", [True, False])
async def test_its_certificate_must_be_trusted(
    scripted: Callable[..., HttpServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    made = make_certificates(tmp_path)
    monkeypatch.setattr(
        http_validator, "_tls", lambda: ssl.create_default_context(cafile=made.authority if trusted else made.foreign)
    )
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(made.server, made.server_key)

    def serve(connection: socket.socket) -> None:
        with serving.wrap_socket(connection, server_side=True) as encrypted:
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                received += encrypted.recv(100_000)
            assert b"PK zip" in received
            content = said("Valid").body
            encrypted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)

    with listening(serve) as url:
        validator = HttpValidator(url.replace("http:", "https:"), KEY)
        if trusted:
            assert (await validator.judge("SKU-1", package())).passed
        else:
            assert "cannot be reached" in (await undecided(validator)).message
