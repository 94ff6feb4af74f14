"""Sending one file, so that the next attempt can go on where this one was cut off.

A write is only sent while it ends less than a window beyond the first byte that the server has not acknowledged. So of a
part that is n bytes long, everything below n − window was acknowledged, however it ended and whoever wrote it. That holds for
writes through several connections too: what counts is the lowest byte that none of them has seen acknowledged.

A file that still arrives on this host is sent as far as it has come. Its hash is not known then, so what is read of it is
hashed, and the part is taken for that file only once the hash of all that was sent, and of the rest, is the one it has.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import posixpath
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import asyncssh

from ncr_upload.adapters.sftp_dropoff.remote import Act, Failed, Missing, Remote
from ncr_upload.adapters.sftp_dropoff.track import Signal, Track
from ncr_upload.application.arrivals import Arrival
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

FROM_MEMORY = getattr(os, "RWF_NOWAIT", None)
"""Has a read fail that would wait for the disk. Not every system has it, nor every file system."""

ANEW = asyncssh.FXF_WRITE | asyncssh.FXF_CREAT | asyncssh.FXF_TRUNC
AGAIN = asyncssh.FXF_READ | asyncssh.FXF_WRITE

HASHED_BYTES = 1024 * 1024
"""Read at once where nothing is sent."""


class Differs(Unavailable):
    """What was read to be sent is not the file that was downloaded."""


@dataclass(slots=True)
class Part:
    """A file on its way, and how many bytes of it an earlier attempt has left there; None if it left nothing."""

    file: Arrival
    path: str
    bytes: int | None
    window_bytes: int = WINDOW_BYTES


class Upload:
    """A part that is being sent, through one track or several; `proven` is set once it is known to be what it shall be."""

    def __init__(self, part: Part, on_bytes: OnBytes) -> None:
        self.part = part
        self.kept_bytes = 0
        self.told_bytes = 0
        self.is_early = part.file.local is None
        self.proven = asyncio.Event()
        self._on_bytes = on_bytes
        self._doing = Act(f"write {part.file.target}", "write", (part.path,))
        self._handles: dict[Track, bytes] = {}
        self._started = False
        self._begun = asyncio.Event()
        self._ended = False
        self._source = _Source(part.file.open, self.size, hashed=self.is_early)
        self._offset = 0
        self._reading = asyncio.Lock()
        self._unheard: dict[int, int] = {}  # where each write begins, and its bytes; the first one in here is the lowest
        self._heard = Signal()
        self.failure: DeliveryError | None = None
        if not self.is_early:
            self.proven.set()

    @property
    def size(self) -> int:
        return self.part.file.size

    @property
    def is_wide(self) -> bool:
        """Whether several tracks may send it."""
        return self.part.window_bytes == WIDE_WINDOW_BYTES

    @property
    def can_send(self) -> bool:
        """Whether a write's worth of what is left to send is here."""
        rest = self.size - self._offset
        return rest > 0 and self.part.file.reached - self._offset >= min(rest, MAX_BLOCK_BYTES)

    @property
    def is_over(self) -> bool:
        """Whether no track can do more for it: the last byte is on its way, or none will be any more."""
        return self._ended or self.failure is not None or self._offset >= self.size

    @property
    def was_joined(self) -> bool:
        return len(self._handles) > 1

    async def send(self, track: Track) -> bool:
        """Send through this track what is here; whether this track began it, and is to `finish` it."""
        began, self._started = not self._started, True
        handle = self._handles.get(track) or await (self._begin(track) if began else self._join(track))
        if handle is not None and self.size <= track.block_bytes(MAX_BLOCK_BYTES):
            await self._pump(track, handle)
        elif handle is not None:
            async with track.turn:
                await self._pump(track, handle)
        return began

    async def finish(self) -> None:
        """Until all is acknowledged and proven. A failure is raised, after a part that cannot be continued was removed."""
        try:
            while (self._unheard or not self.is_over) and self.failure is None:
                await self._heard.wait()
            if self.failure is None:
                await self.proven.wait()
            self._ended = True
            if self.failure is not None:
                raise self.failure
            for track, handle in self._handles.items():
                await track.remote.close(self._doing, handle)  # on a failure the end of the session closes it
            self.close()
        except Failed:
            if self.kept_bytes:  # a server that cannot continue a file would fail for ever
                with suppress(Unavailable, DestinationParked):
                    await next(iter(self._handles)).remote.remove_files([self.part.path])
            raise

    async def prove(self, local: LocalFile, remote: Remote, path: str) -> None:
        """The early file is whole. If what was sent of it belongs to it, the part gets this name, under which later attempts
        continue it; if not, it fails with `Differs`. The rest is read from where the whole file is."""
        async with self._reading:
            sent, offset = self._source.begin_anew()
        same = (
            local.file.size == self.size and await asyncio.to_thread(_hash_rest, local.path, sent, offset) == local.file.sha256
        )
        if not same:
            self._fail(_differs(self.part.file.target))
        elif self._started:
            await self._begun.wait()
            with suppress(Missing, Failed, DestinationParked):  # some servers rename no file that is open
                await remote.rename(self.part.path, path)
                self.part.path = path
        else:
            self.part.path = path
        self.proven.set()

    def close(self) -> None:
        """Let go of the local file, and of what was read of it."""
        self._ended = True
        self._source.close()

    async def _begin(self, track: Track) -> bytes:
        handle, self.kept_bytes = await open_part(track.remote, self.part, self._doing)
        self._offset = self.kept_bytes
        self._tell(self.kept_bytes)
        self._handles[track] = handle
        self._begun.set()
        return handle

    async def _join(self, track: Track) -> bytes | None:
        """None where there is nothing left, or the server will not have the file open twice."""
        await self._begun.wait()
        if self.is_over:
            return None
        remote = track.remote
        with suppress(Missing, Failed, DestinationParked):
            handle = await remote.open(self._doing, self.part.path, AGAIN)
            if not self._ended:
                self._handles[track] = handle
                return handle
            await remote.close(self._doing, handle)
        return None

    async def _pump(self, track: Track, handle: bytes) -> None:
        while self.failure is None and (found := await self._next_block(track.block_bytes(MAX_BLOCK_BYTES))):
            offset, block = found
            while offset + len(block) - next(iter(self._unheard)) > self.part.window_bytes and self.failure is None:
                await self._heard.wait()
            await track.have_room(len(block))
            if self.failure is not None:
                return
            try:
                answer = track.write(handle, block, offset)
            except (asyncssh.Error, OSError) as error:
                self._fail(track.remote.class_of(error, self._doing))
                return
            answer.add_done_callback(partial(self._hear, track, offset))

    async def _next_block(self, count: int) -> tuple[int, memoryview] | None:
        """The next bytes to send and where they belong, unheard from now on; None where no more are here."""
        async with self._reading:
            offset = self._offset
            block = self._source.take(offset, count)
            if not block:
                if not self.can_send:
                    return None
                here = min(self.part.file.reached, self.size) - offset
                if not self._source.read_from_memory(offset, min(here, count)):
                    await asyncio.to_thread(self._source.read, offset, min(here, BLOCKS_AHEAD * count))
                block = self._source.take(offset, count)
            if not block:
                self._fail(_differs(self.part.file.target))
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
            if self.failure is None:  # else what was told may be taken back by now
                self._tell(count)
            self._heard.fire()

    def _tell(self, count: int) -> None:
        self.told_bytes += count
        self._on_bytes(count)

    def _fail(self, failure: DeliveryError) -> None:
        self.failure = self.failure or failure
        self._heard.fire()


class _Source:
    """A local file of this size, read several blocks at a time, and closed as soon as its end is read. While it grows, what is
    read is hashed; it is read from its beginning to its end, each byte once."""

    def __init__(self, opened: Callable[[], BinaryIO], size: int, *, hashed: bool) -> None:
        self._opened = opened
        self._size = size
        self._sha256 = hashlib.sha256() if hashed else None
        self._file: BinaryIO | None = None
        self._at = 0
        self._ahead = memoryview(b"")

    def take(self, offset: int, count: int) -> memoryview | None:
        """From what was read ahead; None when nothing was."""
        start = offset - self._at
        return self._ahead[start : start + count] if 0 <= start < len(self._ahead) else None

    def read_from_memory(self, offset: int, count: int) -> bool:
        """As `read`, if the system has it in memory and nothing is to be hashed: a thread would cost more than that."""
        if FROM_MEMORY is None or self._sha256 is not None:
            return False
        ahead = bytearray(count)
        try:
            if os.preadv(self._open(), [ahead], offset, FROM_MEMORY) < count:
                return False
        except OSError:
            return False
        self._keep(offset, count, ahead)
        return True

    def read(self, offset: int, count: int) -> None:
        """Read ahead from there; for a thread, as it waits for the disk."""
        ahead = os.pread(self._open(), count, offset)
        if self._sha256 is not None:
            self._sha256.update(ahead)
        self._keep(offset, count, ahead)

    def _open(self) -> int:
        if self._file is None:
            self._file = self._opened()
        return self._file.fileno()

    def _keep(self, offset: int, count: int, ahead: bytes | bytearray) -> None:
        self._at, self._ahead = offset, memoryview(ahead)
        if len(ahead) < count or offset + count >= self._size:
            self._close_file()

    def begin_anew(self) -> tuple[hashlib._Hash, int]:
        """The file is whole, and is opened again. The hash of what was read until now, and how many bytes that was."""
        sha256, self._sha256 = self._sha256 or hashlib.sha256(), None
        self._close_file()
        return sha256, self._at + len(self._ahead)

    def close(self) -> None:
        """Let go of the file, and of what was read of it."""
        self._close_file()
        self._ahead = memoryview(b"")

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _hash_rest(path: Path, sha256: hashlib._Hash, offset: int) -> str:
    """The SHA-256 of what is hashed already and of the file from there on, in hex."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while chunk := file.read(HASHED_BYTES):
            sha256.update(chunk)
    return sha256.hexdigest()


def _differs(target: str) -> Differs:
    return Differs(
        "package_changed",
        f"{target} on the worker's disk is not what was downloaded",
        "The job is tried again; if it stays so, check the worker's disk.",
    )


async def open_part(remote: Remote, part: Part, doing: Act) -> tuple[bytes, int]:
    """Its handle, and from where it is to be written. One that is not continued is removed first: a stale worker that
    still writes into it shall not make the new one look longer than it is."""
    offset = part.bytes - part.window_bytes if part.bytes is not None and part.bytes <= part.file.size else 0
    if offset > 0:
        with suppress(Missing, Failed, DestinationParked):
            handle = await remote.open(doing, part.path, AGAIN)
            if await _is_as_sent(remote, handle, part.file, offset):
                return handle, offset
            await remote.close(doing, handle)
    if part.bytes is not None:
        await remote.put_away([part.path], posixpath.dirname(posixpath.dirname(part.path)))
    return await remote.open(doing, part.path, ANEW), 0


async def _is_as_sent(remote: Remote, handle: bytes, whole: Arrival, offset: int) -> bool:
    start = max(0, offset - PROOF_BYTES)
    wanted, found = await asyncio.to_thread(_read_at, whole, start, offset - start), b""
    while len(found) < len(wanted):
        more = await remote.read_at("read a part back", handle, start + len(found), len(wanted) - len(found))
        if not more:
            return False
        found += more
    return found == wanted


def _read_at(whole: Arrival, offset: int, count: int) -> bytes:
    with whole.open() as source:
        source.seek(offset)
        return source.read(count)
