"""The uploads of a package that wait to be sent."""

from __future__ import annotations

import heapq

from ncr_upload.adapters.sftp_dropoff.track import Signal
from ncr_upload.adapters.sftp_dropoff.upload import Upload
from ncr_upload.application.arrivals import Arrival

STEP_BYTES = 1024 * 1024
"""So much more of a growing file wakes the tracks that have nothing to send."""


class Queue:
    """Uploads that wait for a track, the largest first, so that none is left alone with a large one at the end."""

    def __init__(self) -> None:
        self._wide: list[Upload] = []  # each larger than any of the others
        self._others: list[tuple[int, int, Upload]] = []
        self._others_bytes = 0
        self._added = 0
        self._closed = False
        self._changed = Signal()

    @property
    def bytes(self) -> int:
        """What waits, or still comes to this host to be sent."""
        return self._others_bytes + sum(upload.size for upload in self._wide)

    def put(self, upload: Upload) -> None:
        if upload.is_wide:
            self._wide.append(upload)
            self._wide.sort(key=lambda wide: -wide.size)
        else:
            self._added += 1
            heapq.heappush(self._others, (-upload.size, self._added, upload))
            self._others_bytes += upload.size
        self._changed.fire()

    async def follow(self, arrival: Arrival) -> None:
        """Have its upload taken while it grows, until all of it is here."""
        reached = 0
        while reached < arrival.size and arrival.local is None:
            reached = await arrival.beyond(min(reached + STEP_BYTES, arrival.size) - 1)
            self._changed.fire()

    def close(self) -> None:
        self._closed = True
        self._changed.fire()

    async def take(self) -> Upload | None:
        """None once nothing waits and nothing will. A wide one stays until all of it is sent, for others to take too, and is
        passed over while nothing of it is here to send."""
        while True:
            self._wide = [upload for upload in self._wide if not upload.is_over]
            ready = next((upload for upload in self._wide if upload.can_send), None)
            if ready is not None:
                return ready
            if self._others:
                _, _, upload = heapq.heappop(self._others)
                self._others_bytes -= upload.size
                return upload
            if self._closed and not self._wide:
                return None
            await self._changed.wait()
