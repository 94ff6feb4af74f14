"""Receive the bodies of requests within bounds: of each body's size and pace, and of all bodies in flight together.

A caller that is refused is answered before its body is read, and can send it again: nothing was accepted.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ncr_upload.entrypoints.api.problems import bodies_in_flight_problem, encoding_problem, too_large_problem

BATCH_PATH = "/process-batch"
MAX_BODY_BYTES = 16 * 1024 * 1024
"""Of a batch. Room for 10,000 jobs whose every name is as long as may be, in UTF-8."""

MAX_SMALL_BODY_BYTES = 64 * 1024
"""Of every other request. A single job takes a few hundred bytes."""

BATCHES_BYTES = 2 * MAX_BODY_BYTES
SMALL_BODIES_BYTES = 16 * 1024 * 1024
"""Of all bodies in flight in this process, until each request is answered. Single jobs have a budget of their own, so that
batches, also slow ones, hold up no job."""

MAX_WAITING = 256
WAIT_SECONDS = 1.5
"""Together with the time to read it, within the 3 s in which a caller is answered."""

PATIENCE_SECONDS = 10.0
MIN_BYTES_PER_SECOND = 256 * 1024
"""A body may take PATIENCE_SECONDS, and a second more for so many bytes that have come."""

DRAIN_SECONDS = 5.0


class BodyBudget:
    """Bytes that may be in flight, given in the order of asking. For one event loop."""

    def __init__(self, capacity: int) -> None:
        self.free = capacity
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, count: int) -> bool:
        """Return whether the bytes are reserved; wait for WAIT_SECONDS at most."""
        if not self._waiting and count <= self.free:
            self.free -= count
            return True
        if len(self._waiting) >= MAX_WAITING:
            return False
        reserved = asyncio.get_running_loop().create_future()
        entry = (count, reserved)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await reserved
        except BaseException as error:
            if reserved.done() and not reserved.cancelled():
                self.give_back(count)
            else:
                with suppress(ValueError):  # `_serve` has passed it by already
                    self._waiting.remove(entry)
                self._serve()
            if isinstance(error, TimeoutError):
                return False
            raise
        return True

    def give_back(self, count: int) -> None:
        self.free += count
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self.free:
            count, reserved = self._waiting.popleft()
            if not reserved.done():
                self.free -= count
                reserved.set_result(None)


class BodyLimit:
    """Refuse a body that is too large (413), too slow (408), encoded (415), or one too many (503)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._batches = BodyBudget(BATCHES_BYTES)
        self._small = BodyBudget(SMALL_BODIES_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        announced = headers.get("content-length")
        if announced is None and "transfer-encoding" not in headers:
            await self._app(scope, receive, send)
            return
        is_batch = scope["path"] == BATCH_PATH
        limit, budget = (MAX_BODY_BYTES, self._batches) if is_batch else (MAX_SMALL_BODY_BYTES, self._small)
        size = int(announced) if announced is not None and announced.isdecimal() else limit
        if size > limit:
            await _answer_and_drain(too_large_problem(limit), scope, receive, send)
            return
        encoding = headers.get("content-encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            await _answer_and_drain(encoding_problem(encoding), scope, receive, send)
            return
        if not await budget.take(size):
            await _answer_and_drain(bodies_in_flight_problem(), scope, receive, send)
            return
        try:
            await self._app(scope, _Receiving(receive, limit, size), send)
        finally:
            budget.give_back(size)


class _Receiving:
    """Counts and times the messages of one body."""

    def __init__(self, receive: Receive, limit: int, expected: int) -> None:
        self._receive = receive
        self._limit = limit
        self._expected = expected
        self._received = 0
        self._is_complete = False
        self._since = time.monotonic()

    async def __call__(self) -> Message:
        if self._is_complete:
            return await self._receive()
        patience = PATIENCE_SECONDS + self._received / MIN_BYTES_PER_SECOND
        left = self._since + patience - time.monotonic()
        try:
            async with asyncio.timeout(max(0, left)):
                message = await self._receive()
        except TimeoutError:
            told = f"Only {self._received} bytes of the body arrived in {time.monotonic() - self._since:.0f} s."
            raise HTTPException(408, told, {"Connection": "close"}) from None
        self._received += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        if self._received > self._limit:
            raise HTTPException(413, f"The body is larger than {self._limit} bytes.", {"Connection": "close"})
        return message


async def _answer_and_drain(answer: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer before the body is read, then throw away what the caller still sends, for a while: many callers listen only
    once they have sent everything, and would see a reset connection instead of the answer."""

    async def keep_open(message: Message) -> None:
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    await answer(scope, receive, keep_open)
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                continue
    await send({"type": "http.response.body", "body": b"", "more_body": False})
