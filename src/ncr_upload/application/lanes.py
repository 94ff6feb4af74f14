"""Blocking port calls, away from the event loop and within the time an answer may take.

Each outside part has a lane of its own: when the part freezes, only its own few threads are stuck, and callers of every
other part (and `/livez`) go on. A call that could not start in time never runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ncr_upload.domain.errors import Unavailable

T = TypeVar("T")

ANSWER_SECONDS = 2.5
"""What an answer may spend on outside parts; the API promises to answer within 3 s whatever is down."""


class Lane:
    """A few threads for the calls of one outside part."""

    def __init__(self, part: str, threads: int) -> None:
        self.part = part
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=f"lane-{part}")

    async def run(self, call: Callable[[], T], seconds: float = ANSWER_SECONDS) -> T:
        """What `call` returns or raises; `Unavailable` after `seconds`. A call that had started by then goes on unheard."""
        answer = asyncio.wrap_future(self._threads.submit(call))
        try:
            return await asyncio.wait_for(answer, seconds)
        except TimeoutError:
            raise Unavailable(
                f"{self.part}_timeout",
                f"the {self.part} did not answer within {seconds:g} s",
                f"Check that the {self.part} runs and is not overloaded; send the request again.",
                retry_after_seconds=5,
            ) from None


class Lanes:
    """The lanes of one API process. Reading has its own, so that a rush of submits keeps nobody from following a job.

    `submit_threads`: 1 where the database has one writer at a time (SQLite). There submits wait here in line; left to
    fight for its lock, some would win at once and some not within seconds.
    """

    def __init__(self, *, submit_threads: int = 4) -> None:
        self.submit = Lane("database", submit_threads)
        self.database = Lane("database", 6)
        self.redis = Lane("redis", 4)
        self.queue = Lane("queue", 4)
        self.worker = Lane("worker", 2)
        self._probes: dict[str, Lane] = {}

    def probe(self, part: str) -> Lane:
        """The lane of a part that only `/health` asks."""
        return self._probes.setdefault(part, Lane(part, 2))
