"""Waiting, and bounds of time: a promise in seconds holds for a machine that is not overloaded, so tests allow for this one."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PROMISED_SECONDS = 3.0
"""In which the API answers, whatever is down."""

WAIT_SECONDS = 60.0
STEP_SECONDS = 0.05


def allowed(seconds: float) -> float:
    """`seconds`, longer by as much as there is more to do than this machine has processors."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def until(holds: Callable[[], T], seconds: float = WAIT_SECONDS) -> T:
    """Wait until `holds` returns something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"it did not come true within {seconds:g} s"
        time.sleep(STEP_SECONDS)
    return found


async def until_async(holds: Callable[[], T], seconds: float = WAIT_SECONDS) -> T:
    """Wait in an event loop until `holds` returns something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"it did not come true within {seconds:g} s"
        await asyncio.sleep(STEP_SECONDS)
    return found
