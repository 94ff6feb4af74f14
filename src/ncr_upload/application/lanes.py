"""Blocking port calls, away from the event loop and within the time an answer may take.

Each outside part has a lane of its own: when the part freezes, only its own few threads are stuck, and callers of every
other part (and `/livez`) go on. A call that could not start in time never runs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

from ncr_upload.application.ports import Wanted
from ncr_upload.application.submissions import Answer
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import Task

T = TypeVar("T")
Q = TypeVar("Q")

ASKED_AT_ONCE = 100
"""Questions that one call answers."""

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
            raise _timed_out(self.part, seconds) from None


def _timed_out(part: str, seconds: float) -> Unavailable:
    return Unavailable(
        f"{part}_timeout",
        f"the {part} did not answer within {seconds:g} s",
        f"Check that the {part} runs and is not overloaded; send the request again.",
        retry_after_seconds=5,
    )


class SharedLane(Generic[Q, T]):
    """A lane whose calls answer many questions: what is asked in one turn of the event loop, or while all threads are busy, is
    asked together. So nobody waits for company, and the more ask, the less each one costs.

    `run` is called from one event loop only. The answers are in the order of the questions; an exception among them is raised
    to whoever asked that question, one that is raised to all of that call.
    """

    def __init__(self, part: str, threads: int) -> None:
        self.part = part
        self._idle = threads
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=f"lane-{part}")
        self._waiting: deque[tuple[Q, asyncio.Future[T]]] = deque()
        self._begins = False

    def ask(self, question: Q, call: Callable[[Sequence[Q]], Sequence[T | Unavailable]]) -> asyncio.Future[T]:
        """The answer to come. One that is cancelled before its call has begun is never asked for."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        self._waiting.append((question, answer))
        if not self._begins:
            self._begins = True
            loop.call_soon(self._begin, call)
        return answer

    async def run(
        self, question: Q, call: Callable[[Sequence[Q]], Sequence[T | Unavailable]], seconds: float = ANSWER_SECONDS
    ) -> T:
        """As `Lane.run`."""
        return await self.wait(self.ask(question, call), seconds)

    async def wait(self, answer: asyncio.Future[T], seconds: float = ANSWER_SECONDS) -> T:
        """Raises `Unavailable` after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                return await answer
        except TimeoutError:
            raise _timed_out(self.part, seconds) from None

    def _begin(self, call: Callable[[Sequence[Q]], Sequence[T | Unavailable]]) -> None:
        self._begins = False
        asked: list[tuple[Q, asyncio.Future[T]]] = []
        while self._idle and self._waiting and len(asked) < ASKED_AT_ONCE:
            question, answer = self._waiting.popleft()
            if not answer.done():
                asked.append((question, answer))
        if asked:
            self._idle -= 1
            called = asyncio.wrap_future(self._threads.submit(call, [question for question, _ in asked]))
            called.add_done_callback(partial(self._end, [answer for _, answer in asked], call))
            self._begin(call)  # what is beyond ASKED_AT_ONCE

    def _end(
        self,
        waiting: Sequence[asyncio.Future[T]],
        call: Callable[[Sequence[Q]], Sequence[T | Unavailable]],
        called: asyncio.Future[Sequence[T | Unavailable]],
    ) -> None:
        self._idle += 1
        error = called.exception()
        answers: Sequence[T | BaseException] = called.result() if error is None else [error] * len(waiting)
        for future, answer in zip(waiting, answers, strict=True):
            if future.done():  # nobody waits any more
                continue
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            else:
                future.set_result(answer)
        self._begin(call)


class Lanes:
    """The lanes of one API process. Reading has its own, so that a rush of submits keeps nobody from following a job.
    `jobs` accepts single jobs, `tasks` and `views` read them by task id from the ledger and from Redis.

    `submit_threads`: 1 where the database has one writer at a time (SQLite). There submits wait here in line; left to
    fight for its lock, some would win at once and some not within seconds.
    """

    def __init__(self, *, submit_threads: int = 4) -> None:
        self.jobs: SharedLane[Wanted, Answer] = SharedLane("database", min(submit_threads, 2))
        self.submit = Lane("database", submit_threads)
        self.tasks: SharedLane[str, Task | None] = SharedLane("database", 2)
        self.database = Lane("database", 4)
        self.views: SharedLane[str, dict[str, Any] | None] = SharedLane("redis", 2)
        self.queue = Lane("queue", 4)
        self.worker = Lane("worker", 2)
        self._probes: dict[str, Lane] = {}

    def probe(self, part: str) -> Lane:
        """The lane of a part that only `/health` asks."""
        return self._probes.setdefault(part, Lane(part, 2))
