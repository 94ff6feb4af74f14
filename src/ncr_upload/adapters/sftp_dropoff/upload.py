"""Sending one file, so that the next attempt can go on where this one was cut off.

A write is only sent while it ends less than WINDOW_BYTES beyond the first byte that the server has not acknowledged. So of a
part that is n bytes long, everything below n − WINDOW_BYTES was acknowledged, however it ended and whoever wrote it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import BinaryIO

import asyncssh

from ncr_upload.adapters.sftp_dropoff.remote import Failed, Missing, Remote
from ncr_upload.application.ports import LocalFile, OnBytes
from ncr_upload.domain.errors import DestinationParked, Unavailable

MAX_BLOCK_BYTES = 256 * 1024
BLOCKS_IN_FLIGHT = 8
WINDOW_BYTES = BLOCKS_IN_FLIGHT * MAX_BLOCK_BYTES
"""May grow only under another name for parts: those of the version before would be trusted too far."""

PROOF_BYTES = 64 * 1024
"""So much below the point where a part is continued is read back and compared."""


async def upload_part(remote: Remote, part: str, part_bytes: int | None, local: LocalFile, on_bytes: OnBytes) -> int:
    """Upload as `part`, of which `part_bytes` are there already (None: there is no such part). Returns how many bytes were not
    sent again."""
    doing = f"write {local.file.target}"
    with await asyncio.to_thread(local.path.open, "rb") as source:
        file, offset = await _open_part(remote, part, part_bytes, local.file.size, source, doing)
        on_bytes(offset)
        try:
            await _send(remote, source, file, offset, doing, on_bytes)
            await remote.ask(doing, file.close())  # on a failure the end of the session closes it
        except Failed:
            if offset:  # a server that cannot continue a file would fail for ever
                with suppress(Unavailable, DestinationParked):
                    await remote.remove_files([part])
            raise
    return offset


async def _open_part(
    remote: Remote, part: str, part_bytes: int | None, size: int, source: BinaryIO, doing: str
) -> tuple[asyncssh.SFTPClientFile, int]:
    """The part, open, and from where it is to be written. One that is not continued is removed first: a stale worker that
    still writes into it shall not make the new one look longer than it is."""
    offset = part_bytes - WINDOW_BYTES if part_bytes is not None and part_bytes <= size else 0
    if offset > 0:
        with suppress(Missing, Failed, DestinationParked):
            file = await remote.ask(doing, _open(remote.channel, part, "r+b"))
            if await _is_as_sent(remote, file, source, offset):
                return file, offset
            await remote.ask(doing, file.close())
    if part_bytes is not None:
        await remote.remove_files([part])
    return await remote.ask(doing, _open(remote.channel, part, "wb")), 0


async def _open(channel: asyncssh.SFTPClient, part: str, mode: str) -> asyncssh.SFTPClientFile:
    return await channel.open(part, mode, block_size=0)  # 0: each write is one request, as `_send` cuts them


async def _is_as_sent(remote: Remote, file: asyncssh.SFTPClientFile, source: BinaryIO, offset: int) -> bool:
    start = max(0, offset - PROOF_BYTES)
    wanted, found = await asyncio.to_thread(_read_at, source, start, offset - start), b""
    while len(found) < len(wanted):
        more: bytes = await remote.ask("read a part back", file.read(len(wanted) - len(found), start + len(found)))
        if not more:
            return False
        found += more
    return found == wanted


async def _send(
    remote: Remote, source: BinaryIO, file: asyncssh.SFTPClientFile, offset: int, doing: str, on_bytes: OnBytes
) -> None:
    """Keep BLOCKS_IN_FLIGHT writes under way. Only a server that acknowledges none of them for the time-out is given up."""
    block_bytes = min(MAX_BLOCK_BYTES, remote.channel.limits.max_write_len or MAX_BLOCK_BYTES)
    writes: dict[asyncio.Task[int], int] = {}  # where each begins; the first one in here is the lowest
    try:
        while True:
            block = await asyncio.to_thread(_read_at, source, offset, block_bytes)
            if block:
                writes[asyncio.create_task(file.write(block, offset))] = offset
                offset += len(block)
            while writes and (not block or offset - next(iter(writes.values())) >= BLOCKS_IN_FLIGHT * block_bytes):
                done, _ = await asyncio.wait(writes, timeout=remote.timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    raise remote.class_of(TimeoutError(), doing)
                for write in done:
                    del writes[write]
                if failures := [failure for write in done if (failure := write.exception())]:
                    raise remote.class_of(failures[0], doing)
                on_bytes(sum(write.result() for write in done))
            if not block:
                return
    finally:
        for write in writes:
            write.cancel()
        await asyncio.gather(*writes, return_exceptions=True)


def _read_at(source: BinaryIO, offset: int, count: int) -> bytes:
    source.seek(offset)
    return source.read(count)
