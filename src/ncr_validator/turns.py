"""Who may judge now: a fixed number of benches, and a bounded line of uploads before them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from ncr_validator.bench import Bench
from ncr_validator.limits import Limits
from ncr_validator.problems import Problem


class Turns:
    """At most `concurrency` judgements at once and `queue_length` uploads waiting; whoever comes on top is told 503."""

    def __init__(self, limits: Limits, benches: list[Bench]) -> None:
        self._limits = limits
        self._idle = list(benches)
        self._free = asyncio.Semaphore(len(benches))
        self._present = 0

    @property
    def places(self) -> dict[str, int]:
        """How many places there are and are taken."""
        return {"all": self._limits.concurrency + self._limits.queue_length, "taken": self._present}

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the house, from before the upload to after the answer. Raises `Problem` 503 when it is full."""
        if self._present >= self.places["all"]:
            raise Problem(503, "busy", "Too many packages are being judged; try again.", retry_after_seconds=5)
        self._present += 1
        try:
            yield
        finally:
            self._present -= 1

    @asynccontextmanager
    async def bench(self) -> AsyncIterator[Bench]:
        """A bench of one's own. Raises `Problem` 503 after `queue_seconds`."""
        try:
            await asyncio.wait_for(self._free.acquire(), self._limits.queue_seconds)
        except TimeoutError:
            raise Problem(503, "busy", "No turn came up in time; try again.", retry_after_seconds=10) from None
        bench = self._idle.pop()
        try:
            yield bench
        finally:
            self._idle.append(bench)
            self._free.release()
