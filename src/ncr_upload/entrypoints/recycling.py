"""Replaces worker children by what they hold now.

billiard compares the *peak* of a child's memory with CELERY_WORKER_MAX_MEMORY_PER_CHILD (`billiard.compat.mem_rss`, from
getrusage): after one large moment every later job would look too large. It asks after each job, in the child.
"""

from __future__ import annotations

import os

import billiard.pool
import psutil
import structlog

from ncr_upload.domain.recycling import must_recycle

log = structlog.get_logger("ncr.worker")
SMALL_KB = 1


class ChildSize:
    """Stands in for `mem_rss` in one child: KB to be compared with `limit_kb`, which the answer passes only if the child
    is to be replaced."""

    def __init__(self, limit_kb: int) -> None:
        self._limit_kb = limit_kb
        self._first_kb: dict[int, int] = {}
        self._process = psutil.Process()

    def __call__(self) -> int:
        if self._process.pid != os.getpid():  # forked since
            self._process = psutil.Process()
        process = self._process
        now_kb = int(process.memory_info().rss // 1024)
        if process.pid not in self._first_kb:
            self._first_kb = {process.pid: now_kb}
            if now_kb > self._limit_kb:
                log.warning("memory_per_child_too_low", limit_kb=self._limit_kb, held_after_first_job_kb=now_kb)
        first_kb = self._first_kb[process.pid]
        return now_kb if must_recycle(first_kb, now_kb, self._limit_kb) else SMALL_KB


def recycle_by_current_size(limit_kb: int) -> None:
    """From now on, in the children that this process forks."""
    billiard.pool.mem_rss = ChildSize(limit_kb)
