"""Files of a package while they come to this host's disk, and how many may come at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Condition
from typing import BinaryIO

from ncr_upload.application.ports import LocalFile

SMALL_BYTES = 512 * 1024
SMALL_PER_LARGE = 8


class Turns:
    """At most `at_once` requests for more than SMALL_BYTES are under way, and SMALL_PER_LARGE times as many in all: a small
    file costs round trips, a large one memory."""

    def __init__(self, at_once: int) -> None:
        self._large = asyncio.Semaphore(at_once)
        self._all = asyncio.Semaphore(at_once * SMALL_PER_LARGE)

    @asynccontextmanager
    async def take(self, size: int) -> AsyncIterator[None]:
        """Wait for a turn and hold it. `size` is that of the answer, in bytes."""
        if size > SMALL_BYTES:
            async with self._large, self._all:
                yield
        else:
            async with self._all:
                yield


class Follower:
    """Is told where a file is being written, and how much of its beginning is there without a gap. This one does nothing."""

    def begin(self, path: Path) -> None:
        """Nothing of it is there yet."""

    def reach(self, size: int) -> None:
        """So many bytes from its beginning are there."""


class Arrival(Follower):
    """A file that may be read while it arrives. `size` is what it will have, `target` its path in the package, and `place`
    where it will be on this host; `reached` bytes of its beginning are there, and `local` is set once it is whole."""

    def __init__(self, target: str, size: int, place: Path) -> None:
        self.target = target
        self.size = size
        self.place = place
        self.reached = 0
        self._growing = place
        self._changed = asyncio.Event()
        self._changed_for_threads = Condition()
        self.local: LocalFile | None = None

    @classmethod
    def of(cls, local: LocalFile) -> Arrival:
        """A file that is there already."""
        arrival = cls(local.file.target, local.file.size, local.path)
        arrival.become(local)
        return arrival

    def begin(self, path: Path) -> None:
        self._growing, self.reached = path, 0

    def reach(self, size: int) -> None:
        self.reached = size
        self._changed.set()
        self.wake()

    def become(self, local: LocalFile) -> None:
        """It is whole."""
        self.local = local
        self.reach(local.file.size)

    async def whole(self) -> LocalFile:
        """The file once it is whole. Waits for ever for one that fails to arrive: whoever waits is cancelled then."""
        while self.local is None:
            await self._change()
        return self.local

    async def beyond(self, offset: int) -> int:
        """Wait until more than `offset` (below `size`) bytes of its beginning are there, or it is whole, which may be less than
        was said; how many are. Waits as `whole`."""
        while self.reached <= offset and self.local is None:
            await self._change()
        return self.reached

    def wait(self, is_enough: Callable[[], bool], seconds: float | None = None) -> bool:
        """As `whole` and `beyond`, but for a thread: until it is so, or `seconds` have passed; whether it is."""
        with self._changed_for_threads:
            return self._changed_for_threads.wait_for(is_enough, seconds)

    def wake(self) -> None:
        """Have threads that wait look again."""
        with self._changed_for_threads:
            self._changed_for_threads.notify_all()

    def open(self) -> BinaryIO:
        """For reading, once something of it is there. Where it grew it is found no more when it has just become whole."""
        try:
            return self._growing.open("rb", buffering=0)
        except FileNotFoundError:
            return self.place.open("rb", buffering=0)

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()
