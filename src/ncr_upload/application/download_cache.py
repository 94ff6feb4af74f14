"""Finished downloads that outlive their task on this host, so that what is delivered again is not fetched again (ADR 8)."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ncr_upload.application.ports import Fetched, Host, ObjectInfo
from ncr_upload.domain.errors import Unavailable

FOLDER = ".downloads"
"""Below WORK_DIR."""

MAX_ENTRIES = 10_000
DOTS = 5
"""In an entry's name."""

LEFT_AFTER_TRIM = 0.9
"""Of what is allowed: so that a full cache is not sorted for every job."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the cache. All that is known of it is its name: which object it is, what its hashes were when it arrived, and
    by which inode and time of writing the file shows that nobody has touched it since."""

    ident: str
    size: int
    sha256: str
    crc32: int
    inode: int
    mtime_ns: int

    @property
    def name(self) -> str:
        return f"{self.ident}.{self.size}.{self.sha256}.{self.crc32:08x}.{self.inode:x}.{self.mtime_ns:x}"

    @classmethod
    def parse(cls, name: str) -> Entry | None:
        """None for what is no entry's name."""
        try:
            ident, size, sha256, crc32, inode, mtime_ns = name.split(".")
            entry = cls(ident, int(size), sha256, int(crc32, 16), int(inode, 16), int(mtime_ns, 16))
        except (ValueError, AttributeError):
            return None
        return entry if entry.name == name else None

    def is_untouched(self, file: os.stat_result) -> bool:
        return (file.st_size, file.st_ino, file.st_mtime_ns) == (self.size, self.inode, self.mtime_ns)


def describe(source: str, key: str, fetched: Fetched, path: Path) -> Entry | None:
    """The entry that the object just fetched to `path` would be. `source` names the bucket. None where nothing would tell it
    from another object of its size."""
    if not _tells_apart(fetched.etag):
        return None
    try:
        file = path.stat()
    except OSError:
        return None
    ident = _identify(source, ObjectInfo(key, fetched.size, fetched.etag))
    return Entry(ident, fetched.size, fetched.sha256, fetched.crc32, file.st_ino, file.st_mtime_ns)


class DownloadCache:
    """`{work_dir}/.downloads`: files only, each named by its `Entry`, the least recently used first to go.

    A file enters by one rename, is used by one more hard link to it and goes by one unlink, so there are no locks, no process
    can be killed half way, and several may do anything at once. One that another hard link shows to be in use stays.
    Of what goes wrong in here only the gain is lost: nothing raises.
    """

    def __init__(self, work_dir: Path, limit_bytes: int, host: Host) -> None:
        self.folder = work_dir / FOLDER
        self._limit_bytes = limit_bytes
        self._host = host

    def take(self, source: str, objects: Sequence[tuple[ObjectInfo, Path]]) -> dict[str, Fetched]:
        """Link each of the objects that is here to its place; by key, what was put there. None may be written into."""
        names = {_ident_of(name): name for name in self._names()} if self._limit_bytes else {}
        taken = {}
        for found, place in objects if names else ():
            entry = Entry.parse(names.get(_identify(source, found), ""))
            if entry is not None and self._link(entry, place):
                taken[found.key] = Fetched(entry.size, entry.sha256, entry.crc32, found.etag)
        return taken

    def adopt(self, files: Iterable[tuple[Path, Entry]]) -> None:
        """Move finished downloads in here, but for those that were touched since and those that are here already."""
        new = list(files) if self._limit_bytes else []
        if not new:
            return
        with suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = {_ident_of(name) for name in self._names()}
        for path, entry in new:
            with suppress(OSError):
                if entry.ident not in known and entry.is_untouched(path.stat()):
                    path.chmod(0o400)
                    self._mark_used(path, entry)
                    path.rename(self.folder / entry.name)
        self.trim()

    def remove(self, source: str, found: ObjectInfo) -> None:
        """Whatever is here of that object."""
        ident = _identify(source, found)
        for name in self._names():
            if _ident_of(name) == ident:
                self._unlink(name)

    def trim(self) -> list[str]:
        """Remove the least recently used until the rest is within the limit, leaves at least as much of the disk free as it
        takes, and is not too many; their names."""
        names = self._names()
        held, count = _size_of(names), len(names)
        if not names:
            return []
        allowed, allowed_count = self._allow(held, count)
        if held <= allowed and count <= allowed_count:
            return []
        removed = []
        for entry in self._oldest():
            if held <= allowed * LEFT_AFTER_TRIM and count <= allowed_count * LEFT_AFTER_TRIM:
                break
            held, count = held - entry.size, count - 1
            self._unlink(entry.name)
            removed.append(entry.name)
        return removed

    def make_room(self) -> Iterator[str]:
        """Remove one a step, the least recently used first; their names."""
        for entry in self._oldest():
            self._unlink(entry.name)
            yield entry.name

    def clear(self) -> bool:
        """Remove all that nobody uses; whether there was anything."""
        return len(list(self.make_room())) > 0

    def held_bytes(self) -> int:
        """So much of the disk is free as soon as somebody needs it, but for what running jobs use."""
        return _size_of(self._names())

    def forget_pages(self) -> None:
        """Let the kernel drop what it keeps of these files in memory: read twice, it counts as used until memory is short. What
        is not on the disk yet begins to be written, and is dropped the next time."""
        for entry in self._oldest():
            with suppress(OSError):
                file = os.open(self.folder / entry.name, os.O_RDONLY)
                try:
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(file)

    def __str__(self) -> str:
        names = self._names()
        return f"{len(names)} downloads kept, {_size_of(names) / 1e9:.1f} of {self._limit_bytes / 1e9:g} GB"

    def _link(self, entry: Entry, place: Path) -> bool:
        path = self.folder / entry.name
        try:
            os.link(path, place)
        except OSError:  # gone meanwhile, or a file system without hard links
            return False
        with suppress(OSError):
            if entry.is_untouched(place.stat()):
                self._mark_used(place, entry)
                return True
        place.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        return False

    def _mark_used(self, path: Path, entry: Entry) -> None:
        """By the time of reading, which nothing else is read from."""
        os.utime(path, ns=(time.time_ns(), entry.mtime_ns))

    def _allow(self, held: int, count: int) -> tuple[int, int]:
        """How many bytes and files."""
        try:
            free_bytes, free_files = self._host.free_disk(self.folder), os.statvfs(self.folder)
        except (Unavailable, OSError):
            return self._limit_bytes, MAX_ENTRIES
        files = (free_files.f_favail + count) // 2 if free_files.f_files else MAX_ENTRIES
        return min(self._limit_bytes, (free_bytes + held) // 2), min(MAX_ENTRIES, files)

    def _names(self) -> list[str]:
        """Of the entries."""
        try:
            with os.scandir(self.folder) as found:
                return [each.name for each in found if each.name.count(".") == DOTS]
        except OSError:
            return []

    def _oldest(self) -> list[Entry]:
        """Those that nobody uses, the least recently used first."""
        idle = []
        for entry in map(Entry.parse, self._names()):
            if entry is not None:
                with suppress(OSError):
                    file = (self.folder / entry.name).stat()
                    if file.st_nlink == 1:
                        idle.append((file.st_atime_ns, entry.name, entry))
        return [entry for _, _, entry in sorted(idle, key=lambda each: each[:2])]

    def _unlink(self, name: str) -> None:
        with suppress(OSError):
            (self.folder / name).unlink()


def _identify(source: str, found: ObjectInfo) -> str:
    if not _tells_apart(found.etag):
        return ""
    return hashlib.blake2b(json.dumps([source, found.key, found.size, found.etag]).encode(), digest_size=16).hexdigest()


def _ident_of(name: str) -> str:
    return name.partition(".")[0]


def _size_of(names: Sequence[str]) -> int:
    """Of whole entries, by their names alone: there may be thousands."""
    return sum(int(size) for _, size, _ in (name.split(".", 2) for name in names) if size.isdecimal())


def _tells_apart(etag: str) -> bool:
    """A weak one stands for objects that are as good as each other, not for the same bytes."""
    return bool(etag) and not etag.startswith("w/")
