"""The folder on this host that an attempt downloads into, and that waits there for the task's next attempt."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from ncr_upload.application.download_cache import DownloadCache, Entry
from ncr_upload.application.ports import Fetched, ObjectInfo
from ncr_upload.domain.errors import Deferred
from ncr_upload.domain.jobs import TERMINAL, Status

FOLDER = re.compile(r"(?P<task>[0-9a-f-]{36})-(?P<fence>\d+)")
LOCK_SUFFIX = ".lock"
JOURNAL = "journal"
"""In a workspace, beside the downloads: a line for each that is whole."""
CHUNK_BYTES = 1024 * 1024
STRANGER_SECONDS = 3600
"""How long the workspace of a task that this ledger does not know is left alone: it may be another installation's."""
Line = tuple[Fetched, str | None]
"""Of the journal: what was fetched, and the name of the entry it may become."""


class Workspace:
    """`{work_dir}/{task_id}-{fence}`, with what the task's attempt before downloaded on this host, if anything.

    A lock beside the folder, which the kernel drops with its process, says that it is in use. Entering it takes over, by
    one rename, the folder of the newest older fence that is not in use, so no two attempts ever share one. Leaving it keeps
    it: `remove_workspaces` is for the end of the task. A file is named by the hash of its object key, so no name from
    outside becomes a path on this host; once it is whole, a line of the journal says which object it is. Entering raises
    `Deferred` where the folder cannot be made; a full disk is asked again if `make_room` says that it made some.
    """

    def __init__(self, work_dir: Path, task_id: str, fence: int, make_room: Callable[[], bool] = lambda: False) -> None:
        self._make_room = make_room
        self.path = work_dir / f"{task_id}-{fence}"
        self.task_id = task_id
        self._fence = fence
        self._lock = -1
        self._journal: dict[str, Line] = {}

    def __enter__(self) -> Workspace:
        try:
            self._make()
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            if is_full and self._make_room():
                return self.__enter__()
            raise Deferred(
                "disk_full" if is_full else "work_dir_unusable",
                f"this worker cannot make a folder in {self.path.parent}: {error.strerror or error}",
                "Free space on the worker's disk or correct WORK_DIR; the job waits meanwhile.",
            ) from None
        return self

    def _make(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.path)
        try:
            self._take_over()
            self.path.mkdir(mode=0o700, exist_ok=True)
            self._journal = _read_journal(self.path)
        except OSError:
            _drop_lock(self.path, self._lock)
            raise

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):
            os.utime(self.path)  # the oldest are those that have not been used for longest
        _drop_lock(self.path, self._lock)

    def reserve(self, more_bytes: int) -> None:
        """Say that so many bytes are still to come into this workspace (0: none), for `reserved_by_others`."""
        os.pwrite(self._lock, f"{_size_of(self.path) + more_bytes:020d}".encode(), 0)

    def reserved_by_others(self) -> int:
        """Bytes that are still to come into the workspaces in use beside this one. Ask and reserve under `deciding`."""
        return sum(_still_to_come(folder) for folder in _workspaces(self.path.parent) if folder != self.path)

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """One attempt at a time looks at the free disk and reserves its part of it."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def place(self, key: str) -> Path:
        """Where the object with this key goes."""
        return _place(self.path, key)

    def note(self, key: str, fetched: Fetched, entry: Entry | None = None) -> None:
        """Write down what is at the key's place, and which entry of the cache it may become. What is not written, for want of
        disk or time, the next attempt fetches again."""
        name = entry.name if entry else None
        line = json.dumps([key, name, fetched.size, fetched.sha256, fetched.crc32, fetched.etag])
        with suppress(OSError), (self.path / JOURNAL).open("ab", buffering=0) as journal:
            journal.write(f"\n{line}".encode())  # in front, so that one that was cut spoils no other
            self._journal[key] = fetched, name

    def clear_all_but(self, objects: Sequence[ObjectInfo]) -> set[str]:
        """Remove every file that is not, by the journal, one of these objects as they are now; the keys of the others."""
        kept = {found.key for found in objects if self._recorded(found) is not None}
        names = {self.place(key).name for key in kept} | ({JOURNAL} if kept else set())
        for path in self.path.iterdir():
            if path.name not in names:
                path.unlink()
        return kept

    def find(self, wanted: ObjectInfo) -> Fetched | None:
        """What an earlier attempt fetched, if it is this very object and its bytes still have the hashes that were recorded."""
        recorded = self._recorded(wanted)
        return recorded if recorded is not None and self.holds(wanted.key, recorded) else None

    def holds(self, key: str, fetched: Fetched) -> bool:
        """Whether the bytes at the key's place have these hashes."""
        sha256, crc32 = hashlib.sha256(), 0
        with suppress(OSError), self.place(key).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                sha256.update(chunk)
                crc32 = zlib.crc32(chunk, crc32)
        return (sha256.hexdigest(), crc32) == (fetched.sha256, fetched.crc32)

    def forget(self, key: str) -> None:
        """Remove what is at the key's place."""
        self.place(key).unlink(missing_ok=True)

    def _recorded(self, wanted: ObjectInfo) -> Fetched | None:
        """Without an ETag nothing tells an object from another one of its size."""
        fetched, _ = self._journal.get(wanted.key, (None, None))
        if fetched is None or not fetched.etag or (fetched.size, fetched.etag) != (wanted.size, wanted.etag):
            return None
        try:
            return fetched if self.place(wanted.key).stat().st_size == wanted.size else None
        except OSError:
            return None

    def _take_over(self) -> None:
        for folder in sorted(_workspaces(self.path.parent, self.task_id), key=_fence, reverse=True):
            if _fence(folder) < self._fence and (lock := _try_lock(folder)) is not None:
                if self.path.exists():
                    shutil.rmtree(folder, ignore_errors=True)
                else:
                    with suppress(FileNotFoundError):  # only its lock was left
                        folder.rename(self.path)
                _drop_lock(folder, lock)


def remove_workspaces(work_dir: Path, task_id: str, cache: DownloadCache) -> None:
    """Remove what the attempts of an ended task left on this host, but for one in use; the cache takes the downloads."""
    for folder in _workspaces(work_dir, task_id):
        _remove_idle(folder, cache)


def remove_oldest(work_dir: Path, but_of: str) -> Iterator[str]:
    """Remove idle workspaces of other tasks, one a step, the one that has waited longest first; their names."""
    idle = [folder for folder in _workspaces(work_dir) if _task_of(folder) != but_of]
    for folder in sorted(idle, key=_last_used):
        if _remove_idle(folder):
            yield folder.name


def sweep_workspaces(
    work_dir: Path, find_statuses: Callable[[Sequence[str]], Mapping[str, Status]], cache: DownloadCache
) -> list[str]:
    """Remove the idle workspaces of tasks that have ended, and of those that the ledger does not know once they are old, and
    trim the cache, which takes their downloads; the names of the workspaces. One in use stays, whoever uses it: another
    installation may share the folder."""
    folders = _workspaces(work_dir)
    statuses = find_statuses(sorted({_task_of(folder) for folder in folders})) if folders else {}

    def may_go(folder: Path) -> bool:
        if not folder.exists():
            return True
        status = statuses.get(_task_of(folder))
        return status in TERMINAL if status else time.time() - _last_used(folder) > STRANGER_SECONDS

    removed = [folder.name for folder in folders if may_go(folder) and _remove_idle(folder, cache)]
    cache.trim()
    return removed


def _workspaces(work_dir: Path, task_id: str | None = None) -> list[Path]:
    """Every workspace in the folder, of one task or of all; also one of which only the lock is left."""
    try:
        names = {path.name.removesuffix(LOCK_SUFFIX) for path in work_dir.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = (FOLDER.fullmatch(name) for name in sorted(names))
    return [work_dir / each[0] for each in found if each and task_id in (None, each["task"])]


def _still_to_come(folder: Path) -> int:
    """What the attempt that uses the folder has reserved and not yet used; 0 when nobody uses it."""
    lock = _try_lock(folder)
    if lock is not None:
        _drop_lock(folder, lock)
        return 0
    try:
        whole_bytes = int(folder.with_name(folder.name + LOCK_SUFFIX).read_text() or 0)
    except (OSError, ValueError):
        return 0
    return max(0, whole_bytes - _size_of(folder))


def _size_of(folder: Path) -> int:
    total = 0
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
    return total


def _task_of(folder: Path) -> str:
    return folder.name.rpartition("-")[0]


def _fence(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove_idle(folder: Path, cache: DownloadCache | None = None) -> bool:
    if (lock := _try_lock(folder)) is None:
        return False
    if cache is not None:
        cache.adopt(_finished(folder))
    shutil.rmtree(folder, ignore_errors=True)
    _drop_lock(folder, lock)
    return True


def _finished(folder: Path) -> Iterator[tuple[Path, Entry]]:
    """The downloads in a workspace that may become entries of the cache."""
    for key, (_, name) in _read_journal(folder).items():
        entry = Entry.parse(name) if name else None
        if entry is not None:
            yield _place(folder, key), entry


def _read_journal(folder: Path) -> dict[str, Line]:
    """By key, the newest line of each. One that a kill or a full disk has cut is none."""
    journal: dict[str, Line] = {}
    with suppress(OSError):
        for line in (folder / JOURNAL).read_bytes().splitlines():
            with suppress(ValueError, TypeError):
                key, name, *facts = json.loads(line)
                journal[key] = Fetched(*facts), name
    return journal


def _place(folder: Path, key: str) -> Path:
    return folder / hashlib.sha256(key.encode()).hexdigest()


def _take_lock(folder: Path) -> int:
    while (lock := _try_lock(folder, wait=True)) is None:
        pass
    return lock


def _try_lock(folder: Path, wait: bool = False) -> int | None:
    """An open file that holds the folder's lock; None when somebody else has it, has just had it, or keeps us out."""
    path = folder.with_name(folder.name + LOCK_SUFFIX)
    try:
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    except PermissionError:
        if wait:
            raise
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == path.stat().st_ino:  # else its last holder has unlinked it meanwhile
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def _drop_lock(folder: Path, lock: int) -> None:
    folder.with_name(folder.name + LOCK_SUFFIX).unlink(missing_ok=True)
    os.close(lock)
