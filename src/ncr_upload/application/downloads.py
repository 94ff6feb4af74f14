"""The downloads of one attempt: room for them first, then all of them side by side, each readable while it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from ncr_upload.application.arrivals import Arrival, Turns
from ncr_upload.application.download_cache import DownloadCache, describe
from ncr_upload.application.ports import Fetched, Host, LocalFile, ObjectInfo, ObjectStore, OnBytes
from ncr_upload.application.workspace import Workspace, remove_oldest
from ncr_upload.domain.admission import DISK_FULL, DISK_SHORT, AdmissionLimits, Admit, Defer, decide, find_misfit
from ncr_upload.domain.errors import Deferred, Rejected
from ncr_upload.domain.packages import PackageFile, PackageSize, PlannedFile

STATS_AT_ONCE = 32
GROWING_BYTES = 32 * 1024 * 1024
"""A file of that size may be sent on while it arrives."""


class Downloads:
    """A package's files on their way into a workspace. Call `prepare`, then `begin`. Cancel `tasks` in the end, whatever
    became of them.

    `distrustful`: what comes from the cache is hashed before it is used, for whoever uses it before the zip has read it.
    `again`: an attempt failed before. It may have been by a list older than an object, so each object is looked at itself.
    """

    def __init__(
        self,
        plan: Sequence[PlannedFile],
        workspace: Workspace,
        store: ObjectStore,
        cache: DownloadCache,
        host: Host,
        limits: AdmissionLimits,
        on_bytes: OnBytes,
        *,
        distrustful: bool,
        again: bool,
    ) -> None:
        self.plan = plan
        self.size = PackageSize(len(plan), 0)
        self.kept_files = 0
        self.cached_files = 0
        self.arrivals: list[Arrival] = []
        self.tasks: list[asyncio.Task[LocalFile]] = []
        self._workspace = workspace
        self._store = store
        self._cache = cache
        self._distrustful = distrustful
        self._again = again
        self._room = _Room(workspace, cache, host, limits)
        self._on_bytes = on_bytes
        self._objects: Sequence[ObjectInfo] = []
        self._here: set[str] = set()
        self._taken: dict[str, Fetched] = {}

    async def prepare(self) -> int:
        """Look at every object and reserve room for them; how many seem to be here from an earlier attempt or in the cache.
        Raises `Rejected`, `Unavailable`, and `Deferred` where there is no room."""
        keys = [planned.key for planned in self.plan]
        listed = {} if self._again else await self._store.glance(keys)
        seen = {**listed, **await self._stat([key for key in keys if key not in listed])}
        objects = [seen[key] for key in keys]
        self._here = await asyncio.to_thread(self._workspace.clear_all_but, objects)
        wanted = [(found, self._workspace.place(found.key)) for found in objects if found.key not in self._here]
        self._taken = await asyncio.to_thread(self._cache.take, self._store.source, wanted)
        seen |= await self._see_again([listed[key] for key in [*self._here, *self._taken] if key in listed])
        self._objects = [seen[key] for key in keys]
        self.size = PackageSize(len(keys), sum(found.size for found in self._objects))
        missing_bytes = sum(seen[key].size for key in keys if key not in self._here and key not in self._taken)
        await asyncio.to_thread(self._room.take, self.size.bytes, missing_bytes)
        return len(self._here) + len(self._taken)

    def begin(self, at_once: int) -> None:
        """Fetch every file, `at_once` large ones at a time."""
        turns = Turns(at_once)
        for planned, found in zip(self.plan, self._objects, strict=True):
            arrival = Arrival(planned.target, found.size, self._workspace.place(planned.key))
            self.arrivals.append(arrival)
            self.tasks.append(asyncio.create_task(self._fetch(planned, found, turns, arrival)))

    async def whole(self) -> None:
        """Until every file is. The failure of one is raised as soon as it fails."""
        done, _ = await asyncio.wait(self.tasks, return_when=asyncio.FIRST_EXCEPTION)
        failures = [error for task in done if (error := task.exception()) is not None]
        if failures:
            raise summarised(failures)

    async def as_they_come(self) -> AsyncIterator[Arrival]:
        """Every file once it is whole, the first that is first; one of GROWING_BYTES or more at once."""
        for arrival in self.arrivals:
            if arrival.size >= GROWING_BYTES:
                yield arrival
        arriving = dict(zip(self.tasks, self.arrivals, strict=True))
        ended = asyncio.Queue[asyncio.Task[LocalFile]]()
        for task in arriving:
            task.add_done_callback(ended.put_nowait)
        for _ in arriving:
            task = await ended.get()
            task.result()
            arrival = arriving[task]
            if arrival.size < GROWING_BYTES:
                yield arrival

    def results(self) -> list[LocalFile]:
        """In the plan's order, once all are whole."""
        return [task.result() for task in self.tasks]

    def tell_sources(self) -> str:
        """Where the files came from, once all are whole."""
        kept, cached, files = self.kept_files, self.cached_files, self.size.files
        told = [f"kept {kept} of {files} files from the attempt before"] if kept else []
        told += [f"took {cached} of {files} files from this host's cache of downloads"] if cached else []
        return ", ".join([*told, f"downloaded {files - kept - cached}"]) if told else f"downloaded {files} files"

    def distrust(self) -> None:
        """The zip has found a file with other bytes than had arrived: remove every such file, from the cache too."""
        for arrival, found in zip(self.arrivals, self._objects, strict=True):
            file = arrival.local.file if arrival.local is not None else None
            if file and not self._workspace.holds(found.key, Fetched(file.size, file.sha256, file.crc32, file.etag)):
                self._forget(found)

    def _forget(self, found: ObjectInfo) -> None:
        self._workspace.forget(found.key)
        self._cache.remove(self._store.source, found)

    async def _stat(self, keys: Sequence[str]) -> dict[str, ObjectInfo]:
        at_once = asyncio.Semaphore(STATS_AT_ONCE)

        async def stat(key: str) -> ObjectInfo:
            async with at_once:
                return await self._store.stat(key)

        found = await asyncio.gather(*map(stat, keys), return_exceptions=True)
        failures = [answer for answer in found if isinstance(answer, BaseException)]
        if failures:
            raise summarised(failures)
        return {answer.key: answer for answer in found if isinstance(answer, ObjectInfo)}

    async def _see_again(self, listed: Sequence[ObjectInfo]) -> dict[str, ObjectInfo]:
        """What will not be fetched is believed to be here by no list, which may be older than the object."""
        seen = await self._stat([found.key for found in listed])
        for found in listed:
            if seen[found.key] != found:
                self._workspace.forget(found.key)
                self._here.discard(found.key)
                self._taken.pop(found.key, None)
        return seen

    async def _fetch(self, planned: PlannedFile, found: ObjectInfo, turns: Turns, arrival: Arrival) -> LocalFile:
        fetched = await self._find(found, turns)
        if fetched is not None:
            self._on_bytes(fetched.size)
        else:
            try:
                fetched = await self._store.fetch(
                    planned.key, arrival.place, self._on_bytes, known=found, turns=turns, follower=arrival
                )
            except Deferred as deferred:
                if deferred.code == DISK_FULL:  # by another program
                    await asyncio.to_thread(self._cache.clear)
                raise
            entry = describe(self._store.source, planned.key, fetched, arrival.place)
            self._workspace.note(planned.key, fetched, entry)
        file = PackageFile(planned.key, planned.target, fetched.size, fetched.sha256, fetched.crc32, fetched.etag)
        local = LocalFile(file, arrival.place)
        arrival.become(local)
        return local

    async def _find(self, found: ObjectInfo, turns: Turns) -> Fetched | None:
        """The object, if it is here: from the attempt before, whose bytes are hashed again, or from the cache."""
        if found.key in self._here:
            async with turns.take(found.size):
                kept = await asyncio.to_thread(self._workspace.find, found)
            self.kept_files += kept is not None
            return kept
        taken = self._taken.get(found.key)
        if taken is not None and self._distrustful:
            async with turns.take(found.size):
                if not await asyncio.to_thread(self._workspace.holds, found.key, taken):
                    await asyncio.to_thread(self._forget, found)
                    return None
        self.cached_files += taken is not None
        return taken


class _Room:
    """Memory, and disk for the download, or the job waits without spending an attempt."""

    def __init__(self, workspace: Workspace, cache: DownloadCache, host: Host, limits: AdmissionLimits) -> None:
        self._workspace = workspace
        self._cache = cache
        self._work_dir: Path = workspace.path.parent
        self._host = host
        self._limits = limits

    def take(self, total_bytes: int, missing_bytes: int) -> None:
        """Reserve it. A job that could never fit is refused. What the cache holds goes first, then what other tasks keep on the
        disk for their next attempts; what other attempts have reserved is theirs."""
        misfit = find_misfit(total_bytes, total_disk_bytes=self._host.total_disk(self._work_dir), limits=self._limits)
        if misfit is not None:
            raise Rejected(
                "disk_too_small",
                f"the job can never run on this worker: {misfit.reason}",
                f"Point WORK_DIR ({self._work_dir}) at a larger disk and submit the job again.",
            )
        with self._workspace.deciding():
            if isinstance(decision := self._decide(missing_bytes), Defer) and decision.code != DISK_SHORT:
                self._cache.forget_pages()
            removable = self._make_room()
            while isinstance(decision := self._decide(missing_bytes), Defer) and decision.code == DISK_SHORT:
                if next(removable, None) is None:
                    break
            if isinstance(decision, Defer):
                short = "disk" if decision.code == DISK_SHORT else "memory"
                raise Deferred(
                    decision.code,
                    f"waiting for {short} on the worker's host: {decision.reason}",
                    f"Free some there (WORK_DIR is {self._work_dir}); the job goes on by itself and spends no attempt.",
                )
            self._workspace.reserve(missing_bytes)

    def _make_room(self) -> Iterator[str]:
        """Remove something a step. What a workspace uses can only go from the cache after it."""
        yield from self._cache.make_room()
        for name in remove_oldest(self._work_dir, but_of=self._workspace.task_id):
            yield name
            yield from self._cache.make_room()

    def _decide(self, missing_bytes: int) -> Admit | Defer:
        free_bytes = self._host.free_disk(self._work_dir) - self._workspace.reserved_by_others()
        return decide(
            memory_used_percent=self._host.memory().used_percent,
            limits=self._limits,
            free_disk_bytes=max(0, free_bytes),
            needed_disk_bytes=missing_bytes,
        )


def summarised(failures: Sequence[BaseException]) -> BaseException:
    """The failure that decides: a rejection before anything that could be retried; the rest are counted in it."""
    first = next((failure for failure in failures if isinstance(failure, Rejected)), failures[0])
    same = [failure for failure in failures if isinstance(failure, Rejected) and failure is not first]
    if isinstance(first, Rejected) and same:
        also = "; ".join(failure.message for failure in same[:4])
        more = f" (and {len(same) - 4} more)" if len(same) > 4 else ""
        return Rejected(first.code, f"{first.message}; {also}{more}", first.next_step)
    return first
