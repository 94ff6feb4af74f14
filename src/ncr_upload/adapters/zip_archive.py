"""The zip the validator judges, on stream-zip.

Reproducible: entries in the order given, the first date a zip can hold, fixed permissions, no extra fields. Entries of
compressed types are stored, with size and CRC in front; the rest are deflated, with a data descriptor behind. Zip64 is
used from the entry on that could need it, which sizes alone decide.
"""

from __future__ import annotations

import asyncio
import stat
import zlib
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path, PurePosixPath

from stream_zip import NO_COMPRESSION_32, NO_COMPRESSION_64, ZIP_32, ZIP_64, MemberFile, Method, ZipError, stream_zip

from ncr_upload.application.ports import LocalFile
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.packages import PackageFile

CHUNK_BYTES = 1024 * 1024
DEFLATE_LEVEL = 1  # a higher one is slower than the wire on one core
ZIP32_MAX_BYTES = 0xFFFF_FFFF - 64 * 1024 * 1024  # room for headers and the directory
ZIP32_MAX_ENTRIES = 0xFFFF
FIRST_DATE = datetime(1980, 1, 1)  # noqa: DTZ001 - a zip holds local time without a zone
MODE = stat.S_IFREG | 0o644
COMPRESSED_TYPES = frozenset(
    {".avif", ".exr", ".glb", ".gif", ".heic", ".jpeg", ".jpg", ".ktx2", ".png", ".usdz", ".webp"}
    | {".7z", ".br", ".bz2", ".drc", ".gz", ".mp4", ".webm", ".xz", ".zip", ".zst"}
)


class ZipArchiver:
    """Holds a few chunks of CHUNK_BYTES in memory. Reads and compresses in a thread of its own."""

    async def stream(self, files: AsyncIterator[LocalFile]) -> AsyncIterator[bytes]:
        """Raises what `files` raises, and `Unavailable` when a file on disk is not the one that was downloaded."""
        arrivals = _Arrivals(files, asyncio.get_running_loop())
        thread = ThreadPoolExecutor(1, thread_name_prefix="zip")
        chunks = iter(
            stream_zip(_members(arrivals), chunk_size=CHUNK_BYTES, get_compressobj=_compressor, extended_timestamps=False)
        )
        try:
            while chunk := await arrivals.loop.run_in_executor(thread, next, chunks, b""):
                yield chunk
        except ZipError as error:
            raise Unavailable(
                "package_changed",
                f"{arrivals.newest} on the worker's disk is not what was downloaded ({type(error).__name__})",
                "The job is tried again; if it stays so, check the worker's disk.",
            ) from None
        finally:
            arrivals.stop()
            thread.shutdown(wait=False)


class _Arrivals:
    """An asynchronous iterator of files, read from another thread, which waits there for each next file."""

    def __init__(self, files: AsyncIterator[LocalFile], loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.newest = ""
        self._files = files
        self._waiting: Future[LocalFile | None] | None = None
        self._stopped = False

    def __iter__(self) -> Iterator[LocalFile]:
        while not self._stopped:
            self._waiting = asyncio.run_coroutine_threadsafe(self._next(), self.loop)
            file = self._waiting.result()
            if file is None:
                return
            self.newest = file.file.target
            yield file

    async def _next(self) -> LocalFile | None:
        return None if self._stopped else await anext(self._files, None)

    def stop(self) -> None:
        """Free the thread, if it waits. Called from the event loop."""
        self._stopped = True
        if self._waiting is not None:
            self._waiting.cancel()


def _members(files: _Arrivals) -> Iterator[MemberFile]:
    end = 0
    for entries, local in enumerate(files, 1):
        end += local.file.size + local.file.size // 1000 + 2 * len(local.file.target.encode()) + 200
        method = _method(local.file, large=end > ZIP32_MAX_BYTES or entries > ZIP32_MAX_ENTRIES)
        yield local.file.target, FIRST_DATE, MODE, method, _read(local.path)


def _method(file: PackageFile, large: bool) -> Method:
    if PurePosixPath(file.target).suffix.lower() in COMPRESSED_TYPES:
        return (NO_COMPRESSION_64 if large else NO_COMPRESSION_32)(file.size, file.crc32)
    return ZIP_64 if large else ZIP_32


def _compressor() -> zlib._Compress:
    return zlib.compressobj(DEFLATE_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
