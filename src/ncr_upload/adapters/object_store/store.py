"""Read the bucket over any S3 API.

The client retries within a request, resumes a cut body by range and holds every resumption against the ETag of the
first answer; what still fails after that is classed here, once.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from ncr_upload.adapters.object_store.client import (
    IllegalKey,
    NotInRanges,
    ObjectBody,
    ObjectReplaced,
    Redirected,
    S3Client,
    StorageFailure,
)
from ncr_upload.adapters.object_store.receiving import (
    Bodies,
    Body,
    Checksums,
    Frontier,
    Md5,
    Teller,
    all_or_first_failure,
    hash_behind,
    receive_whole,
    write_new,
    write_range,
)
from ncr_upload.adapters.object_store.transport import Cancellation, Connections
from ncr_upload.application.arrivals import SMALL_BYTES, Follower, Turns
from ncr_upload.application.ports import Fetched, ObjectInfo, OnBytes
from ncr_upload.domain.errors import Deferred, DeliveryError, Rejected, Unavailable
from ncr_upload.domain.redaction import NO_SECRETS, Redactor
from ncr_upload.domain.redirects import normalize_host, parse_allowed_host
from ncr_upload.domain.text import NAME, QUOTE

T = TypeVar("T")

RANGE_BYTES = 16 * 1024 * 1024
"""An object of two ranges or more is fetched over several requests at once."""

RANGES_AT_ONCE = 4
LISTED_FROM = 16
"""So many objects are asked for by one request for a list of their folder."""

LIST_PAGE = 1000
LIST_SECONDS = 5
MAX_RETRIES = 3
MAX_ETAG_CHARACTERS = 255
RETRY_SECONDS = 30
ANSWER_SECONDS = 180
"""Until the head of an answer is here, with all that is tried again meanwhile and what an error says. A read time-out alone
bounds no server that sends interim answers, or a byte now and then."""

LONGEST_DOWNLOAD_SECONDS = 24 * 60 * 60  # a stalled one ends by the read time-out
_MD5 = re.compile(r"[0-9a-f]{32}")
_LOGIN_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}


class S3ObjectStore:
    """One bucket. Settings that are missing are named by the first call, not by the constructor.

    Time-outs: `connect_timeout_seconds` to connect, `read_timeout_seconds` without a byte; a request is retried at
    most MAX_RETRIES times within RETRY_SECONDS, and answered within ANSWER_SECONDS.
    """

    def __init__(
        self,
        endpoint: str | None,
        region: str,
        access_key: str | None,
        secret_key: str | None,
        bucket: str | None,
        verify_etag_md5: bool = True,
        connect_timeout_seconds: float = 5,
        read_timeout_seconds: float = 20,
        redirect_hosts: Sequence[str] = (),
        redactor: Redactor = NO_SECRETS,
    ) -> None:
        self._redactor = redactor
        self._endpoint = _full_url(endpoint or "")
        self._region = region
        self._bucket = bucket or ""
        self._access_key = access_key or ""
        self._secret_key = secret_key or ""
        self._verify_etag_md5 = verify_etag_md5
        self._connections = Connections(connect_timeout_seconds, read_timeout_seconds)
        self._redirect_hosts = tuple(map(parse_allowed_host, redirect_hosts))
        self._opened: S3Client | None = None
        self._bodies = Bodies()
        self._fetches = itertools.count()
        self._gives_lists = True

    @property
    def source(self) -> str:
        return f"{self._endpoint} {self._bucket}" + (" md5" if self._verify_etag_md5 else "")

    async def stat(self, key: str) -> ObjectInfo:
        def ask(cancellation: Cancellation) -> tuple[int, str]:
            with self._translated(key):
                try:
                    return self._client().head(key, cancellation)
                except Redirected as redirected:
                    if redirected.pointed_to:
                        raise
                except StorageFailure:
                    pass
                # The answer to a HEAD has no body, hence no error code: a GET says what is wrong.
                body = self._client().get(key, cancellation)
                body.close()
                return body.size, body.etag

        size, etag = await self._in_thread(key, ask)
        return ObjectInfo(key, size, _plain_etag(etag))

    async def glance(self, keys: Sequence[str]) -> Mapping[str, ObjectInfo]:
        """Of a folder with many other objects only the beginning is read. A store that fails to list is not asked again."""
        folder, wanted, found = _common_folder(keys), set(keys), dict[str, ObjectInfo]()
        if len(wanted) < LISTED_FROM or not folder or not self._gives_lists:
            return {}
        client, token, left = self._client(), "", LIST_PAGE + len(wanted)
        try:
            async with asyncio.timeout(LIST_SECONDS):
                while left > 0:
                    asked = partial(client.list_page, f"{folder}/", LIST_PAGE, token)
                    page = await self._in_thread(folder, asked)
                    for entry in page.entries:
                        info = ObjectInfo(entry.key, entry.size, _plain_etag(entry.etag))
                        if info.key in wanted and info.etag:
                            found.setdefault(info.key, info)
                    left -= len(page.entries)
                    token = page.next_token
                    if not token or not page.entries or len(found) == len(wanted):
                        break
        except (StorageFailure, TimeoutError, ValueError):  # a refused redirect too: each object is then asked for by itself
            self._gives_lists = False
        return found

    async def fetch(
        self,
        key: str,
        to: Path,
        on_bytes: OnBytes,
        *,
        known: ObjectInfo | None = None,
        turns: Turns | None = None,
        follower: Follower | None = None,
    ) -> Fetched:
        part = to.parent / f".{next(self._fetches)}.part"
        transfer = _Transfer(key, on_bytes, turns or Turns(RANGES_AT_ONCE), follower or Follower())
        try:
            if known is not None and known.size <= SMALL_BYTES:
                fetched = await self._fetch_small(transfer, known, part, to)
                if fetched is not None:
                    return fetched
            with await asyncio.to_thread(part.open, "x+b", buffering=0) as file:
                transfer.follower.begin(part)
                async with self._at_most_a_day(key):
                    fetched = await self._receive(transfer, file.fileno(), known)
            await asyncio.to_thread(part.replace, to)
        except BaseException as error:
            part.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Deferred(
                    "disk_full",
                    f"no room left in {to.parent} for object {key!r}",
                    "Free space on the worker's disk or point WORK_DIR at a larger one; the job waits meanwhile.",
                ) from None
            raise
        return fetched

    async def _fetch_small(self, transfer: _Transfer, known: ObjectInfo, part: Path, to: Path) -> Fetched | None:
        """Receive it in memory, in one go and in one thread: nothing that is awaited costs as little. Return None, with nothing
        done, when it is large by now."""
        cancellation = Cancellation()

        def receive() -> tuple[int, str, bytes] | None:
            with self._translated(transfer.key):
                body = self._client().get(transfer.key, cancellation)
                if body.size > SMALL_BYTES:
                    body.close()
                    return None
                return body.size, _plain_etag(body.etag), body.read_all()

        def keep(received: tuple[int, str, bytes] | None) -> Fetched | None:
            if received is None:
                return None
            size, etag, content = received
            checksums, md5 = Checksums(), self._md5(etag)
            for hashing in (checksums, md5) if md5 else (checksums,):
                hashing.take(content)
            fetched = self._checked(transfer.key, checksums, md5, size, etag)
            write_new(part, content)
            part.replace(to)
            return fetched

        async with transfer.turns.take(known.size):
            with _cancelling(cancellation):
                fetched = await self._bodies.receive(receive, keep)
        if fetched is not None:
            transfer.grow(fetched.size)
        return fetched

    async def _receive(self, transfer: _Transfer, file: int, known: ObjectInfo | None) -> Fetched:
        if known is not None and known.etag and known.size >= 2 * RANGE_BYTES:
            fetched = await self._receive_ranges(transfer, file, known)
            if fetched is not None:
                return fetched
        async with transfer.turns.take(known.size if known else 0):
            answer = await self._in_thread(transfer.key, partial(self._get, transfer.key, known))
            etag = _plain_etag(answer.etag)
            checksums, md5 = Checksums(), self._md5(etag)
            hashings, teller = [each for each in (checksums, md5) if each], Teller(transfer.grow)
            await self._read(file, transfer.key, answer, lambda file, body: receive_whole(file, body, hashings, teller))
        return self._checked(transfer.key, checksums, md5, answer.size, etag)

    def _get(self, key: str, known: ObjectInfo | None, cancellation: Cancellation) -> ObjectBody:
        """Raise `Unavailable` for an object that has grown since room was reserved for it."""
        with self._translated(key):
            body = self._client().get(key, cancellation)
        if known is not None and body.size > known.size:
            body.close()
            raise Unavailable(
                "object_changed",
                f"object {key!r} in bucket {self._bucket!r} has {body.size} bytes, and had {known.size} when it was looked up",
                "It is looked up again by the next attempt. If it stays so, see whether the storage's HEAD and GET agree.",
            )
        return body

    async def _receive_ranges(self, transfer: _Transfer, file: int, known: ObjectInfo) -> Fetched | None:
        """Receive it over several requests at once. Return None when nothing was written, because the first of them shows that
        the object is another one by now, or that this server does not serve ranges of it."""
        frontier, checksums, md5 = Frontier(known.size, RANGE_BYTES), Checksums(), self._md5(known.etag)
        waiting = iter(range(1, len(frontier.ranges)))

        async def receive(index: int, answer: ObjectBody) -> None:
            def tell(count: int) -> None:
                transfer.on_bytes(count)
                frontier.add(index, count)
                transfer.follower.reach(frontier.reached)

            span, teller = frontier.ranges[index], Teller(tell)
            count = await self._read(file, known.key, answer, lambda file, body: write_range(file, body, span, teller))
            start, end = span
            if count != end - start:
                raise self._damaged(known.key, f"a range of {end - start} bytes came with {count}")

        async def receive_more() -> None:
            for index in waiting:
                async with transfer.turns.take(RANGE_BYTES):
                    answer = await self._get_range(known, frontier.ranges[index])
                    if answer is None:
                        raise self._damaged(known.key, "it was replaced while it was read")
                    await receive(index, answer)

        async with transfer.turns.take(RANGE_BYTES):
            first = await self._get_range(known, frontier.ranges[0])
            if first is None:
                return None
        await all_or_first_failure(
            *(hash_behind(file, frontier, known.size, each) for each in (checksums, md5) if each),
            receive(0, first),
            *(receive_more() for _ in range(RANGES_AT_ONCE - 1)),
        )
        return self._checked(known.key, checksums, md5, known.size, known.etag)

    async def _get_range(self, known: ObjectInfo, span: tuple[int, int]) -> ObjectBody | None:
        """Ask for these bytes of this very object; return None when it is another one, or not in ranges."""

        def ask(cancellation: Cancellation) -> ObjectBody | None:
            with self._translated(known.key):
                try:
                    body = self._client().get_part(known.key, span, f'"{known.etag}"', cancellation)
                except (ObjectReplaced, NotInRanges):
                    return None
            if (body.size, _plain_etag(body.etag)) == (known.size, known.etag):
                return body
            body.close()
            return None

        return await self._in_thread(known.key, ask)

    async def _read(self, file: int, key: str, answer: ObjectBody, write: Callable[[int, Body], T]) -> T:
        def body() -> Body:
            chunks = answer.chunks()
            while True:
                with self._translated(key):
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                yield chunk

        with _cancelling(answer.cancellation):
            return await self._bodies.read(file, body(), write)

    async def _in_thread(self, key: str, ask: Callable[[Cancellation], T]) -> T:
        """Return what `ask` returns, called in a thread that a cancellation does not wait for."""
        cancellation = Cancellation()
        try:
            async with asyncio.timeout(ANSWER_SECONDS) as deadline:
                with _cancelling(cancellation):
                    return await self._bodies.receive(lambda: ask(cancellation), lambda answer: answer)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise self._class_of(key, StorageFailure(f"it did not answer in {ANSWER_SECONDS:g} s")) from None

    @asynccontextmanager
    async def _at_most_a_day(self, key: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(LONGEST_DOWNLOAD_SECONDS):
                yield
        except TimeoutError:
            hours = LONGEST_DOWNLOAD_SECONDS // 3600
            raise self._class_of(key, StorageFailure(f"it did not arrive within {hours} h")) from None

    def _md5(self, etag: str) -> Md5 | None:
        return Md5() if self._verify_etag_md5 and _MD5.fullmatch(etag) else None

    def _checked(self, key: str, checksums: Checksums, md5: Md5 | None, size: int, etag: str) -> Fetched:
        """Raises `Unavailable` unless size and MD5 agree."""
        if checksums.size != size:
            raise self._damaged(key, f"{checksums.size} bytes arrived of {size}")
        if md5 is not None and md5.hexdigest() != etag:
            raise self._damaged(key, f"its MD5 is {md5.hexdigest()}, its ETag {etag}")
        return Fetched(checksums.size, checksums.sha256.hexdigest(), checksums.crc32, etag)

    def _client(self) -> S3Client:
        if self._opened is None:
            wanted = {
                "WASABI_ENDPOINT": self._endpoint,
                "BUCKET_NAME": self._bucket,
                "WASABI_ACCESS_KEY": self._access_key,
                "WASABI_SECRET_KEY": self._secret_key,
            }
            missing = ", ".join(name for name, value in wanted.items() if not value)
            if missing:
                raise Unavailable(
                    "storage_unset",
                    f"object storage is not set up: {missing} unset or not readable",
                    "Set it in .env and restart the worker; the job is tried again until its attempts are spent.",
                )
            self._opened = S3Client(
                self._endpoint,
                self._region,
                self._access_key,
                self._secret_key,
                self._bucket,
                self._redirect_hosts,
                self._connections,
                MAX_RETRIES,
                RETRY_SECONDS,
            )
        return self._opened

    def _damaged(self, key: str, how: str) -> Unavailable:
        return Unavailable(
            "object_damaged",
            f"object {key!r} in bucket {self._bucket!r} arrived damaged: {how}",
            "It is fetched again. If it stays so, upload the object again (VERIFY_ETAG_MD5=false for SSE-KMS buckets).",
        )

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        """Turn the client's errors into ours. Only calls of the client belong inside."""
        try:
            yield
        except (StorageFailure, IllegalKey) as error:
            raise self._class_of(key, error) from None

    def _class_of(self, key: str, error: StorageFailure | IllegalKey) -> DeliveryError:
        if isinstance(error, IllegalKey):
            return Rejected(
                "object_missing", f"{key!r} cannot be an object key", "Correct file_path in job_files, then submit again."
            )
        if isinstance(error, Redirected):
            return self._redirected(key, error)
        code, status = self._redactor.bound(error.code, NAME), error.status
        cause = self._redactor.bound(error.cause, QUOTE)
        thing = f"object {key!r} in bucket {self._bucket!r} at {self._endpoint}"
        if code in _LOGIN_CODES:
            return Unavailable(
                "storage_login_refused",
                f"{self._endpoint} refused the access key for bucket {self._bucket!r} ({code})",
                "Correct WASABI_ACCESS_KEY and WASABI_SECRET_KEY and restart the worker; the job is tried again until its "
                "attempts are spent.",
            )
        if code == "RequestTimeTooSkewed":
            return Deferred(
                "clock_skewed",
                f"{self._endpoint} refused the signature's time: the clock of worker host {socket.gethostname()} is off by "
                f"more than it allows (it says {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC)",
                "Set that clock (NTP); jobs wait for it, or another worker takes them.",
            )
        if code == "NoSuchBucket":
            return Rejected(
                "bucket_missing",
                f"there is no bucket {self._bucket!r} at {self._endpoint}",
                "Correct BUCKET_NAME, then submit again.",
            )
        if status == 404:
            return Rejected("object_missing", f"there is no {thing}", "Upload the file again, then submit the job again.")
        if status in (401, 403):
            return Rejected(
                "storage_denied",
                f"the access key may not read {thing} ({cause if code else status})",
                "Allow s3:GetObject on it to the key, or see whether the object exists; then submit again.",
            )
        return Unavailable(
            "storage_unavailable", f"cannot read {thing}: {cause}", "It is tried again; see whether the storage is up."
        )

    def _redirected(self, key: str, error: Redirected) -> Unavailable:
        """Transient: a gateway that is being repaired redirects too. What stays wrong ends with the attempts."""
        to = f" to '{self._redactor.redact(error.pointed_to)}'" if error.pointed_to else ""
        return Unavailable(
            "storage_redirected",
            f"{self._endpoint} redirected the request for {key!r} in bucket {self._bucket!r}{to}, which was not followed: "
            f"{error.cause}",
            "Correct WASABI_ENDPOINT or WASABI_REGION; or, if that host may hold the studio's files, add it to "
            "S3_REDIRECT_HOSTS. Then restart the worker; the job is tried again until its attempts are spent.",
        )


@dataclass(slots=True)
class _Transfer:
    """One fetch: whom it tells, and when it may begin another request."""

    key: str
    on_bytes: OnBytes
    turns: Turns
    follower: Follower
    _size: int = 0

    def grow(self, count: int) -> None:
        """So many more bytes are there, without a gap."""
        self.on_bytes(count)
        self._size += count
        self.follower.reach(self._size)


@contextmanager
def _cancelling(cancellation: Cancellation) -> Iterator[None]:
    """Close the transfer's connection when the task that waits for it is cancelled."""
    try:
        yield
    except asyncio.CancelledError:
        cancellation.cancel()
        raise


def _common_folder(keys: Sequence[str]) -> str:
    """The deepest folder that all of them are in; empty when there is none."""
    first, last = min(keys, default="").split("/")[:-1], max(keys, default="").split("/")[:-1]
    return "/".join(name for name, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


def _full_url(endpoint: str) -> str:
    """The endpoint with its scheme (https unless given) and without a login in it; empty when it is no URL."""
    try:
        url = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        host, port = normalize_host(url.hostname or ""), f":{url.port}" if url.port else ""
    except ValueError:
        return ""
    if url.scheme not in ("http", "https") or "@" in url.path or not re.fullmatch(r"[\w.:-]+", host, re.ASCII):
        return ""
    return f"{url.scheme}://{f'[{host}]' if ':' in host else host}{port}{url.path.rstrip('/')}"


def _plain_etag(etag: str | None) -> str:
    """The ETag without quotes, lower case; empty when there is none, or one that no column holds."""
    plain = (etag or "").strip('"').lower()
    return plain if len(plain) <= MAX_ETAG_CHARACTERS and plain.isprintable() else ""
