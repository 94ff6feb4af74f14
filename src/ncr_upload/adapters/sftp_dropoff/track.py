"""One SFTP channel as the uploads share it, and how many bytes may be under way."""

from __future__ import annotations

import asyncio

from ncr_upload.adapters.sftp_dropoff.allowance import Allowance
from ncr_upload.adapters.sftp_dropoff.remote import Remote
from ncr_upload.adapters.sftp_dropoff.wire import Answer

LINK_BYTES = 2 * 1024 * 1024
"""Under way in one connection: as much as OpenSSH takes unread in a channel, and no more, for what is asked meanwhile waits
behind it."""

ALL_BYTES = 8 * 1024 * 1024
"""Under way in all channels of a session, so that memory does not grow with them."""


FILES_AT_ONCE = 64
"""Open at once in a channel, so that many small files do not each wait for their round trips."""


class Signal:
    """Wakes everybody who waits for something to change."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    async def wait(self) -> None:
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        await waiting

    def fire(self) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if not each.done():
                each.set_result(None)


class Flow:
    """The bytes under way in one connection, or in all of a session."""

    def __init__(self, most: int) -> None:
        self.bytes = 0
        self._most = most
        self._freed = Signal()

    async def have_room(self, count: int) -> None:
        while self.bytes and self.bytes + count > self._most:
            await self._freed.wait()

    def give_back(self, count: int) -> None:
        self.bytes -= count
        self._freed.fire()


class Track:
    """`turn` belongs to the file whose bytes go out, so that one file after another is complete. At most
    FILES_AT_ONCE are open, and of LINK_BYTES together unless it is one."""

    def __init__(self, remote: Remote, link: Flow, flow: Flow, allowance: Allowance) -> None:
        self.remote = remote
        self._allowance = allowance
        self.turn = asyncio.Lock()
        self._files = 0
        self._file_bytes = 0
        self._closed = Signal()
        self._flows = (link, flow)
        self._bytes = 0
        self._heard = 0.0
        self._wire = remote.wire
        self._now = asyncio.get_running_loop().time
        self._limit_bytes = remote.channel.limits.max_write_len or LINK_BYTES

    def block_bytes(self, most: int) -> int:
        """As many as the server takes in one write, `most` at most."""
        return min(most, self._limit_bytes)

    async def have_room_for_a_file(self) -> None:
        while self._file_bytes >= LINK_BYTES or self._files >= FILES_AT_ONCE:
            await self._closed.wait()

    def take(self, size: int) -> None:
        """A file of this size is opened."""
        self._files += 1
        self._file_bytes += size

    def give_back(self, size: int) -> None:
        """It is closed."""
        self._files -= 1
        self._file_bytes -= size
        self._closed.fire()

    async def have_room(self, count: int) -> None:
        """Until so many bytes may go out."""
        if self._allowance.is_paced:
            await self._allowance.pace(count)
        for flow in self._flows:
            await flow.have_room(count)

    def write(self, handle: bytes, block: memoryview, offset: int) -> asyncio.Future[Answer]:
        if not self._bytes:
            self._heard = self._now()
        answer = self._wire.write(handle, block, offset)
        self._bytes += len(block)
        for flow in self._flows:
            flow.bytes += len(block)
        return answer

    def heard(self, answer: asyncio.Future[Answer], count: int) -> None:
        """An answer to a write of so many bytes has come, or will not. Raises what it says."""
        self._heard = self._now()
        self._bytes -= count
        for flow in self._flows:
            flow.give_back(count)
        self._wire.check(answer)

    async def watch(self) -> None:
        """Raises `Unavailable` when the server acknowledges none of what is under way for the time-out."""
        patience_seconds = self.remote.timeout_seconds
        while True:
            await asyncio.sleep(min(1.0, patience_seconds / 4))
            if self._bytes and self._now() - self._heard >= patience_seconds:
                raise self.remote.class_of(TimeoutError(), "take what was written")
