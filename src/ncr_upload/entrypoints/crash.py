"""Crash points for tests: a real SIGKILL at a named point of the pipeline."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

from ncr_upload.application.pipeline import pass_by


def crash_points(environment: Mapping[str, str]) -> Callable[[str], None]:
    """What to call at each point. With NCR_TESTING=1 and NCR_CRASH_AT=publish:after, the process that reaches that point
    kills itself; with NCR_CRASH_ONCE=FILE too, only if FILE does not exist yet, and it is made. Otherwise nothing."""
    wanted = environment.get("NCR_CRASH_AT")
    if environment.get("NCR_TESTING") != "1" or not wanted:
        return pass_by
    once = environment.get("NCR_CRASH_ONCE")

    def reach(point: str) -> None:
        if point != wanted or (once and Path(once).exists()):
            return
        if once:
            Path(once).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    return reach
