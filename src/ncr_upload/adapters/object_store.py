"""Object storage over any S3 API, on obstore.

obstore retries within a request, resumes a cut body by range and holds every resumption against the ETag of the
first answer; what still fails after that is classed here, once.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import re
import socket
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from ncr_upload.application.ports import Fetched, ObjectInfo, OnBytes
from ncr_upload.domain.errors import Deferred, DeliveryError, Rejected, Unavailable

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import S3Credential

CHUNK_BYTES = 1024 * 1024
MAX_RETRIES = 3
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
    ) -> None:
        self._endpoint = _full_url(endpoint or "")
        self._region = region
        self._bucket = bucket or ""
        self._access_key = access_key or ""
        self._secret_key = secret_key or ""
        self._verify_etag_md5 = verify_etag_md5
        self._connect_timeout = timedelta(seconds=connect_timeout_seconds)
        self._read_timeout = timedelta(seconds=read_timeout_seconds)
        self._opened: S3Store | None = None

    async def stat(self, key: str) -> ObjectInfo:
        with self._translated(key):
            try:
                meta = await obstore.head_async(self._store(), key)
            except (BaseError, OSError):
                # The answer to a HEAD has no body, hence no error code: a GET tells what is wrong.
                meta = (await obstore.get_async(self._store(), key)).meta
        return ObjectInfo(key, meta["size"], _plain_etag(meta["e_tag"]))

    async def fetch(self, key: str, to: Path, on_bytes: OnBytes) -> Fetched:
        with self._translated(key):
            answer = await obstore.get_async(self._store(), key)
        partial = to.parent / f".{uuid.uuid4().hex}.part"
        try:
            fetched = await self._receive(key, answer, partial, on_bytes)
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

    async def _receive(self, key: str, answer: GetResult, partial: Path, on_bytes: OnBytes) -> Fetched:
        """Write the body to `partial`; the file is closed on return. Raises `Unavailable` unless size and MD5 agree."""
        etag = _plain_etag(answer.meta["e_tag"])
        stream = answer.stream(min_chunk_size=CHUNK_BYTES).__aiter__()
        with await asyncio.to_thread(partial.open, "wb") as file:
            sink = _Sink(file, with_md5=self._verify_etag_md5 and bool(_MD5.fullmatch(etag)))
            while True:
                with self._translated(key):
                    chunk = await anext(stream, None)
                if chunk is None:
                    break
                await _run_to_the_end(sink, chunk)
                on_bytes(len(chunk))
        if sink.size != answer.meta["size"]:
            raise self._damaged(key, f"{sink.size} bytes arrived of {answer.meta['size']}")
        if sink.md5 is not None and sink.md5.hexdigest() != etag:
            raise self._damaged(key, f"its MD5 is {sink.md5.hexdigest()}, its ETag {etag}")
        return Fetched(sink.size, sink.sha256.hexdigest(), sink.crc32, etag)

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
        text = str(error)
        answer, _, debug = text.partition("Debug source")
        code = _first(r"<Code>\s*(\w+)", answer)
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


class _Sink:
    """Writes and hashes what arrives."""

    def __init__(self, file: BinaryIO, *, with_md5: bool) -> None:
        self._file = file
        self.size = 0
        self.crc32 = 0
        self.sha256 = hashlib.sha256()
        self.md5 = hashlib.md5(usedforsecurity=False) if with_md5 else None

    def take(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self.sha256.update(chunk)
        if self.md5 is not None:
            self.md5.update(chunk)
        self.crc32 = zlib.crc32(chunk, self.crc32)
        self.size += len(chunk)


async def _run_to_the_end(sink: _Sink, chunk: bytes) -> None:
    """Take a chunk in a thread. A cancellation waits for it, since the file must not be closed under the thread."""
    taking = asyncio.ensure_future(asyncio.to_thread(sink.take, chunk))
    try:
        await asyncio.shield(taking)
    except asyncio.CancelledError:
        await asyncio.wait([taking])
        raise


def _full_url(endpoint: str) -> str:
    """The endpoint with its scheme (https unless given) and without a login in it; empty when it is no URL."""
    try:
        url = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        host, port = url.hostname or "", f":{url.port}" if url.port else ""
    except ValueError:
        return ""
    if url.scheme not in ("http", "https") or not re.fullmatch(r"[\w.:-]+", host, re.ASCII):
        return ""
    return f"{url.scheme}://{f'[{host}]' if ':' in host else host}{port}{url.path.rstrip('/')}"


def _plain_etag(etag: str | None) -> str:
    """The ETag without quotes, lower case; empty when there is none."""
    return (etag or "").strip('"').lower()


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""
