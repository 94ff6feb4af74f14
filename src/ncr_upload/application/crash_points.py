"""The named places of an attempt where a test may kill its process; in production nothing happens there."""

from __future__ import annotations

from collections.abc import Callable

Reach = Callable[[str], None]
"""Told each point by its name as the attempt gets there."""

CRASH_POINTS = (
    "claim:before",
    "claim:after",
    "lookup:before",
    "lookup:after",
    "download:before",
    "zip:before",
    "download:after",
    "validate:before",
    "zip:after",
    "validate:after",
    "stage:before",
    "stage:after",
    "publish:before",
    "publish:between",
    "publish:after",
    "record:before",
    "record:after",
    "cleanup:before",
    "cleanup:after",
)
"""In the order in which an attempt gets there. `publish:between` is where the previous delivery has been renamed aside and
the package has not yet its name: only a job that had been delivered before gets there."""


def pass_by(_point: str) -> None:
    """What production does at each point."""
