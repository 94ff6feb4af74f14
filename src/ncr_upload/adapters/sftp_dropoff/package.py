"""Staging the files of one package as they become known: kept, continued or sent, then verified as a whole."""

from __future__ import annotations

import asyncio
import heapq
import posixpath
from collections import Counter, defaultdict
from collections.abc import AsyncIterator

from ncr_upload.adapters.sftp_dropoff.channels import Channels, Place
from ncr_upload.adapters.sftp_dropoff.links import Links, settle_times
from ncr_upload.adapters.sftp_dropoff.manifest import Entry, Manifest
from ncr_upload.adapters.sftp_dropoff.remote import Failed, Tree
from ncr_upload.adapters.sftp_dropoff.track import ALL_BYTES, LINK_BYTES, Flow, Signal, Track
from ncr_upload.adapters.sftp_dropoff.upload import SPLIT_BYTES, WIDE_WINDOW_BYTES, WINDOW_BYTES, Part, Upload
from ncr_upload.application.ports import LocalFile, OnBytes, Staged
from ncr_upload.domain.errors import Rejected, Unavailable

STAGING = ".ncr-staging"
WIDE = ".wide"
"""Ends the names of parts that are written with the wide window."""
BYTES_PER_CONNECTION = 8 * 1024 * 1024
"""So much must wait for a further connection to be worth its round trips."""

FAR_SECONDS = 0.004
"""A server that takes less to answer is near: one connection to it goes as fast as this process can encrypt."""


class _Queue:
    """Uploads that wait for a track, the largest first, so that none is left alone with a large one at the end."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Upload]] = []
        self._added = 0
        self._closed = False
        self._changed = Signal()
        self.bytes = 0

    def put(self, upload: Upload) -> None:
        self._added += 1
        heapq.heappush(self._heap, (-upload.size, self._added, upload))
        self.bytes += upload.size
        self._changed.fire()

    def close(self) -> None:
        self._closed = True
        self._changed.fire()

    async def take(self) -> Upload | None:
        """None once nothing waits and nothing will. A wide one stays until all of it is sent, for others to take too."""
        while True:
            if not self._heap:
                if self._closed:
                    return None
                await self._changed.wait()
            elif (upload := self._heap[0][2]).is_wide and not upload.is_sent:
                return upload
            else:
                heapq.heappop(self._heap)
                self.bytes -= upload.size
                if not upload.is_wide:
                    return upload


class StagedPackage:
    """What is staged, and how it becomes the package that is wanted."""

    def __init__(self, channels: Channels, own: str, links: Links, on_bytes: OnBytes) -> None:
        self._previous = links
        self._channels = channels
        self._remote = channels.first
        self._own = own
        self._package = posixpath.join(own, "package")
        self._on_bytes = on_bytes
        self._wanted: dict[str, LocalFile] = {}
        self._left: set[str] = set()
        self._there = Tree({}, [])
        self._parts: dict[str, int] = {}
        self._copies = Counter[str]()
        self._made: set[str] = {""}
        self._making: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._manifest = Manifest(self._remote, own, {})
        self._queue = _Queue()
        self._tracks: set[Place] = set()
        self._uploads: list[Upload] = []
        self._flow = Flow(ALL_BYTES)
        self._links: defaultdict[int, Flow] = defaultdict(lambda: Flow(LINK_BYTES))
        self._started = False
        self._kept_files = 0
        self._kept_bytes = 0
        self._linked_files = 0
        self._linked_bytes = 0

    async def stage(self, files: AsyncIterator[LocalFile], fresh: bool) -> Staged:
        """The first failure, of a file's arrival too, stops the rest and is raised. Nothing is there yet when it is `fresh`."""
        _, self._left = await asyncio.gather(self._previous.look(), self._look(fresh))
        try:
            async with asyncio.TaskGroup() as group:
                receiving = group.create_task(self._receive(files, group))
                group.create_task(self._start_tracks(group, receiving))
                if fresh:
                    group.create_task(self._look_beside())
        except ExceptionGroup as failures:
            raise self._choose(failures) from None
        finally:
            for upload in self._uploads:
                upload.close()
        times = await settle_times(self._remote, self._package, await self._verify(), self._manifest.linked())
        return Staged(self._kept_files, self._kept_bytes, self._linked_files, self._linked_bytes, times)

    def _choose(self, failures: ExceptionGroup[Exception]) -> Exception:
        """The first one; of all that a lost connection has failed, the one that names a file of the package."""
        first = _first(failures)
        of_file = next((upload.failure for upload in self._uploads if upload.failure is not None), None)
        return of_file if of_file is not None and isinstance(first, Unavailable) else first

    async def _look_beside(self) -> None:
        """For what somebody else may have put into a folder that was made a moment ago."""
        self._left = set(await self._remote.entries(self._package))

    async def _look(self, fresh: bool) -> set[str]:
        """What an earlier attempt has left."""
        if fresh:
            return set()
        self._there, self._manifest, parts = await asyncio.gather(
            self._remote.tree(self._package),
            Manifest.read(self._remote, self._own),
            self._remote.entries(posixpath.join(self._own, "parts")),
        )
        self._made = {"", *self._there.folders}
        self._parts = {name: attrs.size or 0 for name, attrs in parts.items()}
        return set(self._there.files)

    # --- what is wanted -----------------------------------------------------------------------------------------

    async def _receive(self, files: AsyncIterator[LocalFile], group: asyncio.TaskGroup) -> None:
        linking = []
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
            group.create_task(self._make_folder(posixpath.dirname(target)))
            source = self._previous.find(local.file)
            if source is not None:
                self._manifest.note(target, Entry(local.file.sha256, source[1]))
                linking.append(group.create_task(self._link(local, source[0], group)))
            else:
                self._send_later(local, group)
        group.create_task(self._manifest.complete())
        await asyncio.gather(*linking)
        self._queue.close()
        parts = [posixpath.join(self._own, "parts", name) for name in self._parts]
        group.create_task(self._remote.remove_files(parts))

    def _is_whole(self, local: LocalFile) -> bool:
        """A link must show the time it was linked with: whoever writes into the delivered file writes into it."""
        seen, entry = self._there.files.get(local.file.target), self._manifest.entry(local.file.target)
        if seen is None or entry is None or (seen.size, entry.sha256) != (local.file.size, local.file.sha256):
            return False
        return entry.linked_mtime in (None, seen.mtime)

    def _send_later(self, local: LocalFile, group: asyncio.TaskGroup) -> None:
        self._manifest.note(local.file.target, Entry(local.file.sha256))
        self._queue.put(self._upload_of(local))
        self._add_tracks(group)

    async def _link(self, local: LocalFile, source: str, group: asyncio.TaskGroup) -> None:
        """Give what is delivered already a second name in the package; what cannot be linked is sent."""
        target = local.file.target
        await self._manifest.cover(target)
        await self._make_folder(posixpath.dirname(target))
        if not await self._previous.link(source, posixpath.join(self._package, target)):
            self._send_later(local, group)
            return
        self._linked_files += 1
        self._linked_bytes += local.file.size
        self._on_bytes(local.file.size)

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

    async def _remove(self, files: list[str], folders: list[str]) -> None:
        await self._remote.remove_files(posixpath.join(self._package, path) for path in files)
        await self._remote.remove_folders(posixpath.join(self._package, path) for path in folders)
        for path in files:
            del self._there.files[path]
        for path in folders:
            self._there.folders.remove(path)
            self._made.discard(path)

    def _upload_of(self, local: LocalFile) -> Upload:
        """Which of several files with the same content takes which of their parts makes no difference."""
        sha256, wide = local.file.sha256, local.file.size >= SPLIT_BYTES
        copy = self._copies[sha256]
        self._copies[sha256] += 1
        name = (f"{sha256}-{copy}" if copy else sha256) + (WIDE if wide else "")
        path = posixpath.join(self._own, "parts", name)
        part = Part(local, path, self._parts.pop(name, None), WIDE_WINDOW_BYTES if wide else WINDOW_BYTES)
        self._uploads.append(Upload(part, self._on_bytes))
        return self._uploads[-1]

    # --- on the way ---------------------------------------------------------------------------------------------

    async def _start_tracks(self, group: asyncio.TaskGroup, receiving: asyncio.Task[None]) -> None:
        """If all files came at once, and the server is near, the manifest goes first: it would wait behind their bytes."""
        if receiving.done() and self._remote.round_trip_seconds < FAR_SECONDS:
            await self._manifest.complete()
        self._started = True
        self._add_tracks(group)

    def _add_tracks(self, group: asyncio.TaskGroup) -> None:
        """Further channels and connections, as soon as enough waits for them."""
        if not self._started:
            return
        connections = plan_connections(self._queue.bytes, self._remote.round_trip_seconds)
        for place in self._channels.places(connections):
            if place not in self._tracks:
                self._tracks.add(place)
                group.create_task(self._use_track(place))

    async def _use_track(self, place: Place) -> None:
        remote = await self._channels.open(place)
        if remote is None:
            return
        link, channels = self._links[place[0]], self._channels
        track = Track(remote, link, self._flow, channels.allowance)
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(track.watch())
            async with asyncio.TaskGroup() as sending:
                await self._work(track, sending)
            watch.cancel()

    async def _work(self, track: Track, sending: asyncio.TaskGroup) -> None:
        """A small file is sent beside others, a large one by every track that comes by, and then by no other way."""
        while True:
            await track.have_room_for_a_file()
            upload = await self._queue.take()
            if upload is None:
                return
            if upload.is_wide:
                if await upload.send(track):
                    sending.create_task(self._finish(track, upload))
            else:
                track.take(upload.size)
                sending.create_task(self._send_small(track, upload))

    async def _send_small(self, track: Track, upload: Upload) -> None:
        await upload.send(track)
        await upload.finish()
        track.give_back(upload.size)
        await self._place(upload)

    async def _finish(self, track: Track, upload: Upload) -> None:
        """A server that refuses writes through several connections gets the file again, through one."""
        try:
            await upload.finish()
        except Failed:
            if not upload.was_joined:
                raise
            await track.remote.remove_files([upload.part.path])
            self._on_bytes(-upload.told_bytes)
            path = upload.part.path.removesuffix(WIDE)
            upload = Upload(Part(upload.part.local, path, 0), self._on_bytes)
            self._uploads.append(upload)
            await upload.send(track)
            await upload.finish()
        await self._place(upload)

    async def _place(self, upload: Upload) -> None:
        self._kept_bytes += upload.kept_bytes
        target = upload.part.local.file.target
        await self._manifest.cover(target)
        await self._make_folder(posixpath.dirname(target))
        await self._remote.rename(upload.part.path, posixpath.join(self._package, target))

    async def _make_folder(self, folder: str) -> None:
        """`package` itself must be there: a stale attempt must not bring its taken folder back to life."""
        if folder in self._made:
            return
        await self._make_folder(posixpath.dirname(folder))
        async with self._making[folder]:
            if folder not in self._made:
                await self._remote.make_folder(posixpath.join(self._package, folder))
                self._made.add(folder)

    async def _verify(self) -> Tree:
        """Remove what was left there and is not wanted; then every size, and that nothing else is there."""
        tree = await self._remote.tree(self._package, self._made)
        wanted = {target: local.file.size for target, local in self._wanted.items()}
        unwanted = [path for path in tree.files if path in self._left and path not in wanted]
        await self._remote.remove_files(posixpath.join(self._package, path) for path in unwanted)
        found = {path: seen.size for path, seen in tree.files.items() if path not in unwanted}
        for path, seen in tree.files.items():
            entry = self._manifest.entry(path)
            if path in wanted and entry is not None and entry.linked_mtime not in (None, seen.mtime):
                raise Unavailable(
                    "staged_differs",
                    f"{self._remote.address}: the delivered {path} was changed while it was being linked",
                    "It is uploaded again.",
                )
        differing = sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
        if differing:
            first = differing[0]
            raise Unavailable(
                "staged_differs",
                f"{self._remote.address}: {first} (of {len(differing)} such) was staged with "
                f"{found.get(first)} bytes, not {wanted.get(first)}",
                "It is uploaded again.",
            )
        needed = {folder for target in wanted for folder in _parents(target)}
        folders = [path for path in tree.folders if path not in needed]
        await self._remote.remove_folders(posixpath.join(self._package, path) for path in folders)
        return tree


def plan_connections(waiting_bytes: int, round_trip_seconds: float) -> int:
    """How many connections are worth opening for what waits."""
    return 1 if round_trip_seconds < FAR_SECONDS else 1 + waiting_bytes // BYTES_PER_CONNECTION


def _first(failures: ExceptionGroup[Exception]) -> Exception:
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, ExceptionGroup) else first


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
