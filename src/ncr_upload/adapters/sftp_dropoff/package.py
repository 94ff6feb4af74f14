"""Staging the files of one package as they become known: kept, continued or sent, then verified as a whole."""

from __future__ import annotations

import asyncio
import hashlib
import posixpath
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from asyncssh import FILEXFER_TYPE_DIRECTORY

from ncr_upload.adapters.sftp_dropoff.channels import Channels, Place
from ncr_upload.adapters.sftp_dropoff.links import Links, settle_times
from ncr_upload.adapters.sftp_dropoff.manifest import Entry, Manifest
from ncr_upload.adapters.sftp_dropoff.queue import Queue
from ncr_upload.adapters.sftp_dropoff.remote import Failed, Tree, escaped, start
from ncr_upload.adapters.sftp_dropoff.scratch import STAGING
from ncr_upload.adapters.sftp_dropoff.track import ALL_BYTES, LINK_BYTES, Flow, Track
from ncr_upload.adapters.sftp_dropoff.upload import SPLIT_BYTES, WIDE_WINDOW_BYTES, WINDOW_BYTES, Differs, Part, Upload
from ncr_upload.application.arrivals import Arrival
from ncr_upload.application.ports import LocalFile, OnBytes, Staged
from ncr_upload.domain.errors import Rejected, Unavailable

WIDE = ".wide"
"""Ends the names of parts that are written with the wide window."""
EARLY = ".early"
"""Ends the names of parts of files whose hash is not known yet. No later attempt takes one for anything."""

BYTES_PER_CONNECTION = 8 * 1024 * 1024
"""So much must wait for a further connection to be worth its round trips."""

FAR_SECONDS = 0.004
"""A server that takes less to answer is near: one connection to it goes as fast as this process can encrypt."""


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
        self._cut_off = False
        self._copies = Counter[str]()
        self._made: set[str] = {""}
        self._expected: set[str] = set()  # folders that are made, or about to be
        self._making: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._clearing = asyncio.Lock()
        self._manifest = Manifest(self._remote, own, {})
        self._queue = Queue()
        self._tracks: set[Place] = set()
        self._uploads: list[Upload] = []
        self._flow = Flow(ALL_BYTES)
        self._links: defaultdict[int, Flow] = defaultdict(lambda: Flow(LINK_BYTES))
        self._started = False
        self._kept_files = 0
        self._kept_bytes = 0
        self._linked_files = 0
        self._linked_bytes = 0

    async def stage(self, files: AsyncIterator[Arrival], fresh: bool, beside: Callable[[], Awaitable[None]]) -> Staged:
        """The first failure, of a file's arrival too, stops the rest and is raised. Nothing is there yet when it is `fresh`.
        `beside` is awaited while the whole is verified."""
        _, self._left = await asyncio.gather(self._previous.look(), self._look(fresh))
        try:
            async with asyncio.TaskGroup() as group:
                receiving = start(group, self._receive(files, group))
                start(group, self._start_tracks(group, receiving))
                if fresh:
                    start(group, self._look_beside())
        except ExceptionGroup as failures:
            raise self._choose(failures) from None
        finally:
            for upload in self._uploads:
                upload.close()
        tree, _ = await asyncio.gather(self._verify(), beside())
        times = await settle_times(self._remote, self._package, tree, self._manifest.linked())
        return Staged(self._kept_files, self._kept_bytes, self._linked_files, self._linked_bytes, times)

    def sizes(self) -> Mapping[str, int]:
        """Return the size of each file that is staged, by target."""
        return {target: local.file.size for target, local in self._wanted.items()}

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
        self._parts = {name: attrs.size or 0 for name, attrs in parts.items() if attrs.type != FILEXFER_TYPE_DIRECTORY}
        self._cut_off = any(name.endswith((WIDE, EARLY)) for name in parts)
        return set(self._there.files)

    # --- what is wanted -----------------------------------------------------------------------------------------

    async def _receive(self, files: AsyncIterator[Arrival], group: asyncio.TaskGroup) -> None:
        growing, linking = [], list[asyncio.Task[None]]()
        start(group, self._remove_parts([name for name in self._parts if name.endswith(EARLY)]))
        async for arrival in files:
            check_relative(arrival.target)
            if arrival.local is None:
                growing.append(start(group, self._receive_growing(arrival, linking, group)))
            else:
                await self._receive_whole(arrival.local, linking, group)
        await asyncio.gather(*growing)
        start(group, self._manifest.complete())
        await asyncio.gather(*linking)
        self._queue.close()
        start(group, self._remove_parts(list(self._parts)))

    async def _receive_growing(self, arrival: Arrival, linking: list[asyncio.Task[None]], group: asyncio.TaskGroup) -> None:
        """Send it while it comes, if it is worth it. What becomes of it is decided when its hash is known, as of any file."""
        if not self._may_send_early(arrival):
            await self._receive_whole(await arrival.whole(), linking, group)
            return
        name = hashlib.sha256(arrival.target.encode()).hexdigest() + EARLY
        upload = self._add(Part(arrival, self._part_path(name), None, WIDE_WINDOW_BYTES), group)
        await self._queue.follow(arrival)
        local = await arrival.whole()
        await self._expect(local, group)
        self._manifest.note(arrival.target, Entry(local.file.sha256))
        await upload.prove(local, self._remote, self._part_path(self._name_part(local, wide=True)))

    def _may_send_early(self, arrival: Arrival) -> bool:
        """Not what may turn out to be there already; nor where an attempt before was cut off within a large file, as only parts
        with a hash for a name are continued, so that each attempt comes further than the one before."""
        seen = self._there.files.get(arrival.target)
        return (
            arrival.size >= SPLIT_BYTES
            and (seen is None or seen.size != arrival.size)
            and not self._previous.has_size(arrival.size)
            and not self._cut_off
        )

    async def _receive_whole(self, local: LocalFile, linking: list[asyncio.Task[None]], group: asyncio.TaskGroup) -> None:
        target = local.file.target
        if self._is_whole(local):
            self._wanted[target] = local
            del self._there.files[target]
            self._kept_files += 1
            self._kept_bytes += local.file.size
            self._on_bytes(local.file.size)
            return
        await self._expect(local, group)
        source = self._previous.find(local.file)
        if source is not None:
            self._manifest.note(target, Entry(local.file.sha256, source[1]))
            linking.append(start(group, self._link(local, source[0], group)))
        else:
            self._send_later(local, group)

    async def _remove_parts(self, names: list[str]) -> None:
        for name in names:
            del self._parts[name]
        await self._remote.put_away((self._part_path(name) for name in names), self._own)

    def _part_path(self, name: str) -> str:
        return posixpath.join(self._own, "parts", name)

    async def _expect(self, local: LocalFile, group: asyncio.TaskGroup) -> None:
        """Make way for a file that is to be sent or linked."""
        target = local.file.target
        self._wanted[target] = local
        if self._there.files or self._there.folders:
            async with self._clearing:
                await self._remove_obstacles(target)
        folder = posixpath.dirname(target)
        if folder not in self._expected:
            self._expected.add(folder)
            start(group, self._make_folder(folder))

    def _is_whole(self, local: LocalFile) -> bool:
        """A link must show the time it was linked with: whoever writes into the delivered file writes into it."""
        seen, entry = self._there.files.get(local.file.target), self._manifest.entry(local.file.target)
        if seen is None or entry is None or (seen.size, entry.sha256) != (local.file.size, local.file.sha256):
            return False
        return entry.linked_mtime in (None, seen.mtime)

    def _send_later(self, local: LocalFile, group: asyncio.TaskGroup) -> None:
        self._manifest.note(local.file.target, Entry(local.file.sha256))
        wide = local.file.size >= SPLIT_BYTES
        name = self._name_part(local, wide=wide)
        path, window_bytes = self._part_path(name), WIDE_WINDOW_BYTES if wide else WINDOW_BYTES
        self._add(Part(Arrival.of(local), path, self._parts.pop(name, None), window_bytes), group)

    def _add(self, part: Part, group: asyncio.TaskGroup) -> Upload:
        upload = Upload(part, self._on_bytes)
        self._uploads.append(upload)
        self._queue.put(upload)
        self._add_tracks(group)
        return upload

    async def _link(self, local: LocalFile, source: str, group: asyncio.TaskGroup) -> None:
        """Give what is delivered already a second name in the package; what cannot be linked is sent."""
        target = local.file.target
        await self._manifest.cover(target)
        await self._make_folder(posixpath.dirname(target))
        to = posixpath.join(self._package, target)
        if not await self._previous.link(source, to):
            self._send_later(local, group)
            return
        if self._previous.is_copy(to):
            self._manifest.note(target, Entry(local.file.sha256))
            await self._manifest.cover(target)
        self._linked_files += 1
        self._linked_bytes += local.file.size
        self._on_bytes(local.file.size)

    async def _remove_obstacles(self, target: str) -> None:
        """What an earlier attempt staged at this place, or a file where a folder is needed, or a folder where the file is."""
        places = [target, *list_parents(target)]
        below = target + "/"
        files = [path for path in places if path in self._there.files]
        folders = []
        if target in self._there.folders:
            files += [path for path in self._there.files if path.startswith(below)]
            folders = [path for path in self._there.folders if path == target or path.startswith(below)]
        await self._remove(files, folders)

    async def _remove(self, files: list[str], folders: list[str]) -> None:
        await self._remote.put_away((posixpath.join(self._package, path) for path in files), self._own)
        await self._remote.remove_folders(posixpath.join(self._package, path) for path in folders)
        for path in files:
            del self._there.files[path]
        for path in folders:
            self._there.folders.remove(path)
            self._made.discard(path)
            self._expected.discard(path)

    def _name_part(self, local: LocalFile, *, wide: bool) -> str:
        """Which of several files with the same content takes which of their parts makes no difference."""
        sha256 = local.file.sha256
        copy = self._copies[sha256]
        self._copies[sha256] += 1
        return (f"{sha256}-{copy}" if copy else sha256) + (WIDE if wide else "")

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
                start(group, self._use_track(place))

    async def _use_track(self, place: Place) -> None:
        remote = await self._channels.open(place)
        if remote is None:
            return
        link, channels = self._links[place[0]], self._channels
        track = Track(remote, link, self._flow, channels.allowance)
        async with asyncio.TaskGroup() as group:
            watch = start(group, track.watch())
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
                    start(sending, self._finish(track, upload))
            else:
                track.take(upload.size)
                start(sending, self._send_small(track, upload))

    async def _send_small(self, track: Track, upload: Upload) -> None:
        await upload.send(track)
        await upload.finish()
        track.give_back(upload.size)
        await self._place(upload)

    async def _finish(self, track: Track, upload: Upload) -> None:
        """A server that refuses writes through several connections gets the file again, through one; and any server, if what
        was sent early is not the file after all."""
        try:
            await upload.finish()
        except (Failed, Differs) as failure:
            if not (upload.is_early if isinstance(failure, Differs) else upload.was_joined):
                raise
            local = await upload.part.file.whole()
            await upload.proven.wait()
            await track.remote.put_away([upload.part.path], self._own)
            self._on_bytes(-upload.told_bytes)
            upload.close()
            self._uploads.remove(upload)
            path = self._part_path(self._name_part(local, wide=False))
            upload = Upload(Part(Arrival.of(local), path, 0), self._on_bytes)
            self._uploads.append(upload)
            await upload.send(track)
            await upload.finish()
        await self._place(upload)

    async def _place(self, upload: Upload) -> None:
        self._kept_bytes += upload.kept_bytes
        target = upload.part.file.target
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
        await self._remote.put_away((posixpath.join(self._package, path) for path in unwanted), self._own)
        found = {path: seen.size for path, seen in tree.files.items() if path not in unwanted}
        for path, seen in tree.files.items():
            entry = self._manifest.entry(path)
            if path in wanted and entry is not None and entry.linked_mtime not in (None, seen.mtime):
                raise Unavailable(
                    "staged_differs",
                    f"{self._remote.address}: the delivered {escaped(path)} was changed while it was being linked",
                    "It is uploaded again.",
                )
        differing = sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
        if differing:
            first = differing[0]
            raise Unavailable(
                "staged_differs",
                f"{self._remote.address}: {escaped(first)} (of {len(differing)} such) was staged with "
                f"{found.get(first)} bytes, not {wanted.get(first)}",
                "It is uploaded again.",
            )
        needed = {folder for target in wanted for folder in list_parents(target)}
        folders = [path for path in tree.folders if path not in needed]
        await self._remote.remove_folders(posixpath.join(self._package, path) for path in folders)
        return tree


def plan_connections(waiting_bytes: int, round_trip_seconds: float) -> int:
    """How many connections are worth opening for what waits."""
    return 1 if round_trip_seconds < FAR_SECONDS else 1 + waiting_bytes // BYTES_PER_CONNECTION


def _first(failures: ExceptionGroup[Exception]) -> Exception:
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, ExceptionGroup) else first


def list_parents(target: str) -> list[str]:
    """Every folder the target is in."""
    folders = []
    while target := posixpath.dirname(target):
        folders.append(target)
    return folders


def check_relative(path: str, one_segment: bool = False) -> None:
    """The domain has refused such paths already; this is the last gate before the partner's disk."""
    segments = path.split("/")
    unsafe = any(segment in ("", ".", "..", STAGING) for segment in segments) or "\0" in path
    if unsafe or (one_segment and len(segments) > 1) or not _is_utf8(path):
        raise Rejected(
            "path_refused", f"{path!r} is no place for a delivery", "Correct the job's files or id, then submit again."
        )


def _is_utf8(path: str) -> bool:
    """Return whether it has a form in UTF-8: what is kept of foreign bytes has none, and names no file of ours."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
