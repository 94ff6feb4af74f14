"""Writing a body to disk as it arrives, over one request or several, and hashing it once, in order.

A body is read, hashed and written by one thread, since each crossing to the event loop and back costs as much as hashing what
crossed. What is to be awaited is the whole body.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock
from typing import Any, TypeVar

from isal import isal_zlib

CHUNK_BYTES = 256 * 1024
TOLD_BYTES = 1024 * 1024
HASHED_AT_ONCE_BYTES = 8 * 1024 * 1024
Body = Iterator[bytes | memoryview]
"""Chunks that are valid until the next one is asked for."""
T = TypeVar("T")
R = TypeVar("R")


class Abandoned(Exception):
    """Nobody waits for this body any more."""


class Bodies:
    """Threads that read bodies. They last as long as the process, and there is one for each body that is being read. A
    cancellation does not wait for a body, which may stall for as long as the read time-out."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1000, thread_name_prefix="receive")

    async def read(self, file: int, body: Body, write: Callable[[int, Body], T]) -> T:
        """What `write(file, body)` returns, run in a thread. After a cancellation it has the file open for itself, and ends at
        the body's next chunk."""
        own, abandoned = os.dup(file), Event()

        def run() -> T:
            try:
                return write(own, _until(abandoned, body))
            finally:
                os.close(own)

        running: Future[T] = self._threads.submit(run)
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            abandoned.set()
            if running.cancel():
                os.close(own)
            raise

    async def receive(self, receive: Callable[[], R], keep: Callable[[R], T]) -> T:
        """What `keep(receive())` returns, run in a thread. A cancellation comes before `keep` or waits for it."""
        kept_or_abandoned = Lock()

        def run() -> T:
            received = receive()
            if not kept_or_abandoned.acquire(blocking=False):
                raise Abandoned
            return keep(received)

        running: Future[T] = self._threads.submit(run)
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            if not kept_or_abandoned.acquire(blocking=False):
                with suppress(Exception):
                    await asyncio.wrap_future(running)
            raise


def _until(abandoned: Event, body: Body) -> Body:
    for chunk in body:
        if abandoned.is_set():
            raise Abandoned
        yield chunk


class Teller:
    """Tells the event loop how many more bytes a thread has written, from time to time and at the end."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._tell = tell
        self._untold = 0

    def add(self, count: int) -> None:
        self._untold += count
        if self._untold >= TOLD_BYTES:
            self.tell()

    def tell(self) -> None:
        if self._untold:
            self._loop.call_soon_threadsafe(self._tell, self._untold)
            self._untold = 0


class Checksums:
    """SHA-256 and CRC-32 of bytes in the order in which they are in the file."""

    def __init__(self) -> None:
        self.size = 0
        self.crc32 = 0
        self.sha256 = hashlib.sha256()

    def take(self, chunk: bytes | memoryview) -> None:
        self.sha256.update(chunk)
        self.crc32 = isal_zlib.crc32(chunk, self.crc32)
        self.size += len(chunk)


class Md5:
    """What the ETag of an object is that was put in one piece."""

    def __init__(self) -> None:
        self.size = 0
        self._md5 = hashlib.md5(usedforsecurity=False)

    def take(self, chunk: bytes | memoryview) -> None:
        self._md5.update(chunk)
        self.size += len(chunk)

    def hexdigest(self) -> str:
        return self._md5.hexdigest()


Hashing = Checksums | Md5


def write_new(path: Path, content: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write_all(file, content, 0)
    finally:
        os.close(file)


def receive_whole(file: int, body: Body, hashings: Sequence[Hashing], teller: Teller) -> None:
    """Write a body from its first byte to its last, and hash it."""
    size = 0
    for chunk in body:
        _write_all(file, chunk, size)
        for hashing in hashings:
            hashing.take(chunk)
        size += len(chunk)
        teller.add(len(chunk))
    teller.tell()


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


def write_range(file: int, body: Body, span: tuple[int, int], teller: Teller) -> int:
    """Write the body of one range to its place; how many bytes it had. More than the range holds is not written."""
    start, end = span
    offset = start
    for chunk in body:
        if offset + len(chunk) > end:
            return offset + len(chunk) - start
        _write_all(file, chunk, offset)
        offset += len(chunk)
        teller.add(len(chunk))
    teller.tell()
    return offset - start


async def hash_behind(file: int, frontier: Frontier, size: int, hashing: Hashing) -> None:
    """Hash the file while it grows, from the disk's cache."""

    def hash_up_to(end: int) -> None:
        while hashing.size < end:
            hashing.take(os.pread(file, min(CHUNK_BYTES, end - hashing.size), hashing.size))

    while hashing.size < size:
        reached = await frontier.beyond(hashing.size)
        await in_thread(hash_up_to, min(reached, hashing.size + HASHED_AT_ONCE_BYTES))


async def all_or_first_failure(*parts: Coroutine[Any, Any, None]) -> None:
    """Run them side by side. The first failure stops the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for part in parts:
                group.create_task(part)
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


def _write_all(file: int, chunk: bytes | memoryview, offset: int) -> None:
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
