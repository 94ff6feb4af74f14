"""What is done beside an attempt: when it is due, and no longer than the attempt."""

from __future__ import annotations

import itertools
import threading
import time

from ncr_upload.application.ticker import NEVER, Ticker
from patience import allowed

PATIENCE_SECONDS = 5.0


def wait_for(happened: threading.Event) -> None:
    assert happened.wait(10)


def test_it_ticks_as_often_as_it_asks_for_and_not_after_its_end() -> None:
    ticks: list[float] = []
    three = threading.Event()

    def tick() -> float:
        ticks.append(time.monotonic())
        if len(ticks) == 3:
            three.set()
        return 0.02

    ticker = Ticker("often", tick, 0.02)
    ticker.begin()
    wait_for(three)
    ticker.end(PATIENCE_SECONDS)
    count = len(ticks)
    time.sleep(0.1)
    assert len(ticks) == count
    assert all(later - earlier >= 0.02 for earlier, later in itertools.pairwise(ticks))


def test_one_that_ends_before_its_first_tick_never_ticks_and_leaves_no_thread() -> None:
    ticks: list[int] = []
    before = threading.active_count()
    for _ in range(20):
        ticker = Ticker("early", lambda: ticks.append(0) or NEVER, 30)  # type: ignore[func-returns-value]
        ticker.begin()
        ticker.end(PATIENCE_SECONDS)
    assert ticks == []
    assert threading.active_count() == before


def test_the_end_waits_for_a_tick_and_leaves_a_thread_that_does_not_come_back_behind() -> None:
    began, go_on, ticked = threading.Event(), threading.Event(), threading.Event()

    def hang() -> float:
        began.set()
        go_on.wait()
        return 0.01

    hanging = Ticker("hangs", hang, 0)
    hanging.begin()
    wait_for(began)
    at = time.monotonic()
    hanging.end(0.05)
    assert 0.04 <= time.monotonic() - at < allowed(2)
    following = Ticker("hangs", lambda: ticked.set() or NEVER, 0)  # type: ignore[func-returns-value]
    following.begin()
    wait_for(ticked)
    following.end(PATIENCE_SECONDS)
    go_on.set()


def test_a_tick_that_fails_is_the_last_one_and_harms_no_other() -> None:
    failed, ticked = threading.Event(), threading.Event()

    def fail() -> float:
        failed.set()
        raise ValueError("broken")

    failing = Ticker("fails", fail, 0)
    failing.begin()
    wait_for(failed)
    failing.end(PATIENCE_SECONDS)
    following = Ticker("fails", lambda: ticked.set() or NEVER, 0)  # type: ignore[func-returns-value]
    following.begin()
    wait_for(ticked)
    following.end(PATIENCE_SECONDS)
