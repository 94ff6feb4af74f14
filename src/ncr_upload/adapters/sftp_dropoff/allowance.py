"""What a session may use of the destination, beside all other workers: SFTP_MAX_CONNECTIONS and SFTP_MAX_BYTES_PER_SECOND."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from ncr_upload.application.ports import Sharing
from ncr_upload.domain.errors import Deferred, Unavailable

LEASE_SECONDS = 60.0
RENEW_SECONDS = 15.0
LOST_SECONDS = 45.0
"""A lease that could not be renewed for so long is given up, with its connections, before another worker may take it."""

WAIT_SECONDS = 10.0
"""So long at least a session waits for a connection itself; then its job is deferred."""

LOOK_SECONDS = 0.5
BOOKED_SECONDS = 0.1
"""Bytes are booked for so long at once: ten times a second for all workers together."""

LEFT_FREE = 1
"""Connections that one session leaves to others when it takes more than its first."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of all workers together; 0 is no limit. A session waits `wait_seconds` for its first connection."""

    sharing: Sharing
    connections: int = 0
    bytes_per_second: int = 0
    wait_seconds: float = WAIT_SECONDS


class Allowance:
    """One session's part of the limits. `lose` is called when it no longer has a right to its connections."""

    def __init__(self, destination: str, limits: Limits | None, lose: Callable[[], None]) -> None:
        self._destination = destination
        self._limits = limits
        self._lose = lose
        self._holder = str(uuid.uuid4())
        self._slots: list[int] = []
        self._renewing: asyncio.Task[None] | None = None
        self._booking = asyncio.Lock()
        self._booked_bytes = 0

    @property
    def is_paced(self) -> bool:
        return self._limits is not None and self._limits.bytes_per_second > 0

    async def take_first(self, patience_seconds: float = 0) -> None:
        """Raises `Deferred` when all connections stay in use."""
        if self._limits is None or not self._limits.connections:
            return
        until = time.monotonic() + max(self._limits.wait_seconds, patience_seconds)
        while not await self._take(self._limits, leave=0):
            if time.monotonic() >= until:
                raise Deferred(
                    "connections_in_use",
                    f"all {self._limits.connections} connections that all workers may have to {self._destination} are in use",
                    "The job goes on by itself and spends no attempt. Raise SFTP_MAX_CONNECTIONS if the partner allows more.",
                )
            await asyncio.sleep(LOOK_SECONDS)
        self._renewing = asyncio.create_task(self._renew(self._limits))

    async def take_further(self) -> bool:
        """Whether one more connection may be made: not the last one that is free."""
        if self._limits is None or not self._limits.connections:
            return True
        return await self._take(self._limits, leave=LEFT_FREE)

    async def give_back_one(self) -> None:
        """A connection that was not made after all."""
        if self._limits is not None and self._slots:
            await asyncio.to_thread(self._limits.sharing.release_connections, self._holder, self._slots.pop())

    async def close(self) -> None:
        """After the connections are closed. What cannot be given back now is free when its lease has run out."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        if self._limits is not None and self._slots:
            try:
                await asyncio.to_thread(self._limits.sharing.release_connections, self._holder)
            except Unavailable:
                return

    async def pace(self, count: int) -> None:
        """Until so many bytes may be sent."""
        if self._limits is None or not self._limits.bytes_per_second:
            return
        async with self._booking:
            if self._booked_bytes < count:
                rate = self._limits.bytes_per_second
                more = max(count, int(rate * BOOKED_SECONDS))
                wait_seconds = await asyncio.to_thread(self._limits.sharing.book_bytes, self._destination, more, rate)
                self._booked_bytes += more
                await asyncio.sleep(wait_seconds)
            self._booked_bytes -= count

    async def _take(self, limits: Limits, leave: int) -> bool:
        take = limits.sharing.take_connection
        slot = await asyncio.to_thread(take, self._destination, self._holder, limits.connections, leave, LEASE_SECONDS)
        if slot is not None:
            self._slots.append(slot)
        return slot is not None

    async def _renew(self, limits: Limits) -> None:
        renewed_at = time.monotonic()
        while True:
            await asyncio.sleep(RENEW_SECONDS)
            asked_at = time.monotonic()
            try:
                held = await asyncio.to_thread(limits.sharing.renew_connections, self._holder, len(self._slots), LEASE_SECONDS)
            except Unavailable:
                held = asked_at - renewed_at < LOST_SECONDS
            else:
                renewed_at = asked_at
            if not held:
                self._lose()
                return
