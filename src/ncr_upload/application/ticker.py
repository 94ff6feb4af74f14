"""What is to be done beside an attempt now and then, in a thread that stays for the next attempt."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from functools import lru_cache

log = logging.getLogger(__name__)

NEVER = math.inf
Tick = Callable[[], float]
"""Does it; answers in how many seconds it is to be done again (`NEVER`)."""


class Ticker:
    """Ticks from a thread, from `begin` to `end`. Neither wakes the thread unless it sleeps for too long: an attempt that has
    ended before its first tick costs no turn of another thread."""

    def __init__(self, name: str, tick: Tick, first_seconds: float) -> None:
        self._name = name
        self._tick = tick
        self._first_seconds = first_seconds
        self._thread: _Thread | None = None

    def begin(self) -> None:
        spare = _spare_threads(self._name, os.getpid())
        self._thread = spare.pop() if spare else _Thread(self._name)
        self._thread.begin(self._tick, self._first_seconds)

    def end(self, patience_seconds: float) -> None:
        """No tick begins any more; one that runs is waited for. A thread that does not come back from it is left behind."""
        thread, self._thread = self._thread, None
        if thread is not None and thread.end(patience_seconds):
            _spare_threads(self._name, os.getpid()).append(thread)


@lru_cache(maxsize=16)
def _spare_threads(_name: str, _process: int) -> list[_Thread]:
    """A list's `pop` and `append` need no lock."""
    return []


class _Thread:
    """Sleeps until what it was given is due."""

    def __init__(self, name: str) -> None:
        self._told = threading.Condition()
        self._tick: Tick | None = None
        self._due_at = NEVER
        self._sleeps_until = NEVER
        self._ticks = False
        self._left_behind = False
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def begin(self, tick: Tick, seconds: float) -> None:
        with self._told:
            self._tick, self._due_at = tick, time.monotonic() + seconds
            if self._due_at < self._sleeps_until:
                self._told.notify_all()

    def end(self, patience_seconds: float) -> bool:
        """Whether it is at rest again."""
        with self._told:
            self._tick, self._due_at = None, NEVER
            self._left_behind = not self._told.wait_for(lambda: not self._ticks, patience_seconds)
            return not self._left_behind

    def _run(self) -> None:
        with self._told:
            while not self._left_behind:
                seconds = self._due_at - time.monotonic()
                if self._tick is not None and seconds <= 0:
                    self._run_tick(self._tick)
                else:
                    self._sleeps_until = self._due_at
                    self._told.wait(None if self._due_at == NEVER else seconds)

    def _run_tick(self, tick: Tick) -> None:
        """Unlocks meanwhile: the attempt is not to wait for it."""
        self._ticks = True
        self._told.release()
        seconds = NEVER
        try:
            seconds = tick()
        except Exception:
            log.exception("tick_failed")
        finally:
            self._told.acquire()
            self._ticks = False
            if self._tick is tick:
                self._due_at = time.monotonic() + seconds
            self._told.notify_all()
