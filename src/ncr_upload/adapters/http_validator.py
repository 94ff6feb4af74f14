"""The validator over HTTP, on httpx.

The zip is streamed as one field of a multipart body, so its size never matters here. Proxies and logins of the
environment are not used: the validator is a part of the installation.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import httpx

from ncr_upload.application.ports import Verdict
from ncr_upload.domain.errors import Unavailable

PASSES = ("Valid", "Warning")
UNDECIDED = frozenset({408, 429})
CONNECT_SECONDS = 10
MAX_ANSWER_BYTES = 8 * 1024 * 1024
MAX_REASONS = 50
MAX_REASON_CHARS = 400
SKU_FIELDS = frozenset({"sku", "skuid", "product", "productid", "productsku"})
"""In lower case and without underscores."""
SEVERITIES = ("error", "warning", "info", "hint")
NEXT_STEP = "It is asked again; see whether the validator is up and VALIDATOR_API_URL is right."


class Undecided(Unavailable):
    """No verdict. `http_status` is the validator's answer, None when there was none."""

    http_status: int | None = None


class HttpValidator:
    """`timeout_seconds` bounds every wait for the validator: to take a piece of the zip, and for its whole answer.

    Time that `package` itself takes does not count, since the zip is made while files still arrive.
    """

    def __init__(self, url: str, api_key: str | None, key_header: str = "X-API-Key", timeout_seconds: float = 300) -> None:
        self._target = url.rstrip("/")
        self._headers = {key_header: api_key} if api_key else {}
        self._key_header = key_header
        self._timeout_seconds = timeout_seconds

    @property
    def url(self) -> str:
        parts = urlsplit(self._target)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    @property
    def headers(self) -> dict[str, str]:
        """What is sent with every question: the key, so never log it."""
        return dict(self._headers)

    async def judge(self, sku: str, package: AsyncIterator[bytes]) -> Verdict:
        answer, body = await self._ask(sku, package)
        status = answer.status_code
        if status == 200:
            return self._read_verdict(sku, body)
        if 400 <= status < 500 and status not in UNDECIDED:
            return Verdict(False, f"HTTP {status}", status, _text(body), self._reasons_of_refusal(status, body))
        raise self._undecided(
            f"answered {status}" + (" (a redirect, which is not followed)" if answer.is_redirect else ""),
            status,
            _retry_after_seconds(answer.headers.get("Retry-After")),
        )

    async def _ask(self, sku: str, package: AsyncIterator[bytes]) -> tuple[httpx.Response, bytes]:
        """The answer with its body. Raises `Undecided` for whatever the network does, and what `package` raises."""
        boundary = f"ncr-{uuid.uuid4().hex}"
        waits = httpx.Timeout(self._timeout_seconds, connect=min(CONNECT_SECONDS, self._timeout_seconds))
        try:
            async with (
                asyncio.timeout(None) as deadline,
                httpx.AsyncClient(verify=_tls(), timeout=waits, trust_env=False, follow_redirects=False) as client,
                client.stream(
                    "POST",
                    f"{self._target}/{quote(sku, safe='')}",
                    headers={
                        **self._headers,
                        "Content-Type": f"multipart/form-data; boundary={boundary}",
                        "Accept": "application/json",
                        "Accept-Encoding": "identity",
                    },
                    content=_frame(sku, package, boundary, deadline, self._timeout_seconds),
                ) as answer,
            ):
                return answer, await self._read_bounded(answer)
        except (httpx.RequestError, httpx.InvalidURL, TimeoutError) as error:
            if isinstance(error, TimeoutError) and not deadline.expired():
                raise  # the package's own
            raise self._undecided(_cause(error)) from None

    async def _read_bounded(self, answer: httpx.Response) -> bytes:
        body = bytearray()
        async for chunk in answer.aiter_bytes():
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                raise self._undecided(f"sent an answer of over {MAX_ANSWER_BYTES} bytes", answer.status_code)
        return bytes(body)

    def _read_verdict(self, sku: str, body: bytes) -> Verdict:
        """DESIGN 3.4: all entries must pass; what cannot be read is unknown, never a pass."""
        try:
            answer = json.loads(body)
            entries = answer["data"]
            if not isinstance(entries, list):
                raise TypeError
            results = [entry["result"] for entry in entries]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise self._undecided("answered 200 with something that is no verdict", 200) from None
        if not results or not all(isinstance(result, str) for result in results):
            raise self._undecided("answered 200 with no result in it", 200)
        if (other := _other_sku(sku, [answer, *entries])) is not None:
            raise self._undecided(f"judged SKU {other[:100]!r} when asked about {sku!r}", 200)
        bad = [result for result in results if result not in PASSES]
        if bad:
            return Verdict(False, bad[0][:100], 200, _text(body), _reasons(entries))
        return Verdict(True, "Warning" if "Warning" in results else "Valid", 200, _text(body), _reasons(entries))

    def _reasons_of_refusal(self, status: int, body: bytes) -> tuple[str, ...]:
        if status in (401, 403):
            return (
                f"The validator at {self.url} refused the API key ({status}): correct VALIDATOR_API_KEY, sent in the header "
                f"{self._key_header} (VALIDATOR_API_KEY_HEADER), then submit the job again.",
            )
        said = _said(body)
        return (f"The validator at {self.url} answered {status}{': ' + said if said else ''}",)

    def _undecided(self, what: str, http_status: int | None = None, retry_after_seconds: float | None = None) -> Undecided:
        error = Undecided("validator_undecided", f"the validator at {self.url} {what}", NEXT_STEP, retry_after_seconds)
        error.http_status = http_status
        return error


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    """Made once: to read all the authorities takes as long as a small job's download."""
    return httpx.create_ssl_context(trust_env=False)


async def _frame(
    sku: str, package: AsyncIterator[bytes], boundary: str, deadline: asyncio.Timeout, timeout_seconds: float
) -> AsyncIterator[bytes]:
    """The multipart body around the zip. The deadline runs while the validator has the word, not while `package` has."""
    loop = asyncio.get_running_loop()
    name = sku.replace("\\", "\\\\").replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
    yield (
        f'--{boundary}\r\nContent-Disposition: form-data; name="zip_file"; filename="{name}.zip"\r\n'
        "Content-Type: application/zip\r\n\r\n"
    ).encode()
    deadline.reschedule(None)
    async for chunk in package:
        deadline.reschedule(loop.time() + timeout_seconds)
        yield chunk
        deadline.reschedule(None)
    deadline.reschedule(loop.time() + timeout_seconds)
    yield f"\r\n--{boundary}--\r\n".encode()


def _other_sku(asked: str, objects: list[dict[str, Any]]) -> str | None:
    """The product that the answer, or an entry of it, says it is about, if that is not the one asked about."""
    named = (value for each in objects for name, value in each.items() if _plain(name) in SKU_FIELDS)
    plain = (str(value) for value in named if value and type(value) in (str, int))
    return next((name for name in plain if name != asked), None)


def _plain(field: str) -> str:
    return field.lower().replace("_", "")


def _cause(error: Exception) -> str:
    match error:
        case httpx.ConnectTimeout() | httpx.ConnectError():
            return "cannot be reached"
        case httpx.TimeoutException() | TimeoutError():
            return "did not answer in time"
        case httpx.UnsupportedProtocol() | httpx.InvalidURL():
            return "has no usable address"
        case _:
            return "cut the connection"


def _retry_after_seconds(header: str | None) -> float | None:
    """RFC 9110, 10.2.3: seconds or a date."""
    if not header:
        return None
    if header.strip().isascii() and header.strip().isdigit():
        return float(header)
    try:
        at = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


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
    return tuple(words for _, words in found[:MAX_REASONS])


def _worded(issue: object) -> tuple[int, str]:
    """(rank, words) of a finding: a text, or an object with file, code, severity (word or 0 to 3), pointer, message."""
    if not isinstance(issue, dict):
        return 0, _line(issue)
    severity = issue.get("severity")
    rank = (
        severity if isinstance(severity, int) else next((n for n, s in enumerate(SEVERITIES) if s == str(severity).lower()), 0)
    )
    word = SEVERITIES[rank] if 0 <= rank < len(SEVERITIES) else ""
    place = " ".join(str(issue[key]) for key in ("file", "pointer") if issue.get(key))
    code = f" ({issue['code']})" if issue.get("code") else ""
    return rank, _line(": ".join(part for part in (word, place, str(issue.get("message") or "")) if part) + code)


def _said(body: bytes) -> str:
    """What an error answer says, in one line: the usual fields of JSON, else the text."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return _line(_text(body[: 4 * MAX_REASON_CHARS]))
    if isinstance(content, dict):
        content = next((content[key] for key in ("detail", "message", "error", "title") if content.get(key)), content)
    return _line(content)


def _line(value: object) -> str:
    return " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())[:MAX_REASON_CHARS]


def _text(body: bytes) -> str:
    """As sent, but for what no database takes."""
    return body.decode("utf-8", errors="replace").replace("\0", "\ufffd")
