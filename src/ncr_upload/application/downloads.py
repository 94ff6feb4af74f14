"""The downloads of one attempt: room for them first, then all of them side by side, each readable while it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from ncr_upload.application.arrivals import Arrival, Turns
from ncr_upload.application.ports import Host, LocalFile, ObjectInfo, ObjectStore, OnBytes
from ncr_upload.application.workspace import Workspace, remove_oldest
from ncr_upload.domain.admission import DISK_SHORT, AdmissionLimits, Admit, Defer, decide, find_misfit
from ncr_upload.domain.errors import Deferred, Rejected
from ncr_upload.domain.packages import PackageFile, PackageSize, PlannedFile

STATS_AT_ONCE = 32
GROWING_BYTES = 32 * 1024 * 1024
"""A file of that size may be sent on while it arrives."""


class Downloads:
    """A package's files on their way into a workspace. `prepare`, then `begin`; `stop` whatever became of them."""

    def __init__(
        self,
        plan: Sequence[PlannedFile],
        workspace: Workspace,
        store: ObjectStore,
        host: Host,
        limits: AdmissionLimits,
        on_bytes: OnBytes,
    ) -> None:
        self.plan = plan
        self.size = PackageSize(len(plan), 0)
        self.kept_files = 0
        self.arrivals: list[Arrival] = []
        self.tasks: list[asyncio.Task[LocalFile]] = []
        self._workspace = workspace
        self._store = store
        self._room = _Room(workspace, host, limits)
        self._on_bytes = on_bytes
        self._objects: Sequence[ObjectInfo] = []
        self._here: set[str] = set()

    async def prepare(self) -> int:
        """Look at every object and reserve room for them; how many seem to be here from an earlier attempt. Raises `Rejected`,
        `Unavailable`, and `Deferred` where there is no room."""
        self._objects = await self._stat_all()
        self.size = PackageSize(len(self.plan), sum(found.size for found in self._objects))
        self._here = await asyncio.to_thread(self._workspace.clear_all_but, self._objects)
        missing_bytes = sum(found.size for found in self._objects if found.key not in self._here)
        await asyncio.to_thread(self._room.take, self.size.bytes, missing_bytes)
        return len(self._here)

    def begin(self, at_once: int) -> None:
        """Fetch every file, `at_once` large ones at a time."""
        turns = Turns(at_once)
        for planned, found in zip(self.plan, self._objects, strict=True):
            arrival = Arrival(planned.target, found.size, self._workspace.place(planned.key))
            self.arrivals.append(arrival)
            self.tasks.append(asyncio.create_task(self._fetch(planned, found, turns, arrival)))

    async def in_order(self) -> AsyncIterator[Arrival]:
        """Every file in the plan's order, as it comes; ends when all are whole."""
        for arrival in self.arrivals:
            yield arrival
        for arrival in self.arrivals:
            await arrival.whole()

    async def as_they_come(self) -> AsyncIterator[Arrival]:
        """Every file once it is whole, the first that is first; one of GROWING_BYTES or more at once."""
        for arrival in self.arrivals:
            if arrival.size >= GROWING_BYTES:
                yield arrival
        waiting = dict(zip(self.tasks, self.arrivals, strict=True))
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
                arrival = waiting.pop(task)
                if arrival.size < GROWING_BYTES:
                    yield arrival

    def results(self) -> list[LocalFile]:
        """In the plan's order, once all are whole."""
        return [task.result() for task in self.tasks]

    async def _stat_all(self) -> Sequence[ObjectInfo]:
        at_once = asyncio.Semaphore(STATS_AT_ONCE)

        async def stat(planned: PlannedFile) -> ObjectInfo:
            async with at_once:
                return await self._store.stat(planned.key)

        found = await asyncio.gather(*(stat(planned) for planned in self.plan), return_exceptions=True)
        failures = [answer for answer in found if isinstance(answer, BaseException)]
        if failures:
            raise summarised(failures)
        return [answer for answer in found if isinstance(answer, ObjectInfo)]

    async def _fetch(self, planned: PlannedFile, found: ObjectInfo, turns: Turns, arrival: Arrival) -> LocalFile:
        fetched = None
        if found.key in self._here:
            async with turns.take(found.size):
                fetched = await asyncio.to_thread(self._workspace.find, found)
        if fetched is not None:
            self.kept_files += 1
            self._on_bytes(fetched.size)
        else:
            fetched = await self._store.fetch(
                planned.key, arrival.place, self._on_bytes, known=found, turns=turns, follower=arrival
            )
            self._workspace.note(planned.key, fetched)
        file = PackageFile(planned.key, planned.target, fetched.size, fetched.sha256, fetched.crc32, fetched.etag)
        local = LocalFile(file, arrival.place)
        arrival.become(local)
        return local


class _Room:
    """Memory, and disk for the download, or the job waits without spending an attempt."""

    def __init__(self, workspace: Workspace, host: Host, limits: AdmissionLimits) -> None:
        self._workspace = workspace
        self._work_dir: Path = workspace.path.parent
        self._host = host
        self._limits = limits

    def take(self, total_bytes: int, missing_bytes: int) -> None:
        """Reserve it. A job that could never fit is refused. What other tasks keep on the disk for their next attempts goes
        first; what other attempts have reserved is theirs."""
        misfit = find_misfit(total_bytes, total_disk_bytes=self._host.total_disk(self._work_dir), limits=self._limits)
        if misfit is not None:
            raise Rejected(
                "disk_too_small",
                f"the job can never run on this worker: {misfit.reason}",
                f"Point WORK_DIR ({self._work_dir}) at a larger disk and submit the job again.",
            )
        with self._workspace.deciding():
            kept_by_others = remove_oldest(self._work_dir, but_of=self._workspace.task_id)
            while isinstance(decision := self._decide(missing_bytes), Defer) and decision.code == DISK_SHORT:
                if next(kept_by_others, None) is None:
                    break
            if isinstance(decision, Defer):
                short = "disk" if decision.code == DISK_SHORT else "memory"
                raise Deferred(
                    decision.code,
                    f"waiting for {short} on the worker's host: {decision.reason}",
                    f"Free some there (WORK_DIR is {self._work_dir}); the job goes on by itself and spends no attempt.",
                )
            self._workspace.reserve(missing_bytes)

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
