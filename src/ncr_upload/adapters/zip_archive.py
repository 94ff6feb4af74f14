"""The zip the validator judges, on stream-zip.

Reproducible: entries in the order given, the first date a zip can hold, fixed permissions, no extra fields. Entries of
compressed types are stored, with size and CRC in front, so each waits until its file is whole; the rest are deflated, with a
data descriptor behind, while their files arrive. So are compressed ones of LARGE_BYTES or more, in deflate's stored blocks.
Zip64 is used from the entry on that could need it, which sizes alone decide.
"""

from __future__ import annotations

import asyncio
import stat
import zlib
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any, TypeVar

from isal import isal_zlib
from stream_zip import NO_COMPRESSION_32, NO_COMPRESSION_64, ZIP_32, ZIP_64, MemberFile, Method, ZipError, stream_zip

from ncr_upload.application.arrivals import Arrival
from ncr_upload.domain.errors import PackageChanged
from ncr_upload.domain.packages import PackageFile

T = TypeVar("T")

CHUNK_BYTES = 1024 * 1024
LARGE_BYTES = 64 * 1024 * 1024
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

    async def stream(self, files: AsyncIterator[Arrival]) -> AsyncIterator[bytes]:
        """Raises what `files` raises, and `PackageChanged` when a file on disk is not the one that was downloaded."""
        entries = _Entries(files, asyncio.get_running_loop())
        thread = ThreadPoolExecutor(1, thread_name_prefix="zip")
        chunks = iter(
            stream_zip(entries.members(), chunk_size=CHUNK_BYTES, get_compressobj=entries.compressor, extended_timestamps=False)
        )
        try:
            while chunk := await entries.loop.run_in_executor(thread, next, chunks, b""):
                yield chunk
        except (ZipError, _Changed) as error:
            raise PackageChanged(
                "package_changed",
                f"{entries.newest} on the worker's disk is not what was downloaded ({type(error).__name__})",
                "The job is tried again; if it stays so, check the worker's disk.",
            ) from None
        finally:
            entries.stop()
            thread.shutdown(wait=False)


class _Changed(Exception):
    """A file has other bytes than it had when it arrived."""


class _Stopped(Exception):
    """Nobody wants the zip any more."""


class _Entries:
    """The entries of one zip, made in a thread of their own, which waits there for what the event loop's side brings."""

    def __init__(self, files: AsyncIterator[Arrival], loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.newest = ""
        self._level = DEFLATE_LEVEL
        self._files = files
        self._waiting: Future[Any] | None = None
        self._stopped = False

    def members(self) -> Iterator[MemberFile]:
        end, entries = 0, 0
        while (file := self._wait(anext(self._files, None))) is not None:
            self.newest = file.target
            end += file.size + file.size // 1000 + 2 * len(file.target.encode()) + 200
            entries += 1
            method = self._method(file, large=end > ZIP32_MAX_BYTES or entries > ZIP32_MAX_ENTRIES)
            yield file.target, FIRST_DATE, MODE, method, self._read(file)

    def compressor(self) -> Any:
        """For the newest entry."""
        return zlib.compressobj(self._level, zlib.DEFLATED, -zlib.MAX_WBITS)

    def stop(self) -> None:
        """Free the thread, if it waits. Called from the event loop."""
        self._stopped = True
        if self._waiting is not None:
            self._waiting.cancel()

    def _method(self, file: Arrival, large: bool) -> Method:
        compressed = PurePosixPath(file.target).suffix.lower() in COMPRESSED_TYPES
        if compressed and file.size < LARGE_BYTES:
            whole = self._wait_for_whole(file)
            return (NO_COMPRESSION_64 if large else NO_COMPRESSION_32)(whole.size, whole.crc32)
        self._level = 0 if compressed else DEFLATE_LEVEL
        return ZIP_64 if large else ZIP_32

    def _read(self, file: Arrival) -> Iterator[bytes]:
        offset, crc32 = 0, 0
        if file.size:
            if not file.reached:
                self._wait(file.beyond(0))
            with file.open() as source:
                while offset < file.size:
                    size = min(CHUNK_BYTES, file.size - offset)  # whenever it came: how it is cut shows in what deflate makes
                    if file.reached < offset + size:
                        self._wait(file.beyond(offset + size - 1))
                    chunk = source.read(size)
                    if len(chunk) < size:
                        raise _Changed
                    crc32, offset = isal_zlib.crc32(chunk, crc32), offset + len(chunk)
                    yield chunk
        if self._wait_for_whole(file).crc32 != crc32:
            raise _Changed

    def _wait_for_whole(self, file: Arrival) -> PackageFile:
        return (file.local or self._wait(file.whole())).file

    def _wait(self, coming: Coroutine[Any, Any, T]) -> T:
        waiting = asyncio.run_coroutine_threadsafe(self._unless_stopped(coming), self.loop)
        self._waiting = waiting
        return waiting.result()

    async def _unless_stopped(self, coming: Coroutine[Any, Any, T]) -> T:
        if self._stopped:
            coming.close()
            raise _Stopped
        return await coming
