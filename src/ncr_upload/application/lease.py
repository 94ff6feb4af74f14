"""Keeps a claim alive from another thread, however busy the attempt is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

from ncr_upload.application.ports import Claims
from ncr_upload.application.ticker import NEVER, Ticker
from ncr_upload.domain.errors import CancelRequested, DeliveryError, LeaseLost, Unavailable
from ncr_upload.domain.jobs import Claim

T = TypeVar("T")


class Lease:
    """Renews the claim every `renew_seconds` while entered. `asked_at` is when the claim was asked for, by the steady clock.

    `check` is asked before every outside effect: it raises once the claim is lost, cancelled, or could not be renewed
    for as long as it lasts (this host's steady clock measures only how long ago the last renewal began).
    """

    def __init__(self, claims: Claims, claim: Claim, *, renew_seconds: float, asked_at: float) -> None:
        self._claims = claims
        self._claim = claim
        self._renew_seconds = renew_seconds
        self._on_end: Callable[[], None] = lambda: None
        self._ended: DeliveryError | None = None
        self._concluded = False
        self._good_until = asked_at + claim.lease_seconds
        self._ticker = Ticker("lease", self._tick, renew_seconds)

    def __enter__(self) -> Lease:
        self._ticker.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._concluded = True
        self._ticker.end(self._renew_seconds)

    def conclude(self) -> None:
        """Renew no more: the task's last write is about to be made, within what is left of the lease."""
        self.check()
        self._concluded = True

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it in an event loop of its own. It is stopped when the claim ends; then this raises what `check` does."""
        return asyncio.run(self._run_under(work))

    async def _run_under(self, work: Coroutine[Any, Any, T]) -> T:
        running = asyncio.current_task()
        assert running is not None
        loop, is_stopped = asyncio.get_running_loop(), False

        def stop() -> None:
            with suppress(RuntimeError):  # the loop has ended by itself meanwhile
                loop.call_soon_threadsafe(cancel_once)

        def cancel_once() -> None:
            """A second time would cut short what the first one has cleaned up."""
            nonlocal is_stopped
            if not is_stopped:
                is_stopped = True
                running.cancel()

        self.when_ended(stop)
        if self._ended is not None:  # before anybody listened
            stop()
        try:
            return await work
        except asyncio.CancelledError:
            if self._ended is not None:
                raise self._ended from None
            raise

    def when_ended(self, call: Callable[[], None]) -> None:
        """Call this, from the lease's thread, when the claim ends before the attempt does."""
        self._on_end = call

    def check(self) -> None:
        """Raises `LeaseLost` or `CancelRequested` if the attempt must stop."""
        if self._ended is not None:
            raise self._ended
        if time.monotonic() >= self._good_until:
            raise LeaseLost(self._claim.task.task_id, self._claim.fence)

    def end(self, error: DeliveryError) -> None:
        """Stop the attempt with this error, unless its last write has begun. Any thread and signal handlers may call it."""
        if self._ended is None:
            self._end(error)

    @property
    def ended(self) -> DeliveryError | None:
        """Why the attempt must stop, if it must."""
        return self._ended

    def _tick(self) -> float:
        if self._concluded:
            return NEVER
        began = time.monotonic()
        if began >= self._good_until:
            # This process stood still. Renewing now would keep the job from the worker that may take it over.
            return self._end(LeaseLost(self._claim.task.task_id, self._claim.fence))
        try:
            self._claims.renew(self._claim)
        except (LeaseLost, CancelRequested) as error:
            return self._end(error)
        except Unavailable:
            if time.monotonic() >= self._good_until:
                return self._end(LeaseLost(self._claim.task.task_id, self._claim.fence))
            return self._renew_seconds
        self._good_until = began + self._claim.lease_seconds
        return self._renew_seconds

    def _end(self, error: DeliveryError) -> float:
        self._ended = error
        if not self._concluded:
            self._on_end()
        return NEVER
