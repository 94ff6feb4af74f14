"""What is promised in seconds holds for a machine that is not overloaded: tests allow for how far this one is."""

from __future__ import annotations

import os

PROMISED_SECONDS = 3.0
"""In which the API answers, whatever is down."""


def allowed(seconds: float) -> float:
    """`seconds`, longer by as much as there is more to do than this machine has processors."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
