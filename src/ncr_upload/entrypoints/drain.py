"""How a worker is stopped: its jobs finish, or after a grace they are handed over; no lease is left to run out.

    SIGTERM, SIGINT   no new job is begun; running ones have WORKER_GRACE_SECONDS to finish
    the second one    running jobs are handed over at once: put back, no attempt spent (SIGQUIT: as the first one, too)
    the third one     the worker ends as if killed; leases run out

Celery's own warm shutdown waits for a running job without end, and its cold one kills the job with its lease. The main
process alone listens: signals that a terminal or systemd sends to the whole process group do not reach the jobs. It tells
its children by SIGUSR2.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import structlog

from ncr_upload.application.leaving import Leaving

log = structlog.get_logger("ncr.worker")

HAND_OVER = signal.SIGUSR2
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
FAREWELL_SECONDS = 10.0
"""From the hand-over to the end: for putting the jobs back, and for Celery's farewell to a Redis that may be silent."""


class Drain:
    """The main process's part. `stop_fetching` begins Celery's warm shutdown; `list_children` gives their process ids."""

    def __init__(self, grace_seconds: float, stop_fetching: Callable[[], None], list_children: Callable[[], list[int]]) -> None:
        self._grace_seconds = grace_seconds
        self._stop_fetching = stop_fetching
        self._list_children = list_children
        self._hurry = threading.Event()
        self._heard = 0

    def listen(self) -> None:
        """From now on the signals come here."""
        for number in STOPS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, _frame: Any) -> None:
        self._heard += 1
        if self._heard == 1:
            self._stop_fetching()
            threading.Thread(target=self._wait_and_hand_over, args=(signal.Signals(number).name,), daemon=True).start()
        if self._heard == 2 or number == signal.SIGQUIT:
            self._hurry.set()
        if self._heard > 2:
            os._exit(1)  # the children's parent-death signal ends them

    def _wait_and_hand_over(self, name: str) -> None:
        log.info("worker_drains", signal=name, grace_seconds=self._grace_seconds)
        hurried = self._hurry.wait(self._grace_seconds)
        children = self._list_children()
        log.warning("jobs_handed_over", because="told again" if hurried else "WORKER_GRACE_SECONDS are over", to=children)
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, HAND_OVER)
        threading.Event().wait(FAREWELL_SECONDS)
        log.warning("worker_ends_by_force", after_seconds=FAREWELL_SECONDS)
        os._exit(0)


def keep_from_children() -> None:
    """Before the children are forked: a child that is not listening yet survives being told."""
    signal.signal(HAND_OVER, signal.SIG_IGN)


def listen_in_child(leaving: Leaving) -> None:
    """In a child, before it takes jobs: it obeys the main process only."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(HAND_OVER, lambda *_: leaving.say())
