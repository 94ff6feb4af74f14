"""Keeps listing the destination as the partner would, and notes whatever is neither absent nor whole.

Over the local folder, many times a second, and over a real SFTP login, about once a second. A listing counts only if the
final folder was the same one (by inode) before and after it: while a re-delivery is renamed into place a listing may begin
in the old delivery and end in the new one. Between the two renames of a re-delivery the final name is absent for a moment;
absent is allowed, partial never is.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import asyncssh

PAUSE_SECONDS = 0.01
SFTP_PAUSE_SECONDS = 0.7
LOGIN_SECONDS = 30
SETTLED_EVERY = 100
"""Passes."""

SIGHTINGS_KEPT = 3
PASSES_LOST = 25
"""A file that is moved may be missed by one pass, which lists one folder after another; one that is gone, by every one."""

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Sighting:
    """A final folder that held no version of its job."""

    job_id: str
    by: str
    at: float
    found: Sizes
    nearest: str


class Observer:
    """`root` is the destination on this disk. Jobs are watched from `watch` on; `look` is one pass over them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._allowed: dict[str, list[Sizes]] = {}
        self._published: dict[str, list[int]] = {}
        self._settled: set[str] = set()
        self._passes = 0
        self._lock = threading.Lock()
        self._whole: dict[str, int] = {}
        self._missed: dict[str, int] = {}
        self.lost: dict[str, list[str]] = {}
        self.partial: list[Sighting] = []
        self.listings = {"local": 0, "sftp": 0}

    def watch(self, job_id: str, sizes: Sizes) -> None:
        """From now on the job's folder may hold this (besides what it might hold before)."""
        with self._lock:
            self._allowed.setdefault(job_id, []).append(dict(sizes))
            self._published.setdefault(job_id, [])

    def settle(self, job_id: str) -> None:
        """Its trial is over: nothing should happen to it any more, so it is looked at now and then."""
        with self._lock:
            self._settled.add(job_id)

    def published(self, job_id: str) -> int:
        """How many different folders were seen under the final name."""
        return len(self._published.get(job_id, []))

    def look(self) -> None:
        self._passes += 1
        for job_id in self.jobs(settled=self._passes % SETTLED_EVERY == 0):
            found = read_folder(self._root / job_id)
            if found is not None:
                self.listings["local"] += 1
                self._note_folder(job_id, found[0])
                self.check(job_id, found[1], "local")
            self.keep(job_id, found[1] if found is not None else {})

    def jobs(self, *, settled: bool) -> list[str]:
        with self._lock:
            return [job_id for job_id in self._allowed if settled or job_id not in self._settled]

    def inode(self, job_id: str) -> int | None:
        return _inode(self._root / job_id)

    def check(self, job_id: str, found: Sizes, by: str) -> None:
        with self._lock:
            allowed = self._allowed.get(job_id)
            if allowed is None or any(found == version for version in allowed):
                return
            if sum(sighting.job_id == job_id for sighting in self.partial) < SIGHTINGS_KEPT:
                self.partial.append(Sighting(job_id, by, time.time(), dict(found), _differences(found, allowed)))

    def keep(self, job_id: str, final: Sizes) -> None:
        """Once a version was whole under the final name, every file of it is there or set aside, until a later one is whole."""
        with self._lock:
            allowed, whole = self._allowed[job_id], self._whole.get(job_id)
        seen = max((number for number, version in enumerate(allowed) if version and final == version), default=-1)
        if whole is not None and seen < whole:
            there = [final, *read_set_aside(self._root, job_id)]
            gone = [path for path, size in allowed[whole].items() if not any(each.get(path) == size for each in there)]
            self._missed[job_id] = self._missed.get(job_id, 0) + 1 if gone else 0
            if self._missed[job_id] == PASSES_LOST:
                told = f"version {whole + 1} was whole, {len(gone)} files of it are nowhere, such as {gone[0]}"
                self.lost.setdefault(job_id, []).append(f"{told}; no later version has been seen whole")
        else:
            self._missed[job_id] = 0
            if seen >= 0:
                self._whole[job_id] = seen

    def _note_folder(self, job_id: str, inode: int) -> None:
        seen = self._published.setdefault(job_id, [])
        if inode not in seen:
            seen.append(inode)


def read_folder(folder: Path) -> tuple[int, dict[str, int]] | None:
    """Inode and every file's size; None where there is no such folder, or no longer the same one after the reading.

    What is read is the folder that had the name at first, wherever it is renamed to meanwhile."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        inode = os.fstat(handle).st_ino
        found = {}
        for place, _, names, at in os.fwalk(".", dir_fd=handle):
            for name in names:
                found[os.path.normpath(f"{place}/{name}")] = os.stat(name, dir_fd=at, follow_symlinks=False).st_size
    except FileNotFoundError:
        return None
    finally:
        os.close(handle)
    return (inode, found) if _inode(folder) == inode else None


def read_set_aside(root: Path, job_id: str) -> list[dict[str, int]]:
    """Every file's size in each folder that a staging folder has set aside for the job."""
    found = []
    for folder in root.glob(f".ncr-staging/*/previous/{job_id}"):
        there = {}
        for place, _, names in os.walk(folder):
            for name in names:
                with suppress(FileNotFoundError):
                    there[os.path.relpath(f"{place}/{name}", folder)] = os.lstat(f"{place}/{name}").st_size
        found.append(there)
    return found


def _inode(folder: Path) -> int | None:
    try:
        return folder.stat().st_ino
    except FileNotFoundError:
        return None


def _differences(found: Sizes, allowed: list[Sizes]) -> str:
    """How it differs from the version it resembles most."""

    def wrong(version: Sizes) -> list[str]:
        return sorted(path for path in found.keys() | version.keys() if found.get(path) != version.get(path))

    nearest = min((wrong(version) for version in allowed), key=len, default=[])
    return f"{len(found)} files, {len(nearest)} not as in the nearest version: {', '.join(nearest[:3])}"


class Watching:
    """Runs an observer's passes in threads until the block ends."""

    def __init__(self, observer: Observer, address: tuple[str, int], root: str, **login: object) -> None:
        self._observer = observer
        self._address = address
        self._sftp_root = root
        self._login = login
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._look_locally, daemon=True),
            threading.Thread(target=lambda: asyncio.run(self._look_by_sftp()), daemon=True),
        ]

    def __enter__(self) -> Watching:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(20)

    def _look_locally(self) -> None:
        while not self._stop.wait(PAUSE_SECONDS):
            self._observer.look()

    async def _look_by_sftp(self) -> None:
        """Logs in again whenever the connection is lost, as it is when the server is killed."""
        while not self._stop.is_set():
            try:
                await asyncio.wait_for(self._look_over_one_login(), LOGIN_SECONDS)
            except (OSError, asyncssh.Error, TimeoutError):
                await asyncio.sleep(0.2)

    async def _look_over_one_login(self) -> None:
        host, port = self._address
        async with (
            asyncssh.connect(host, port, **self._login) as connection,  # type: ignore[arg-type]
            connection.start_sftp_client() as sftp,
        ):
            while not self._stop.is_set():
                await self._look_once(sftp)
                await asyncio.sleep(SFTP_PAUSE_SECONDS)

    async def _look_once(self, sftp: asyncssh.SFTPClient) -> None:
        for job_id in self._observer.jobs(settled=False):
            before = self._observer.inode(job_id)
            try:
                found = await _list(sftp, f"{self._sftp_root}/{job_id}", "")
            except asyncssh.SFTPNoSuchFile:
                continue
            if before is not None and self._observer.inode(job_id) == before:
                self._observer.listings["sftp"] += 1
                self._observer.check(job_id, found, "sftp")


async def _list(sftp: asyncssh.SFTPClient, folder: str, below: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in await sftp.readdir(f"{folder}/{below}"):
        name = str(entry.filename)
        if name in (".", ".."):
            continue
        path = f"{below}/{name}" if below else name
        if entry.attrs.type == asyncssh.FILEXFER_TYPE_DIRECTORY:
            found |= await _list(sftp, folder, path)
        else:
            found[path] = entry.attrs.size or 0
    return found
