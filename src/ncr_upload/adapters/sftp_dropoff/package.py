"""Staging the files of one package as they become known: kept, continued or sent, then verified as a whole."""

from __future__ import annotations

import asyncio
import heapq
import posixpath
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from ncr_upload.adapters.sftp_dropoff.manifest import Manifest
from ncr_upload.adapters.sftp_dropoff.remote import Remote, Tree
from ncr_upload.adapters.sftp_dropoff.upload import upload_part
from ncr_upload.application.ports import LocalFile, OnBytes, Staged
from ncr_upload.domain.errors import Rejected, Unavailable

STAGING = ".ncr-staging"
FILES_PER_CHANNEL = 2


@dataclass(frozen=True, slots=True)
class _Part:
    """A file on its way, and how many bytes of it an earlier attempt has left there; None if it left nothing."""

    local: LocalFile
    path: str
    bytes: int | None


class _Queue:
    """Files that wait to be sent, the largest first, so that no channel is left alone with a large one at the end."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, _Part]] = []
        self._added = 0
        self._closed = False
        self._changed = asyncio.Condition()

    async def put(self, part: _Part) -> None:
        self._added += 1
        heapq.heappush(self._heap, (-part.local.file.size, self._added, part))
        async with self._changed:
            self._changed.notify()

    async def close(self) -> None:
        self._closed = True
        async with self._changed:
            self._changed.notify_all()

    async def wait(self) -> None:
        """Until something waits, or nothing will any more."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._heap or self._closed)

    async def take(self) -> _Part | None:
        """None once nothing waits and nothing will."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._heap or self._closed)
            return heapq.heappop(self._heap)[2] if self._heap else None


class StagedPackage:
    """What is staged, and how it becomes the package that is wanted. `channel_at` opens the channel of a number; one that
    is refused is done without, but for number 0, which must be there."""

    def __init__(self, channel_at: Callable[[int], Awaitable[Remote]], channels: int, own: str, on_bytes: OnBytes) -> None:
        self._channel_at = channel_at
        self._channels = channels
        self._own = own
        self._package = posixpath.join(own, "package")
        self._on_bytes = on_bytes
        self._wanted: dict[str, LocalFile] = {}
        self._there = Tree({}, [])
        self._parts: dict[str, int] = {}
        self._copies = Counter[str]()
        self._made: set[str] = set()
        self._making: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._queue = _Queue()
        self._kept_files = 0
        self._kept_bytes = 0

    async def stage(self, files: AsyncIterator[LocalFile]) -> Staged:
        """The first failure, of a file's arrival too, stops the rest and is raised."""
        self._remote = await self._channel_at(0)
        await self._look()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._receive(files, group))
                for number in range(self._channels):
                    group.create_task(self._use_channel(number, group))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        await self._verify()
        return Staged(self._kept_files, self._kept_bytes)

    async def _look(self) -> None:
        """What an earlier attempt has left."""
        self._there = await self._remote.tree(self._package)
        self._made = {"", *self._there.folders}
        self._manifest = await Manifest.read(self._remote, self._own)
        parts = await self._remote.entries(posixpath.join(self._own, "parts"))
        self._parts = {name: attrs.size or 0 for name, attrs in parts.items()}

    # --- what is wanted -----------------------------------------------------------------------------------------

    async def _receive(self, files: AsyncIterator[LocalFile], group: asyncio.TaskGroup) -> None:
        async for local in files:
            target = local.file.target
            check_relative(target)
            self._wanted[target] = local
            if self._is_whole(local):
                del self._there.files[target]
                self._kept_files += 1
                self._kept_bytes += local.file.size
                self._on_bytes(local.file.size)
                continue
            await self._remove_obstacles(target)
            self._manifest.note(target, local.file.sha256)
            group.create_task(self._make_folder(posixpath.dirname(target)))
            await self._queue.put(self._part_of(local))
        group.create_task(self._manifest.complete())
        await self._queue.close()
        await self._remove_unwanted()

    def _is_whole(self, local: LocalFile) -> bool:
        target = local.file.target
        return self._there.files.get(target) == local.file.size and self._manifest.sha256(target) == local.file.sha256

    async def _remove_obstacles(self, target: str) -> None:
        """What an earlier attempt staged at this place, or a file where a folder is needed, or a folder where the file is."""
        places = [target, *_parents(target)]
        below = target + "/"
        files = [path for path in places if path in self._there.files]
        folders = []
        if target in self._there.folders:
            files += [path for path in self._there.files if path.startswith(below)]
            folders = [path for path in self._there.folders if path == target or path.startswith(below)]
        await self._remove(files, folders)

    async def _remove_unwanted(self) -> None:
        needed = {folder for target in self._wanted for folder in _parents(target)}
        await self._remove(list(self._there.files), [path for path in self._there.folders if path not in needed])
        folder = posixpath.join(self._own, "parts")
        await self._remote.remove_files(posixpath.join(folder, name) for name in self._parts)

    async def _remove(self, files: list[str], folders: list[str]) -> None:
        await self._remote.remove_files(posixpath.join(self._package, path) for path in files)
        await self._remote.remove_folders(posixpath.join(self._package, path) for path in folders)
        for path in files:
            del self._there.files[path]
        for path in folders:
            self._there.folders.remove(path)
            self._made.discard(path)

    def _part_of(self, local: LocalFile) -> _Part:
        """Which of several files with the same content takes which of their parts makes no difference."""
        sha256 = local.file.sha256
        copy = self._copies[sha256]
        self._copies[sha256] += 1
        name = f"{sha256}-{copy}" if copy else sha256
        return _Part(local, posixpath.join(self._own, "parts", name), self._parts.pop(name, None))

    # --- on the way ---------------------------------------------------------------------------------------------

    async def _use_channel(self, number: int, group: asyncio.TaskGroup) -> None:
        """Open the channel once there is more to send than the others have taken."""
        await self._queue.wait()
        try:
            remote = await self._channel_at(number)
        except Unavailable:
            if number == 0:
                raise
            return
        for _ in range(FILES_PER_CHANNEL):
            group.create_task(self._send(remote))

    async def _send(self, remote: Remote) -> None:
        while part := await self._queue.take():
            kept_bytes = await upload_part(remote, part.path, part.bytes, part.local, self._on_bytes)
            self._kept_bytes += kept_bytes
            await self._place(part)

    async def _place(self, part: _Part) -> None:
        target = part.local.file.target
        await self._manifest.cover(target)
        await self._make_folder(posixpath.dirname(target))
        await self._remote.rename(part.path, posixpath.join(self._package, target))

    async def _make_folder(self, folder: str) -> None:
        """`package` itself must be there: a stale attempt must not bring its taken folder back to life."""
        if folder in self._made:
            return
        await self._make_folder(posixpath.dirname(folder))
        async with self._making[folder]:
            if folder not in self._made:
                await self._remote.make_folder(posixpath.join(self._package, folder))
                self._made.add(folder)

    async def _verify(self) -> None:
        """Every size; nothing else is there."""
        found = (await self._remote.tree(self._package)).files
        wanted = {target: local.file.size for target, local in self._wanted.items()}
        differing = sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
        if differing:
            first = differing[0]
            raise Unavailable(
                "staged_differs",
                f"{self._remote.address}: {first} (of {len(differing)} such) was staged with "
                f"{found.get(first)} bytes, not {wanted.get(first)}",
                "It is uploaded again.",
            )


def _parents(target: str) -> list[str]:
    """Every folder the target is in."""
    folders = []
    while target := posixpath.dirname(target):
        folders.append(target)
    return folders


def check_relative(path: str, one_segment: bool = False) -> None:
    """The domain has refused such paths already; this is the last gate before the partner's disk."""
    segments = path.split("/")
    if any(segment in ("", ".", "..", STAGING) for segment in segments) or "\0" in path or (one_segment and len(segments) > 1):
        raise Rejected(
            "path_refused", f"{path!r} is no place for a delivery", "Correct the job's files or id, then submit again."
        )
