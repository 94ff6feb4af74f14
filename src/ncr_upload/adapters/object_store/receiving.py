"""Writing a body to disk as it arrives, over one request or several, and hashing it once, in order."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from isal import isal_zlib

from ncr_upload.application.ports import OnBytes

CHUNK_BYTES = 256 * 1024
HASHED_AT_ONCE_BYTES = 8 * 1024 * 1024
Body = AsyncIterator[bytes]
OnArrived = Callable[[int], None]
"""Told how many bytes from the beginning are on the disk without a gap."""
T = TypeVar("T")


class Sink:
    """Hashes bytes in the order in which they are in the file."""

    def __init__(self, *, with_md5: bool) -> None:
        self.size = 0
        self.crc32 = 0
        self.sha256 = hashlib.sha256()
        self.md5 = hashlib.md5(usedforsecurity=False) if with_md5 else None

    def take(self, chunk: bytes) -> None:
        self.sha256.update(chunk)
        if self.md5 is not None:
            self.md5.update(chunk)
        self.crc32 = isal_zlib.crc32(chunk, self.crc32)
        self.size += len(chunk)


async def receive_whole(body: Body, file: int, sink: Sink, on_bytes: OnBytes, on_arrived: OnArrived) -> None:
    """Write a body from its first byte to its last."""

    def write_and_hash(chunk: bytes) -> None:
        _write_all(file, chunk, sink.size)
        sink.take(chunk)

    async for chunk in body:
        await in_thread(write_and_hash, chunk)
        on_bytes(len(chunk))
        on_arrived(sink.size)


class Frontier:
    """How much of a file is there without a gap, while its ranges are written side by side."""

    def __init__(self, size: int, range_bytes: int) -> None:
        self.ranges = [(start, min(start + range_bytes, size)) for start in range(0, size, range_bytes)]
        self._written = [0] * len(self.ranges)
        self._first_open = 0
        self._grown = asyncio.Event()

    @property
    def reached(self) -> int:
        if self._first_open == len(self.ranges):
            return self.ranges[-1][1]
        return self.ranges[self._first_open][0] + self._written[self._first_open]

    def add(self, index: int, count: int) -> None:
        """So many more bytes of range number `index` are written."""
        self._written[index] += count
        while self._first_open < len(self.ranges) and self._is_whole(self._first_open):
            self._first_open += 1
        self._grown.set()

    async def beyond(self, offset: int) -> int:
        """Wait until more than `offset` bytes are there; how many are."""
        while self.reached <= offset:
            self._grown.clear()
            await self._grown.wait()
        return self.reached

    def _is_whole(self, index: int) -> bool:
        start, end = self.ranges[index]
        return self._written[index] == end - start


async def write_range(body: Body, file: int, frontier: Frontier, index: int, on_bytes: OnBytes) -> int:
    """Write the body of one range to its place; how many bytes it had. More than the range holds is not written."""
    start, end = frontier.ranges[index]
    offset = start
    async for chunk in body:
        if offset + len(chunk) > end:
            return offset + len(chunk) - start
        await in_thread(_write_all, file, chunk, offset)
        offset += len(chunk)
        on_bytes(len(chunk))
        frontier.add(index, len(chunk))
    return offset - start


async def hash_behind(file: int, frontier: Frontier, size: int, sink: Sink, on_arrived: OnArrived) -> None:
    """Hash the file while it grows, from the disk's cache."""

    def hash_up_to(end: int) -> None:
        while sink.size < end:
            sink.take(os.pread(file, min(CHUNK_BYTES, end - sink.size), sink.size))

    while sink.size < size:
        reached = await frontier.beyond(sink.size)
        on_arrived(reached)
        await in_thread(hash_up_to, min(reached, sink.size + HASHED_AT_ONCE_BYTES))


async def all_or_first_failure(*parts: Coroutine[Any, Any, None]) -> None:
    """Run them side by side. The first failure stops the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for part in parts:
                group.create_task(part)
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


def _write_all(file: int, chunk: bytes, offset: int) -> None:
    view = memoryview(chunk)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


async def in_thread(call: Callable[..., T], *arguments: object) -> T:
    """A cancellation waits for the thread, since the file must not be closed under it."""
    running = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
