"""Crash points for tests: a real SIGKILL at a named point of the pipeline."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

from ncr_upload.application.crash_points import Reach, pass_by


def crash_points(environment: Mapping[str, str]) -> Reach:
    """What to call at each point. With NCR_TESTING=1 and NCR_CRASH_AT=publish:after, the process that reaches that point
    kills itself, every time; with NCR_CRASH_AT=@FILE, at the point the file names, once: the file goes first."""
    wanted = environment.get("NCR_CRASH_AT")
    if environment.get("NCR_TESTING") != "1" or not wanted:
        return pass_by

    def reach(point: str) -> None:
        if wanted == point or (wanted.startswith("@") and _take(Path(wanted[1:]), point)):
            os.kill(os.getpid(), signal.SIGKILL)

    return reach


def _take(order: Path, point: str) -> bool:
    if not order.exists() or order.read_text().strip() != point:
        return False
    order.unlink()
    return True
