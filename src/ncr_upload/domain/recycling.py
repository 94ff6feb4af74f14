"""When a worker child has grown too large to go on."""

from __future__ import annotations

GROWTH = 1.5
"""More than a child gains from its first package on: the first thing it did may have been a ring for nothing."""


def must_recycle(first_kb: int, now_kb: int, limit_kb: int) -> bool:
    """Whether a child that held `first_kb` after its first job, and holds `now_kb` now, is to make way for a new one.

    A child that is above the limit from its first job on would be no smaller as a new one: it is replaced only once it has
    grown by half, so that a limit set too low never replaces every child after every job.
    """
    return now_kb > (limit_kb if first_kb <= limit_kb else first_kb * GROWTH)
