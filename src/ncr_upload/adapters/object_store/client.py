"""Ask one bucket for objects, by signed requests: HEAD, GET and LIST, with retries, resumption and checked redirects.

obstore, which was used before, follows every redirect and has no switch for it. Blocking: called in threads.
"""

from __future__ import annotations

import errno
import random
import re
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlencode, urlsplit

from ncr_upload.adapters.object_store.listing import ListPage, ListParser
from ncr_upload.adapters.object_store.signing import Signer
from ncr_upload.adapters.object_store.transport import (
    TRANSPORT_ERRORS,
    AnswerCut,
    AnswerMalformed,
    Cancellation,
    Connections,
    ProxyRefused,
    Reply,
)
from ncr_upload.domain.redirects import (
    AllowedHost,
    RedirectRefused,
    RedirectRules,
    Target,
    parse_origin,
)

CHUNK_BYTES = 256 * 1024
PROGRESS_BYTES = 1024 * 1024
"""A body that has come so much further may be resumed as often again."""

MAX_ERROR_BYTES = 64 * 1024
MAX_LIST_BYTES = 16 * 1024 * 1024
BACKOFF_SECONDS = (0.2, 3.0)
RETRIED_STATUSES = frozenset({408, 425, 429, *range(500, 600)})
REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
_CODE = re.compile(rb"<Code>\s*(\w{1,64})\s*</Code>")
_ENDPOINT = re.compile(rb"<Endpoint>\s*([\w.:-]{1,120})\s*</Endpoint>")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.ASCII)
_ILLEGAL_KEY = re.compile(r"[\x00-\x1f\x7f]|(^|/)\.{0,2}(/|$)")
_SIGNED_QUERY = re.compile(r"[?&](X-Amz-Signature|Signature)=", re.IGNORECASE)


class IllegalKey(Exception):
    """No object of ours can have this key."""


class StorageFailure(Exception):
    """The storage did not give what was asked for. `cause` is in words of ours, or the storage's bounded code."""

    def __init__(self, cause: str, *, status: int = 0, code: str = "", may_heal: bool = True) -> None:
        super().__init__(cause)
        self.cause = cause
        self.status = status
        self.code = code
        self.may_heal = may_heal


class ObjectReplaced(StorageFailure):
    """The object is another one than the one asked for."""


class NotInRanges(StorageFailure):
    """The server does not serve ranges of this object."""


class Redirected(StorageFailure):
    """The storage redirects to where we must not go. `pointed_to` is bounded and printable; it may be empty."""

    def __init__(self, reason: str, pointed_to: str, status: int) -> None:
        super().__init__(reason, status=status, may_heal=False)
        self.pointed_to = pointed_to


@dataclass(slots=True)
class _Retries:
    """A budget of retries: so many within so many seconds, with jittered exponential backoff."""

    most: int
    seconds: float
    cancellation: Cancellation
    used: int = 0
    since: float = 0

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.used, self.since = 0, time.monotonic()

    def wait_after(self, failure: StorageFailure) -> None:
        """Sleep before the next try. Raises `failure` when there is none."""
        self.cancellation.check()
        if not failure.may_heal or self.used >= self.most or time.monotonic() - self.since > self.seconds:
            raise failure
        first, longest = BACKOFF_SECONDS
        self.used += 1
        self.cancellation.sleep(random.uniform(first, min(longest, first * 2**self.used)))


class ObjectBody:
    """The body of an object, or of a range of it, not read yet. Read it once, by `chunks` or `read_all`, or `close` it."""

    def __init__(self, client: S3Client, key: str, reply: Reply, span: tuple[int, int], size: int, retries: _Retries) -> None:
        self.size = size
        self.etag = reply.header("ETag")
        self._client = client
        self._key = key
        self._reply = reply
        self._start, self._end = span
        self._retries = retries

    @property
    def length(self) -> int:
        return self._end - self._start

    @property
    def cancellation(self) -> Cancellation:
        return self._retries.cancellation

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes in order. A body that breaks off is resumed, from the same object only. Raises `StorageFailure`."""
        offset, since_progress = self._start, 0
        try:
            while offset < self._end:
                try:
                    chunk = self._reply.read(min(CHUNK_BYTES, self._end - offset))
                    if not chunk:
                        raise AnswerCut
                except TRANSPORT_ERRORS as error:
                    self._reply.close()
                    self._reply = self._resume(offset, _failure_of(error))
                    continue
                offset += len(chunk)
                since_progress += len(chunk)
                if since_progress >= PROGRESS_BYTES:
                    since_progress = 0
                    self._retries.reset()
                yield chunk
            if self._end == self._start:
                self._reply.read_rest()
            else:
                self._reply.finish()
        except BaseException:
            self._reply.close()
            raise

    def read_all(self) -> bytes:
        return b"".join(self.chunks())

    def close(self) -> None:
        self._reply.close()

    def _resume(self, offset: int, failure: StorageFailure) -> Reply:
        if not self.etag or self.etag.startswith("W/"):
            raise failure
        self._retries.wait_after(failure)
        try:
            rest = self._client.get_range(self._key, (offset, self._end), self.etag, self._retries, statuses=(200, 206))
        except NotInRanges:
            raise failure from None
        if rest.size != self.size:
            rest.close()
            raise ObjectReplaced("it was replaced while it was read", may_heal=False)
        return rest._reply


class S3Client:
    """One bucket at one endpoint, in path style. Safe to use from several threads."""

    def __init__(
        self,
        endpoint: str,
        region: str,
        access_key: str,
        secret_key: str,
        bucket: str,
        redirect_hosts: tuple[AllowedHost, ...],
        connections: Connections,
        max_retries: int,
        retry_seconds: float,
    ) -> None:
        self._origin = parse_origin(endpoint)
        self._bucket_path = f"{urlsplit(endpoint).path.rstrip('/')}/{quote(bucket, safe='-_.~')}"
        self._signer = Signer(access_key, secret_key, region)
        self._rules = RedirectRules(self._origin, redirect_hosts)
        self._connections = connections
        self._max_retries = max_retries
        self._retry_seconds = retry_seconds

    def head(self, key: str, cancellation: Cancellation) -> tuple[int, str]:
        """Return size and ETag of an object. Raises `StorageFailure`, `IllegalKey`."""
        reply = self._request("HEAD", self._path_of(key), {}, self._retries(cancellation))
        size, etag = _content_length(reply), reply.header("ETag")
        reply.read_rest()
        if size is None:
            raise StorageFailure("it did not say how large the object is")
        return size, etag

    def get(self, key: str, cancellation: Cancellation) -> ObjectBody:
        """Ask for a complete object. Raises `StorageFailure`, `IllegalKey`."""
        retries = self._retries(cancellation)
        reply = self._request("GET", self._path_of(key), {}, retries)
        size = _content_length(reply)
        if size is None or reply.status != 200:
            reply.close()
            raise StorageFailure("it did not say how large the object is")
        return ObjectBody(self, key, reply, (0, size), size, retries)

    def get_part(self, key: str, span: tuple[int, int], etag: str, cancellation: Cancellation) -> ObjectBody:
        """Ask for the bytes from `span[0]` up to `span[1]` of the object with this ETag (quoted). Raises `ObjectReplaced`,
        `NotInRanges` and other `StorageFailure`."""
        return self.get_range(key, span, etag, self._retries(cancellation))

    def get_range(
        self, key: str, span: tuple[int, int], etag: str, retries: _Retries, statuses: tuple[int, ...] = (206,)
    ) -> ObjectBody:
        """As `get_part`. Some servers (rclone) say 200 where they serve the range."""
        start, end = span
        headers = {"Range": f"bytes={start}-{end - 1}", "If-Match": etag}
        try:
            reply = self._request("GET", self._path_of(key), headers, retries)
        except StorageFailure as failure:
            if failure.status == 412:
                raise ObjectReplaced("it was replaced since", status=412, may_heal=False) from None
            raise
        found = _CONTENT_RANGE.fullmatch(reply.header("Content-Range").strip()) if reply.status in statuses else None
        if found is None:
            reply.close()
            raise NotInRanges("it serves no ranges", may_heal=False)
        first, last, size = map(int, found.groups())
        if (first, last) != (start, end - 1) or _content_length(reply) not in (None, end - start):
            reply.close()
            raise StorageFailure("it answered another range than was asked for")
        if reply.header("ETag") and reply.header("ETag") != etag:
            reply.close()
            raise ObjectReplaced("it was replaced since", may_heal=False)
        return ObjectBody(self, key, reply, span, size, retries)

    def list_page(self, prefix: str, max_keys: int, token: str, cancellation: Cancellation) -> ListPage:
        """Return the objects of one page, in the order of their keys. Raises `StorageFailure` and `ValueError`."""
        query = {"list-type": "2", "max-keys": str(max_keys), "prefix": prefix}
        if token:
            query["continuation-token"] = token
        path = f"{self._bucket_path}?{urlencode(query, quote_via=quote, safe='-_.~')}"
        reply = self._request("GET", path, {}, self._retries(cancellation))
        parser, left = ListParser(max_keys), MAX_LIST_BYTES
        try:
            while chunk := reply.read(min(CHUNK_BYTES, left)):
                parser.feed(chunk)
                left -= len(chunk)
                if left <= 0:
                    raise ValueError("the list is too long")
            page = parser.finish()
        except TRANSPORT_ERRORS as error:
            reply.close()
            if isinstance(error, ValueError):
                raise
            raise _failure_of(error) from None
        reply.finish()
        return page

    def _retries(self, cancellation: Cancellation) -> _Retries:
        return _Retries(self._max_retries, self._retry_seconds, cancellation)

    def _path_of(self, key: str) -> str:
        if not key or _ILLEGAL_KEY.search(key):
            raise IllegalKey
        try:
            return f"{self._bucket_path}/{quote(key, safe='/-_.~')}"
        except UnicodeEncodeError:
            raise IllegalKey from None

    def _request(self, method: str, path: str, headers: Mapping[str, str], retries: _Retries) -> Reply:
        while True:
            try:
                return self._follow(method, path, headers, retries.cancellation)
            except StorageFailure as failure:
                retries.wait_after(failure)

    def _follow(self, method: str, path: str, headers: Mapping[str, str], cancellation: Cancellation) -> Reply:
        """Send it to the endpoint, and then to wherever it redirects to within the rules. Only requests to the endpoint's own
        host are signed, and none whose URL is signed already."""
        target, redirects = Target(self._origin, path), 0
        while True:
            reply = self._ask(method, target, headers, cancellation)
            status, location = reply.status, reply.header("Location")
            if 200 <= status < 300:
                return reply
            if status in REDIRECT_STATUSES and location:
                reply.close()
                try:
                    target = self._rules.next_target(location, target, redirects)
                except RedirectRefused as refused:
                    raise Redirected(refused.reason, refused.pointed_to, status) from None
                redirects += 1
                continue
            raise _refusal_of(reply, was_redirected=redirects > 0, target=target)

    def _ask(self, method: str, target: Target, headers: Mapping[str, str], cancellation: Cancellation) -> Reply:
        cancellation.check()
        sent = {"host": target.origin.host_header, **headers}
        if self._rules.is_endpoint(target.origin) and not _SIGNED_QUERY.search(target.path):
            sent |= self._signer.headers(method, target.origin.host_header, target.path)
        try:
            return self._connections.exchange(method, target, sent, cancellation)
        except TRANSPORT_ERRORS as error:
            cancellation.check()
            raise _failure_of(error) from None


def _content_length(reply: Reply) -> int | None:
    """Return the announced length; None for a chunked body, or one that ends with the connection."""
    announced = reply.header("Content-Length")
    if not (announced.isascii() and announced.isdecimal() and len(announced) <= 19) or reply.header("Transfer-Encoding"):
        return None
    return int(announced)


def _refusal_of(reply: Reply, *, was_redirected: bool, target: Target) -> StorageFailure:
    """Read why the storage refuses, then finish."""
    status = reply.status
    try:
        text = reply.read_rest(MAX_ERROR_BYTES)
    except TRANSPORT_ERRORS as error:
        return _failure_of(error) if status in RETRIED_STATUSES else StorageFailure("", status=status, may_heal=False)
    found, endpoint = _CODE.search(text), _ENDPOINT.search(text)
    code = found[1].decode("ascii", "replace") if found else ""
    if status in REDIRECT_STATUSES:
        region = reply.header("x-amz-bucket-region")[:40]
        where = f"in region {region}" if re.fullmatch(r"[\w-]+", region) else "elsewhere"
        pointed_to = endpoint[1].decode("ascii", "replace") if endpoint else ""
        return Redirected(f"it says that the bucket is {where} ({code or status})", pointed_to, status)
    cause = code or f"it answered {status}"
    if was_redirected:
        cause += f", after a redirect to {target.origin}"
    return StorageFailure(cause, status=status, code=code, may_heal=status in RETRIED_STATUSES)


_CAUSES: tuple[tuple[type[Exception], str], ...] = (
    (socket.gaierror, "its name cannot be resolved"),
    (ssl.SSLCertVerificationError, "its TLS certificate is not trusted"),
    (ssl.SSLEOFError, "it cut the answer"),
    (ssl.SSLError, "it does not speak TLS"),
    (AnswerMalformed, "what it answered is not HTTP"),
    (AnswerCut, "it cut the answer"),
    (ProxyRefused, "the proxy that the environment names does not connect to it"),
    (ConnectionRefusedError, "the connection was refused"),
    (TimeoutError, "it did not answer in time"),
    (ConnectionResetError, "the connection was reset"),
    (BrokenPipeError, "the connection was reset"),
)
_ERRNO_CAUSES = {errno.ENETUNREACH: "the network is unreachable", errno.EHOSTUNREACH: "the host is unreachable"}


def _failure_of(error: Exception) -> StorageFailure:
    """Class what the connection raised. Of the error only its type is used, since its text may hold anything."""
    cause = next((words for kind, words in _CAUSES if isinstance(error, kind)), "")
    if not cause and isinstance(error, OSError):
        cause = _ERRNO_CAUSES.get(error.errno or 0, "")
    return StorageFailure(cause or "the request failed")
