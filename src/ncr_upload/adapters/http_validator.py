"""The validator over HTTP.

The zip is streamed as one field of a multipart body, so its size never matters here. It is made and sent by one thread, on
http.client, since each crossing to the event loop and back costs as much as sending what crossed. Proxies and logins of the
environment are not used: the validator is a part of the installation.
"""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import quote

import httpx

from ncr_upload.application.ports import Verdict
from ncr_upload.domain.addresses import show_url
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.redaction import NO_SECRETS, Redactor
from ncr_upload.domain.text import CODE, NAME, REASON, Limit, bound_line, parse_json

PASSES = ("Valid", "Warning")
UNDECIDED = frozenset({408, 429})
CONNECT_SECONDS = 10
JOINED_BYTES = 64 * 1024
"""A piece up to that size is sent together with what goes around it."""
MAX_ANSWER_BYTES = 8 * 1024 * 1024
MAX_REASONS = 50
MAX_WORDS = 16_384
"""So much of a text is looked through for its beginning."""
LONGEST_WISH_SECONDS = 86_400.0
"""Of what a Retry-After may ask for."""
SKU_FIELDS = frozenset({"sku", "skuid", "product", "productid", "productsku"})
"""In lower case and without underscores."""
SEVERITIES = ("error", "warning", "info", "hint")
NO_ADDRESS, NOT_IN_TIME, CUT = "has no usable address", "did not answer in time", "cut the connection"
NEXT_STEP = "It is asked again; see whether the validator is up and VALIDATOR_API_URL is right."


class Undecided(Unavailable):
    """No verdict. `http_status` is the validator's answer, None when there was none."""

    http_status: int | None = None


class HttpValidator:
    """`timeout_seconds` bounds every wait for the validator: to take a piece of the zip, and for its whole answer.

    Time that `package` itself takes does not count, since the zip is made while files still arrive.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        key_header: str = "X-API-Key",
        timeout_seconds: float = 300,
        redactor: Redactor = NO_SECRETS,
    ) -> None:
        self._redactor = redactor
        self._target = url.rstrip("/")
        self._headers = {key_header: api_key} if api_key else {}
        self._key_header = key_header
        self._timeout_seconds = timeout_seconds
        self._threads = ThreadPoolExecutor(1000, thread_name_prefix="validator")

    @property
    def url(self) -> str:
        return show_url(self._target)

    @property
    def headers(self) -> dict[str, str]:
        """What is sent with every question: the key, so never log it."""
        return dict(self._headers)

    async def judge(self, sku: str, package: Iterable[bytes]) -> Verdict:
        answer = await self._ask(sku, package)
        status, body = answer.status, answer.body
        if len(body) > MAX_ANSWER_BYTES:
            raise self._undecided(f"sent an answer of over {MAX_ANSWER_BYTES} bytes", status)
        if status == 200:
            return self._read_verdict(sku, body)
        if 400 <= status < 500 and status not in UNDECIDED:
            reasons = self._reasons_of_refusal(status, body)
            return Verdict(False, f"HTTP {status}", status, _text(body), reasons)
        raise self._undecided(
            f"answered {status}" + (" (a redirect, which is not followed)" if 300 <= status < 400 else ""),
            status,
            _retry_after_seconds(answer.headers.get("Retry-After")),
        )

    async def _ask(self, sku: str, package: Iterable[bytes]) -> _Answer:
        """Raises `Undecided` for whatever the network does, and what `package` raises. The deadline runs from when the
        validator has all of the zip."""
        loop = asyncio.get_running_loop()
        question = _Question(self._headers, self._timeout_seconds)
        address = f"{self._target}/{quote(sku, safe='')}"

        def limit_answer() -> None:
            if not question.abandoned:
                deadline.reschedule(loop.time() + self._timeout_seconds)

        try:
            async with asyncio.timeout(None) as deadline:
                asked = partial(loop.call_soon_threadsafe, limit_answer)
                return await asyncio.wrap_future(self._threads.submit(question.ask, address, sku, package, asked))
        except _Unanswered as error:
            raise self._undecided(str(error)) from None
        except TimeoutError:
            if not deadline.expired():
                raise  # the package's own
            raise self._undecided(NOT_IN_TIME) from None
        finally:
            question.abandon()

    def _read_verdict(self, sku: str, body: bytes) -> Verdict:
        """docs/contract.md, section 4: all entries must pass; what cannot be read is unknown, never a pass."""
        try:
            answer = parse_json(body)
            entries = answer["data"]
            if not isinstance(entries, list):
                raise TypeError
            results = [entry["result"] for entry in entries]
        except (ValueError, TypeError, KeyError):
            raise self._undecided("answered 200 with something that is no verdict", 200) from None
        if not results or not all(isinstance(result, str) for result in results):
            raise self._undecided("answered 200 with no result in it", 200)
        if (other := _other_sku(sku, [answer, *entries])) is not None:
            raise self._undecided(f"judged SKU {bound_line(other, NAME)!r} when asked about {sku!r}", 200)
        bad = next((result for result in results if result not in PASSES), None)
        reasons = tuple(self._told(reason, REASON) for reason in _reasons(entries))
        if bad is not None:
            return Verdict(False, self._told(bad, CODE), 200, _text(body), reasons)
        return Verdict(True, "Warning" if "Warning" in results else "Valid", 200, _text(body), reasons)

    def _told(self, text: str, limit: Limit) -> str:
        """The validator's words as they may be shown."""
        if len(text) <= MAX_WORDS:
            return bound_line(self._redactor.redact(text), limit)
        return bound_line(self._redactor.redact(text[:MAX_WORDS]), limit, characters_in_all=len(text))

    def _reasons_of_refusal(self, status: int, body: bytes) -> tuple[str, ...]:
        if status in (401, 403):
            return (
                f"The validator at {self.url} refused the API key ({status}): correct VALIDATOR_API_KEY, sent in the header "
                f"{self._key_header} (VALIDATOR_API_KEY_HEADER), then submit the job again.",
            )
        said = self._told(_said(body), REASON)
        return (f"The validator at {self.url} answered {status}{': ' + said if said else ''}",)

    def _undecided(self, what: str, http_status: int | None = None, retry_after_seconds: float | None = None) -> Undecided:
        told = self._redactor.redact(f"the validator at {self.url} {what}")
        error = Undecided("validator_undecided", told, NEXT_STEP, retry_after_seconds)
        error.http_status = http_status
        return error


class _Unanswered(Exception):
    """Why there is no answer, in words."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """Of `body` no more than one byte beyond MAX_ANSWER_BYTES is read."""

    status: int
    headers: Message
    body: bytes


class _FinalAnswer(HTTPResponse):
    """Every interim answer is passed over (RFC 9110, 15.2), where http.client does so with 100 alone."""

    def _read_status(self) -> tuple[str, int, str]:
        version, status, reason = super()._read_status()  # type: ignore[misc]
        is_interim = 100 <= status < 200 and status != HTTPStatus.SWITCHING_PROTOCOLS
        return version, HTTPStatus.CONTINUE if is_interim else status, reason


class _Question:
    """One request, in a thread of its own, which `abandon` frees from waiting for the validator."""

    def __init__(self, headers: Mapping[str, str], timeout_seconds: float) -> None:
        self.abandoned = False
        self._headers = headers
        self._timeout_seconds = timeout_seconds
        self._socket: socket.socket | None = None

    def ask(self, address: str, sku: str, package: Iterable[bytes], asked: Callable[[], object]) -> _Answer:
        """Raises `_Unanswered`, and what `package` raises. `asked` is called when all of it is sent."""
        url, boundary = _parse(address), f"ncr-{uuid.uuid4().hex}"
        connection = self._connect(url)
        try:
            self._put_head(connection, url, boundary)
            for piece in _chunked(_frame(sku, package, boundary)):
                if not _send(connection, piece):
                    break
            asked()
            return _receive(connection)
        finally:
            self._socket = None
            connection.close()

    def abandon(self) -> None:
        """Its thread ends as soon as the package lets it."""
        self.abandoned = True
        if (connected := self._socket) is not None:
            with suppress(OSError):
                socket.socket.shutdown(connected, socket.SHUT_RDWR)  # TLS's own lets a thread that sends go on in clear text

    def _connect(self, url: httpx.URL) -> HTTPConnection:
        host, seconds = url.raw_host.decode("ascii"), min(CONNECT_SECONDS, self._timeout_seconds)
        connection = (
            HTTPSConnection(host, url.port or 443, timeout=seconds, context=_tls())
            if url.scheme == "https"
            else HTTPConnection(host, url.port or 80, timeout=seconds)
        )
        connection.response_class = _FinalAnswer
        try:
            connection.connect()
        except (OSError, UnicodeError):
            connection.close()
            raise _Unanswered("cannot be reached") from None
        connection.sock.settimeout(self._timeout_seconds)
        self._socket = connection.sock
        if self.abandoned:
            self.abandon()
        return connection

    def _put_head(self, connection: HTTPConnection, url: httpx.URL, boundary: str) -> None:
        headers = {
            "Host": url.netloc.decode("ascii"),
            "User-Agent": "ncr-upload",
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Transfer-Encoding": "chunked",
        }
        if url.userinfo:
            headers["Authorization"] = f"Basic {base64.b64encode(f'{url.username}:{url.password}'.encode()).decode()}"
        connection.putrequest("POST", url.raw_path.decode("ascii"), skip_host=True, skip_accept_encoding=True)
        try:
            for name, value in {**headers, **self._headers}.items():
                connection.putheader(name, value)
        except ValueError:  # it has the value in its words
            raise _Unanswered("cannot be asked: no header can hold the API key, or has that name") from None
        with suppress(OSError):
            connection.endheaders()


def _parse(address: str) -> httpx.URL:
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL:
        raise _Unanswered(NO_ADDRESS) from None
    if url.scheme not in ("http", "https") or not url.host:
        raise _Unanswered(NO_ADDRESS)
    return url


def _send(connection: HTTPConnection, piece: bytes) -> bool:
    """False when the validator takes no more; it may have answered."""
    try:
        connection.send(piece)
    except TimeoutError:
        raise _Unanswered(NOT_IN_TIME) from None
    except OSError:
        return False
    return True


def _receive(connection: HTTPConnection) -> _Answer:
    try:
        answer = connection.getresponse()
        body = answer.read(MAX_ANSWER_BYTES + 1)
    except TimeoutError:
        raise _Unanswered(NOT_IN_TIME) from None
    except (OSError, HTTPException):
        raise _Unanswered(CUT) from None
    if answer.length and len(body) <= MAX_ANSWER_BYTES:
        raise _Unanswered(CUT)
    return _Answer(answer.status, answer.headers, body)


def _chunked(body: Iterable[bytes]) -> Iterator[bytes]:
    for piece in body:
        size = b"%x\r\n" % len(piece)
        if len(piece) <= JOINED_BYTES:
            yield size + piece + b"\r\n"
        else:
            yield from (size, piece, b"\r\n")
    yield b"0\r\n\r\n"


def _frame(sku: str, package: Iterable[bytes], boundary: str) -> Iterator[bytes]:
    """The multipart body around the zip, in pieces of which none is empty."""
    name = sku.replace("\\", "\\\\").replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
    yield (
        f'--{boundary}\r\nContent-Disposition: form-data; name="zip_file"; filename="{name}.zip"\r\n'
        "Content-Type: application/zip\r\n\r\n"
    ).encode()
    yield from filter(None, package)
    yield f"\r\n--{boundary}--\r\n".encode()


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    """Made once: to read all the authorities takes as long as a small job's download."""
    return httpx.create_ssl_context(trust_env=False)


def _other_sku(asked: str, objects: list[dict[str, Any]]) -> str | None:
    """The product that the answer, or an entry of it, says it is about, if that is not the one asked about."""
    named = (value for each in objects for name, value in each.items() if _plain(name) in SKU_FIELDS)
    plain = (str(value) for value in named if value and type(value) in (str, int))
    return next((name for name in plain if name != asked), None)


def _plain(field: str) -> str:
    return field.lower().replace("_", "")


def _retry_after_seconds(header: str | None) -> float | None:
    """RFC 9110, 10.2.3: seconds or a date."""
    if not header:
        return None
    if header.strip().isascii() and header.strip().isdigit():
        return min(float(header), LONGEST_WISH_SECONDS)
    try:
        at = parsedate_to_datetime(header)
        seconds = (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, OverflowError):
        return None
    return min(max(0.0, seconds), LONGEST_WISH_SECONDS)


def _reasons(entries: list[dict[str, Any]]) -> tuple[str, ...]:
    """The findings of all entries in words, worst first."""
    found: list[tuple[int, str]] = []
    for entry in entries:
        for key in ("issues", "messages"):
            issues = entry.get(key)
            if isinstance(issues, list):
                found += [_worded(issue) for issue in issues]
                break
    found.sort(key=lambda pair: pair[0])
    left = len(found) - MAX_REASONS
    return (*(words for _, words in found[:MAX_REASONS]), *([f"and {left:,} more"] if left > 0 else []))


def _worded(issue: object) -> tuple[int, str]:
    """(rank, words) of a finding: a text, or an object with file, code, severity (word or 0 to 3), pointer, message."""
    if not isinstance(issue, dict):
        return 0, str(issue)
    severity = issue.get("severity")
    rank = (
        severity if isinstance(severity, int) else next((n for n, s in enumerate(SEVERITIES) if s == str(severity).lower()), 0)
    )
    word = SEVERITIES[rank] if 0 <= rank < len(SEVERITIES) else ""
    place = " ".join(str(issue[key]) for key in ("file", "pointer") if issue.get(key))
    code = f" ({issue['code']})" if issue.get("code") else ""
    return rank, ": ".join(part for part in (word, place, str(issue.get("message") or "")) if part) + code


def _said(body: bytes) -> str:
    """What an error answer says: the usual fields of JSON, else the text."""
    try:
        content = parse_json(body)
    except ValueError:
        return _text(body)
    if isinstance(content, dict):
        content = next((content[key] for key in ("detail", "message", "error", "title") if content.get(key)), content)
    return str(content)


def _text(body: bytes) -> str:
    """As sent, but for what no database takes."""
    return body.decode("utf-8", errors="replace").replace("\0", "\ufffd")
