"""Keeps a claim alive from a thread of its own, however busy the attempt is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from ncr_upload.application.ports import Claims
from ncr_upload.domain.errors import CancelRequested, DeliveryError, LeaseLost, Unavailable
from ncr_upload.domain.jobs import Claim


class Lease:
    """Renews the claim every `renew_seconds` while entered.

    `check` is asked before every outside effect: it raises once the claim is lost, cancelled, or could not be renewed
    for as long as it lasts (this host's steady clock measures only how long ago the last renewal began).
    """

    def __init__(self, claims: Claims, claim: Claim, *, renew_seconds: float) -> None:
        self._claims = claims
        self._claim = claim
        self._renew_seconds = renew_seconds
        self._on_end: Callable[[], None] = lambda: None
        self._ended: DeliveryError | None = None
        self._stop = threading.Event()
        self._good_until = time.monotonic() + claim.lease_seconds
        self._thread = threading.Thread(target=self._run, name=f"lease-{claim.task.task_id}", daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=self._renew_seconds)

    def conclude(self) -> None:
        """Renew no more: the task's last write is about to be made, within what is left of the lease."""
        self.check()
        self._stop.set()

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

    def _run(self) -> None:
        while not self._stop.wait(self._renew_seconds):
            began = time.monotonic()
            if began >= self._good_until:
                # This process stood still. Renewing now would keep the job from the worker that may take it over.
                self._end(LeaseLost(self._claim.task.task_id, self._claim.fence))
                return
            try:
                self._claims.renew(self._claim)
            except (LeaseLost, CancelRequested) as error:
                self._end(error)
                return
            except Unavailable:
                if time.monotonic() >= self._good_until:
                    self._end(LeaseLost(self._claim.task.task_id, self._claim.fence))
                    return
                continue
            self._good_until = began + self._claim.lease_seconds

    def _end(self, error: DeliveryError) -> None:
        self._ended = error
        if not self._stop.is_set():
            self._on_end()
