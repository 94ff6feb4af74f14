"""The folder on this host that one attempt downloads into."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from pathlib import Path
from types import TracebackType

FOLDER = re.compile(r"[0-9a-f-]{36}-\d+")
LOCK_SUFFIX = ".lock"


class Workspace:
    """`{work_dir}/{task_id}-{fence}`: made empty on entry, gone on exit, whatever happened in between.

    No two attempts ever share one, because no two claims share a fence. Files are numbered, so no name from outside
    becomes a path on this host. A lock beside the folder, which the kernel drops with its process, says that it is in use.
    """

    def __init__(self, work_dir: Path, task_id: str, fence: int) -> None:
        self.path = work_dir / f"{task_id}-{fence}"
        self._lock_path = self.path.with_name(self.path.name + LOCK_SUFFIX)
        self._lock = -1

    def __enter__(self) -> Workspace:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self._lock_path)
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(mode=0o700)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)

    def place(self, number: int) -> Path:
        """Where the file with this number goes."""
        return self.path / f"{number:06d}"


def _take_lock(path: Path) -> int:
    """An open file that holds the lock at `path`, and not one that a sweep has just unlinked."""
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if os.fstat(lock).st_ino == path.stat().st_ino:
                return lock
        except FileNotFoundError:
            pass
        os.close(lock)


def sweep_workspaces(work_dir: Path) -> list[str]:
    """Remove the workspaces whose worker is dead; their names. One in use stays, whoever uses it: another installation
    may share the folder."""
    if not work_dir.is_dir():
        return []
    names = {path.name.removesuffix(LOCK_SUFFIX) for path in work_dir.iterdir()}
    return [name for name in sorted(names) if FOLDER.fullmatch(name) and _remove_unused(work_dir / name)]


def _remove_unused(folder: Path) -> bool:
    lock_path = folder.with_name(folder.name + LOCK_SUFFIX)
    lock = os.open(lock_path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        shutil.rmtree(folder, ignore_errors=True)
        lock_path.unlink(missing_ok=True)
        return True
    finally:
        os.close(lock)
