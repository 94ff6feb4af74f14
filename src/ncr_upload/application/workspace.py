"""The folder on this host that one attempt downloads into."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

FOLDER = re.compile(r"(?P<task_id>[0-9a-f-]{36})-(?P<fence>\d+)")


class Workspace:
    """`{work_dir}/{task_id}-{fence}`: made empty on entry, gone on exit, whatever happened in between.

    No two attempts ever share one, because no two claims share a fence. Files are numbered, so no name from outside
    becomes a path on this host.
    """

    def __init__(self, work_dir: Path, task_id: str, fence: int) -> None:
        self.path = work_dir / f"{task_id}-{fence}"

    def __enter__(self) -> Workspace:
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True, mode=0o700)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def place(self, number: int) -> Path:
        """Where the file with this number goes."""
        return self.path / f"{number:06d}"


def sweep_workspaces(work_dir: Path, live_among: Callable[[list[str]], set[str]]) -> list[Path]:
    """Remove the workspaces that ended tasks left behind (their worker was killed). Returns what was removed.

    A live task's folder stays: its worker may be at work in it.
    """
    if not work_dir.is_dir():
        return []
    found = {path: match["task_id"] for path in work_dir.iterdir() if (match := FOLDER.fullmatch(path.name))}
    if not found:
        return []
    live = live_among(sorted(set(found.values())))
    removed = [path for path, task_id in found.items() if task_id not in live]
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    return removed
