"""Something done now and then beside an attempt, in a thread of its own."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

NEVER = math.inf
Tick = Callable[[], float]
"""Does it; returns in how many seconds it is to be done again (`NEVER`)."""


class Ticker:
    """Ticks from a thread, from `begin` to `end`."""

    def __init__(self, name: str, tick: Tick, first_seconds: float) -> None:
        self._name = name
        self._tick = tick
        self._first_seconds = first_seconds
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start the thread, which ticks after `first_seconds`."""
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def end(self, patience_seconds: float) -> None:
        """Stop ticking. A tick that runs is waited for; a thread that does not come back from it in time is left behind."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(patience_seconds)

    def _run(self) -> None:
        seconds = self._first_seconds
        while not self._ended.wait(None if seconds == NEVER else seconds):
            try:
                seconds = self._tick()
            except Exception:
                log.exception("tick_failed")
                return
