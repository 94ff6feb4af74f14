"""The bucket, read over any S3 API.

obstore retries within a request, resumes a cut body by range and holds every resumption against the ETag of the
first answer; what still fails after that is classed here, once.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError, PreconditionError
from obstore.store import S3Store

from ncr_upload.adapters.object_store.receiving import (
    CHUNK_BYTES,
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
from ncr_upload.application.arrivals import SMALL_BYTES, Follower, Turns
from ncr_upload.application.ports import Fetched, ObjectInfo, OnBytes
from ncr_upload.domain.errors import Deferred, DeliveryError, Rejected, Unavailable
from ncr_upload.domain.redaction import NO_SECRETS, Redactor
from ncr_upload.domain.text import NAME

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import S3Credential

RANGE_BYTES = 16 * 1024 * 1024
"""An object of two ranges or more is fetched over several requests at once."""

RANGES_AT_ONCE = 4
LISTED_FROM = 16
"""So many objects are asked for by one request for a list of their folder."""

LIST_PAGE = 1000
LIST_SECONDS = 5
NO_RANGES = "source: NotPartial"  # what obstore says of a server that answers a range with anything but 206
MAX_RETRIES = 3
MAX_ETAG_CHARACTERS = 255
ERROR_CHARACTERS = 65_536
"""Of what obstore says of a failure so much is looked through."""
RETRY_SECONDS = 30
LONGEST_DOWNLOAD = "1day"  # a stalled one ends by the read time-out
_MD5 = re.compile(r"[0-9a-f]{32}")
_LOGIN_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
_CAUSES = {
    "dns error": "its name cannot be resolved",
    "ConnectionRefused": "the connection was refused",
    "ConnectionReset": "the connection was reset",
    "NetworkUnreachable": "the network is unreachable",
    "HostUnreachable": "the host is unreachable",
    "InvalidCertificate": "its TLS certificate is not trusted",
    "InvalidContentType": "it does not speak TLS",
    "TimedOut": "it did not answer in time",
    "IncompleteMessage": "it cut the answer",
    "UnexpectedEof": "it cut the answer",
    "Body": "it cut the answer",
}


class S3ObjectStore:
    """One bucket. Settings that are missing are named by the first call, not by the constructor.

    Time-outs: `connect_timeout_seconds` to connect, `read_timeout_seconds` without a byte; a request is retried at
    most MAX_RETRIES times within RETRY_SECONDS.
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
        redactor: Redactor = NO_SECRETS,
    ) -> None:
        self._redactor = redactor
        self._endpoint = _full_url(endpoint or "")
        self._region = region
        self._bucket = bucket or ""
        self._access_key = access_key or ""
        self._secret_key = secret_key or ""
        self._verify_etag_md5 = verify_etag_md5
        self._connect_timeout = timedelta(seconds=connect_timeout_seconds)
        self._read_timeout = timedelta(seconds=read_timeout_seconds)
        self._opened: S3Store | None = None
        self._bodies = Bodies()
        self._fetches = itertools.count()
        self._gives_lists = True

    @property
    def source(self) -> str:
        return f"{self._endpoint} {self._bucket}" + (" md5" if self._verify_etag_md5 else "")

    async def stat(self, key: str) -> ObjectInfo:
        with self._translated(key):
            try:
                meta = await obstore.head_async(self._store(), key)
            except (BaseError, OSError):
                # The answer to a HEAD has no body, hence no error code: a GET tells what is wrong.
                meta = (await obstore.get_async(self._store(), key)).meta
        return ObjectInfo(key, meta["size"], _plain_etag(meta["e_tag"]))

    async def glance(self, keys: Sequence[str]) -> Mapping[str, ObjectInfo]:
        """Of a folder with many other objects only the beginning is read. A store that fails to list is not asked again."""
        folder, wanted, found = _common_folder(keys), set(keys), dict[str, ObjectInfo]()
        if len(wanted) < LISTED_FROM or not folder or not self._gives_lists:
            return {}
        store, left = self._store(), LIST_PAGE + len(wanted)
        try:
            async with asyncio.timeout(LIST_SECONDS):
                async for page in obstore.list(store, folder, chunk_size=LIST_PAGE):
                    for meta in page:
                        info = ObjectInfo(meta["path"], meta["size"], _plain_etag(meta["e_tag"]))
                        if info.key in wanted and info.etag:
                            found.setdefault(info.key, info)  # obstore calls a folder's marker "key/", which comes later, "key"
                    left -= len(page)
                    if left <= 0 or len(found) == len(wanted):
                        break
        except (BaseError, OSError, ValueError):
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
        partial = to.parent / f".{next(self._fetches)}.part"
        transfer = _Transfer(key, on_bytes, turns or Turns(RANGES_AT_ONCE), follower or Follower())
        try:
            if known is not None and known.size <= SMALL_BYTES:
                fetched = await self._fetch_small(transfer, known, partial, to)
                if fetched is not None:
                    return fetched
            with await asyncio.to_thread(partial.open, "x+b", buffering=0) as file:
                transfer.follower.begin(partial)
                fetched = await self._receive(transfer, file.fileno(), known)
            await asyncio.to_thread(partial.replace, to)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Deferred(
                    "disk_full",
                    f"no room left in {to.parent} for object {key!r}",
                    "Free space on the worker's disk or point WORK_DIR at a larger one; the job waits meanwhile.",
                ) from None
            raise
        return fetched

    async def _fetch_small(self, transfer: _Transfer, known: ObjectInfo, partial: Path, to: Path) -> Fetched | None:
        """By way of memory, in one go and in one thread: nothing that is awaited costs as little. None, and nothing done, when
        it is large by now."""

        def receive() -> tuple[int, str, bytes] | None:
            with self._translated(transfer.key):
                answer = obstore.get(self._store(), transfer.key)
                size, etag = answer.meta["size"], _plain_etag(answer.meta["e_tag"])
                return (size, etag, bytes(answer.bytes())) if size <= SMALL_BYTES else None

        def keep(received: tuple[int, str, bytes] | None) -> Fetched | None:
            if received is None:
                return None
            size, etag, body = received
            checksums, md5 = Checksums(), self._md5(etag)
            for hashing in (checksums, md5) if md5 else (checksums,):
                hashing.take(body)
            fetched = self._checked(transfer.key, checksums, md5, size, etag)
            write_new(partial, body)
            partial.replace(to)
            return fetched

        async with transfer.turns.take(known.size):
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
            with self._translated(transfer.key):
                answer = await obstore.get_async(self._store(), transfer.key)
            etag = _plain_etag(answer.meta["e_tag"])
            checksums, md5 = Checksums(), self._md5(etag)
            hashings, teller = [each for each in (checksums, md5) if each], Teller(transfer.grow)
            body = self._body(transfer.key, answer)
            await self._bodies.read(file, body, lambda file, body: receive_whole(file, body, hashings, teller))
        return self._checked(transfer.key, checksums, md5, answer.meta["size"], etag)

    async def _receive_ranges(self, transfer: _Transfer, file: int, known: ObjectInfo) -> Fetched | None:
        """Over several requests at once. None when nothing was written, because the first of them shows that the object is
        another one by now, or that this server does not serve ranges of it."""
        frontier, checksums, md5 = Frontier(known.size, RANGE_BYTES), Checksums(), self._md5(known.etag)
        waiting = iter(range(1, len(frontier.ranges)))

        async def receive(index: int, answer: GetResult) -> None:
            def tell(count: int) -> None:
                transfer.on_bytes(count)
                frontier.add(index, count)
                transfer.follower.reach(frontier.reached)

            span, teller = frontier.ranges[index], Teller(tell)
            body = self._body(known.key, answer)
            count = await self._bodies.read(file, body, lambda file, body: write_range(file, body, span, teller))
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

    async def _get_range(self, known: ObjectInfo, span: tuple[int, int]) -> GetResult | None:
        """The answer to a request for these bytes of this very object; None when it is another one, or not in ranges."""
        tag = f'"{known.etag}"'
        with self._translated(known.key):
            try:
                answer = await obstore.get_async(self._store(), known.key, options={"range": span, "if_match": tag})
            except PreconditionError:
                return None
            except BaseError as error:
                if NO_RANGES not in str(error):
                    raise
                return None
        meta = answer.meta
        return answer if (meta["size"], _plain_etag(meta["e_tag"])) == (known.size, known.etag) else None

    def _body(self, key: str, answer: GetResult) -> Body:
        stream = iter(answer.stream(min_chunk_size=CHUNK_BYTES))
        while True:
            with self._translated(key):
                chunk = next(stream, None)
            if chunk is None:
                return
            yield chunk

    def _md5(self, etag: str) -> Md5 | None:
        return Md5() if self._verify_etag_md5 and _MD5.fullmatch(etag) else None

    def _checked(self, key: str, checksums: Checksums, md5: Md5 | None, size: int, etag: str) -> Fetched:
        """Raises `Unavailable` unless size and MD5 agree."""
        if checksums.size != size:
            raise self._damaged(key, f"{checksums.size} bytes arrived of {size}")
        if md5 is not None and md5.hexdigest() != etag:
            raise self._damaged(key, f"its MD5 is {md5.hexdigest()}, its ETag {etag}")
        return Fetched(checksums.size, checksums.sha256.hexdigest(), checksums.crc32, etag)

    def _store(self) -> S3Store:
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
            self._opened = self._open()
        return self._opened

    def _open(self) -> S3Store:
        # The endpoint is named twice and the keys come by a provider, because what the AWS_* variables of the
        # environment say (endpoint, session token) would win otherwise.
        return S3Store(
            self._bucket,
            endpoint=self._endpoint,
            aws_endpoint_url_s3=self._endpoint,
            region=self._region,
            virtual_hosted_style_request=False,
            credential_provider=self._credential,
            client_options={
                "allow_http": self._endpoint.startswith("http://"),
                "connect_timeout": self._connect_timeout,
                "read_timeout": self._read_timeout,
                "timeout": LONGEST_DOWNLOAD,
            },
            retry_config={
                "max_retries": MAX_RETRIES,
                "retry_timeout": timedelta(seconds=RETRY_SECONDS),
                "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=3), "base": 2},
            },
        )

    def _credential(self) -> S3Credential:
        return {
            "access_key_id": self._access_key,
            "secret_access_key": self._secret_key,
            "token": None,
            "expires_at": None,
        }

    def _damaged(self, key: str, how: str) -> Unavailable:
        return Unavailable(
            "object_damaged",
            f"object {key!r} in bucket {self._bucket!r} arrived damaged: {how}",
            "It is fetched again. If it stays so, upload the object again (VERIFY_ETAG_MD5=false for SSE-KMS buckets).",
        )

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        """The one table from obstore's errors to ours. Only calls of obstore belong inside."""
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            raise self._class_of(key, error) from None

    def _class_of(self, key: str, error: Exception) -> DeliveryError:
        text = str(error)  # with the whole of a server's answer in it, however long
        end = text.find("Debug source")
        answer = text[: min(ERROR_CHARACTERS, end if end >= 0 else len(text))]
        debug = text[end : end + ERROR_CHARACTERS] if end >= 0 else ""
        code = self._redactor.bound(_first(r"<Code>\s*(\w+)", answer if len(text) <= ERROR_CHARACTERS else text), NAME)
        status = _first(r"status code: (\d{3})", answer)
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
        if status == "404" or isinstance(error, FileNotFoundError):
            return Rejected("object_missing", f"there is no {thing}", "Upload the file again, then submit the job again.")
        if status in ("401", "403"):
            return Rejected(
                "storage_denied",
                f"the access key may not read {thing} ({code or status})",
                "Allow s3:GetObject on it to the key, or see whether the object exists; then submit again.",
            )
        if isinstance(error, ValueError):
            return Rejected(
                "object_missing", f"{key!r} cannot be an object key", "Correct file_path in job_files, then submit again."
            )
        cause = code or (f"it answered {status}" if status else "")
        cause = cause or next((words for mark, words in _CAUSES.items() if mark in debug), "the request failed")
        return Unavailable(
            "storage_unavailable", f"cannot read {thing}: {cause}", "It is tried again; see whether the storage is up."
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


def _common_folder(keys: Sequence[str]) -> str:
    """The deepest folder that all of them are in; empty when there is none."""
    first, last = min(keys, default="").split("/")[:-1], max(keys, default="").split("/")[:-1]
    return "/".join(name for name, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


def _full_url(endpoint: str) -> str:
    """The endpoint with its scheme (https unless given) and without a login in it; empty when it is no URL."""
    try:
        url = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        host, port = url.hostname or "", f":{url.port}" if url.port else ""
    except ValueError:
        return ""
    if url.scheme not in ("http", "https") or "@" in url.path or not re.fullmatch(r"[\w.:-]+", host, re.ASCII):
        return ""
    return f"{url.scheme}://{f'[{host}]' if ':' in host else host}{port}{url.path.rstrip('/')}"


def _plain_etag(etag: str | None) -> str:
    """The ETag without quotes, lower case; empty when there is none, or one that no column holds."""
    plain = (etag or "").strip('"').lower()
    return plain if len(plain) <= MAX_ETAG_CHARACTERS and plain.isprintable() else ""


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""
