"""Sending one file, so that the next attempt can go on where this one was cut off.

A write is only sent while it ends less than a window beyond the first byte that the server has not acknowledged. So of a
part that is n bytes long, everything below n − window was acknowledged, however it ended and whoever wrote it. That holds for
writes through several connections too: what counts is the lowest byte that none of them has seen acknowledged.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import asyncssh

from ncr_upload.adapters.sftp_dropoff.remote import Failed, Missing, Remote
from ncr_upload.adapters.sftp_dropoff.track import Signal, Track
from ncr_upload.application.ports import LocalFile, OnBytes
from ncr_upload.domain.errors import DeliveryError, DestinationParked, Unavailable

MAX_BLOCK_BYTES = 256 * 1024
WINDOW_BYTES = 2 * 1024 * 1024
WIDE_WINDOW_BYTES = 8 * 1024 * 1024
"""Each may grow only under another name for parts: those of the version before would be trusted too far."""

SPLIT_BYTES = 32 * 1024 * 1024
"""Files at least this large are sent through several connections at once, with the wide window."""

PROOF_BYTES = 64 * 1024
"""So much below the point where a part is continued is read back and compared."""

BLOCKS_AHEAD = 4
"""Read from the disk in one go."""

SMALL_BYTES = 64 * 1024
"""Read without a thread, which would cost more than the read: what has just been written is in memory."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file on its way, and how many bytes of it an earlier attempt has left there; None if it left nothing."""

    local: LocalFile
    path: str
    bytes: int | None
    window_bytes: int = WINDOW_BYTES


class Upload:
    """A part that is being sent, through one track or several."""

    def __init__(self, part: Part, on_bytes: OnBytes) -> None:
        self.part = part
        self.kept_bytes = 0
        self.told_bytes = 0
        self._tracks = 0
        self._on_bytes = on_bytes
        self._doing = f"write {part.local.file.target}"
        self._files: list[tuple[Remote, asyncssh.SFTPClientFile]] = []
        self._begun = asyncio.Event()
        self._ended = False
        self._source = _Source(part.local.path)
        self._offset = 0
        self._reading = asyncio.Lock()
        self._unheard: dict[int, int] = {}  # where each write begins, and its bytes; the first one in here is the lowest
        self._heard = Signal()
        self.failure: DeliveryError | None = None

    @property
    def size(self) -> int:
        return self.part.local.file.size

    @property
    def is_wide(self) -> bool:
        """Whether several tracks may send it."""
        return self.part.window_bytes == WIDE_WINDOW_BYTES

    @property
    def is_sent(self) -> bool:
        """Whether the last byte is on its way."""
        return self._ended or self._offset >= self.size

    @property
    def was_joined(self) -> bool:
        return len(self._files) > 1

    async def send(self, track: Track) -> bool:
        """Send through this track until nothing is left to send; whether this track began it, and is to `finish` it."""
        self._tracks += 1
        began = self._tracks == 1
        file = await (self._begin(track.remote) if began else self._join(track.remote))
        if file is not None:
            async with track.turn:
                await self._pump(track, file)
        return began

    async def finish(self) -> None:
        """Until all of it is acknowledged. A failure is raised, after a part that cannot be continued was removed."""
        try:
            while self._unheard and self.failure is None:
                await self._heard.wait()
            self._ended = True
            if self.failure is not None:
                raise self.failure
            for remote, file in self._files:
                await remote.ask(self._doing, file.close())  # on a failure the end of the session closes it
        except Failed:
            if self.kept_bytes:  # a server that cannot continue a file would fail for ever
                with suppress(Unavailable, DestinationParked):
                    await self._files[0][0].remove_files([self.part.path])
            raise

    def close(self) -> None:
        """Let go of the local file."""
        self._ended = True
        self._source.close()

    async def _begin(self, remote: Remote) -> asyncssh.SFTPClientFile:
        file, self.kept_bytes = await open_part(remote, self.part, self._doing)
        self._offset = self.kept_bytes
        self._tell(self.kept_bytes)
        self._files.append((remote, file))
        self._begun.set()
        return file

    async def _join(self, remote: Remote) -> asyncssh.SFTPClientFile | None:
        """None where there is nothing left, or the server will not have the file open twice."""
        await self._begun.wait()
        if self.is_sent:
            return None
        with suppress(Missing, Failed, DestinationParked):
            file = await remote.ask(self._doing, _open(remote.channel, self.part.path, "r+b"))
            if not self._ended:
                self._files.append((remote, file))
                return file
            await remote.ask(self._doing, file.close())
        return None

    async def _pump(self, track: Track, file: asyncssh.SFTPClientFile) -> None:
        while self.failure is None and (found := await self._next_block(track.block_bytes(MAX_BLOCK_BYTES))):
            offset, block = found
            while offset + len(block) - next(iter(self._unheard)) > self.part.window_bytes and self.failure is None:
                await self._heard.wait()
            await track.have_room(len(block))
            if self.failure is not None:
                return
            try:
                answer = track.write(file, block, offset)
            except (asyncssh.Error, OSError) as error:
                self._fail(track.remote.class_of(error, self._doing))
                return
            answer.add_done_callback(partial(self._hear, track, offset))

    async def _next_block(self, count: int) -> tuple[int, memoryview] | None:
        """The next bytes to send and where they belong, unheard from now on; None at the end of the file."""
        async with self._reading:
            offset = self._offset
            block = self._source.take(offset, count)
            if block is None:
                if self.size <= SMALL_BYTES:
                    self._source.read(offset, count)
                else:
                    await asyncio.to_thread(self._source.read, offset, BLOCKS_AHEAD * count)
                block = self._source.take(offset, count)
            if not block:
                return None
            self._offset += len(block)
            self._unheard[offset] = len(block)
            return offset, block

    def _hear(self, track: Track, offset: int, answer: asyncio.Future[Any]) -> None:
        if answer.cancelled():
            return
        count = self._unheard.pop(offset)
        try:
            track.heard(answer, count)
        except (asyncssh.Error, OSError, ValueError) as error:
            self._fail(track.remote.class_of(error, self._doing))
        else:
            self._tell(count)
            self._heard.fire()

    def _tell(self, count: int) -> None:
        self.told_bytes += count
        self._on_bytes(count)

    def _fail(self, failure: DeliveryError) -> None:
        self.failure = self.failure or failure
        self._heard.fire()


class _Source:
    """A local file, read several blocks at a time, and closed as soon as its end is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._at = 0
        self._ahead = memoryview(b"")

    def take(self, offset: int, count: int) -> memoryview | None:
        """From what was read ahead; None when nothing was."""
        start = offset - self._at
        return self._ahead[start : start + count] if 0 <= start < len(self._ahead) else None

    def read(self, offset: int, count: int) -> None:
        """Read ahead from there; for a thread, as it waits for the disk."""
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDONLY)
        ahead = os.pread(self._descriptor, count, offset)
        self._at, self._ahead = offset, memoryview(ahead)
        if len(ahead) < count:
            self.close()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


async def open_part(remote: Remote, part: Part, doing: str) -> tuple[asyncssh.SFTPClientFile, int]:
    """The part, open, and from where it is to be written. One that is not continued is removed first: a stale worker that
    still writes into it shall not make the new one look longer than it is."""
    offset = part.bytes - part.window_bytes if part.bytes is not None and part.bytes <= part.local.file.size else 0
    if offset > 0:
        with suppress(Missing, Failed, DestinationParked):
            file = await remote.ask(doing, _open(remote.channel, part.path, "r+b"))
            if await _is_as_sent(remote, file, part.local.path, offset):
                return file, offset
            await remote.ask(doing, file.close())
    if part.bytes is not None:
        await remote.remove_files([part.path])
    return await remote.ask(doing, _open(remote.channel, part.path, "wb")), 0


async def _open(channel: asyncssh.SFTPClient, path: str, mode: str) -> asyncssh.SFTPClientFile:
    return await channel.open(path, mode, block_size=0)


async def _is_as_sent(remote: Remote, file: asyncssh.SFTPClientFile, path: Path, offset: int) -> bool:
    start = max(0, offset - PROOF_BYTES)
    wanted, found = await asyncio.to_thread(_read_at, path, start, offset - start), b""
    while len(found) < len(wanted):
        more: bytes = await remote.ask("read a part back", file.read(len(wanted) - len(found), start + len(found)))
        if not more:
            return False
        found += more
    return found == wanted


def _read_at(path: Path, offset: int, count: int) -> bytes:
    with path.open("rb") as source:
        source.seek(offset)
        return source.read(count)
