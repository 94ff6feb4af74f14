"""One attempt at a delivery, from the studio's database to the partner's folder. Read `Delivery.run` from top to bottom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ncr_upload.application.arrivals import Arrival, Turns
from ncr_upload.application.crash_points import Reach, pass_by
from ncr_upload.application.lease import Lease
from ncr_upload.application.live import LiveStatus
from ncr_upload.application.parking import require_open
from ncr_upload.application.ports import (
    Archiver,
    Catalogue,
    Claims,
    Cleaning,
    Dropoff,
    DropoffSession,
    Host,
    LocalFile,
    ObjectInfo,
    ObjectStore,
    Parking,
    Recording,
    Staged,
    StudioJob,
    Validator,
    Verdict,
)
from ncr_upload.application.workspace import Workspace, remove_oldest
from ncr_upload.domain.admission import DISK_SHORT, AdmissionLimits, Admit, Defer, decide, find_misfit
from ncr_upload.domain.errors import CancelRequested, Deferred, DeliveryError, Rejected, Unavailable
from ncr_upload.domain.jobs import Claim, Problem, Stage, Status
from ncr_upload.domain.layout import plan_layout
from ncr_upload.domain.packages import PackageFile, PackageSize, PlannedFile
from ncr_upload.domain.retries import ErrorClass
from ncr_upload.domain.selection import select_files

T = TypeVar("T")
STATS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class PipelinePorts:
    """Everything an attempt touches."""

    claims: Claims
    cleaning: Cleaning
    parking: Parking
    catalogue: Catalogue
    store: ObjectStore
    archiver: Archiver
    validator: Validator
    dropoff: Dropoff
    host: Host


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """The operator's choices (see `Settings`)."""

    work_dir: Path
    file_selection: Literal["latest_date", "latest_per_path", "all"]
    layout_collisions: Literal["refuse", "newest"]
    download_concurrency: int
    admission: AdmissionLimits


class Delivery:
    """One attempt. `reach` is told each of the CRASH_POINTS."""

    def __init__(
        self,
        claim: Claim,
        ports: PipelinePorts,
        options: PipelineOptions,
        lease: Lease,
        live: LiveStatus,
        reach: Reach = pass_by,
    ) -> None:
        self.claim = claim
        self.task = claim.task
        self.ports = ports
        self.options = options
        self.lease = lease
        self.live = live
        self.announced_publish = claim.publish_fence is not None
        self.reach = reach
        self.kept_files = 0
        self.staged = Staged(0, 0)

    async def run(self) -> None:
        """Deliver, or end with the validator's "no". Raises `DeliveryError` for everything else."""
        if self.claim.cancel_requested:
            raise CancelRequested(self.task.task_id)
        if await self.resume_publish():
            return
        self.require_attempt()
        await self.require_open_destination()
        source = await self.look_up()
        plan = await self.plan(source)
        with Workspace(self.options.work_dir, self.task.task_id, self.claim.fence) as workspace:
            package, verdict = await self.download_and_judge(plan, workspace)
            if not verdict.passed:
                await self.refuse(verdict)
                return
            await self.pass_validation(verdict)
            await self.require_open_destination()
            async with self.ports.dropoff.session() as destination:
                await self.stage(destination, package)
                await self.publish(destination)
                await self.record()
                await self.clean_up(destination)

    async def resume_publish(self) -> bool:
        """If an earlier attempt's publish went through although nobody heard of it: record that, and be done."""
        if self.claim.publish_fence is None:
            return False
        async with self.ports.dropoff.session() as destination:
            self.lease.check()
            await destination.adopt(self.task.task_id, self.claim.fence)
            if not await destination.is_published(self.task.task_id, self.claim.fence):
                message = "the publish that an earlier attempt had announced did not happen"
                await self._advance(Status.PROCESSING, Stage.LOOKUP, message, retract_publish=True)
                self.announced_publish = False
                return False
            await self.record()
            await self.clean_up(destination)
            return True

    def require_attempt(self) -> None:
        """Whether this claim may do more than look for an announced publish. Raises `Rejected`."""
        if self.claim.looks_only:
            raise Rejected(
                "worker_died",
                f"the worker died or lost its lease in each of {self.task.max_attempts} attempts, the last while publishing; "
                "the package is not visible",
                f"Look for task_id {self.task.task_id} in the workers' logs, then submit the job again.",
            )

    async def require_open_destination(self) -> None:
        """Nothing is fetched for, nor asked of, a destination that is known to be parked. Raises `StillParked`."""
        await self._call(require_open, self.ports.parking, self.ports.dropoff.destination)

    async def look_up(self) -> StudioJob:
        """SKU and gate."""
        self.reach("lookup:before")
        source = await self._call(self.ports.catalogue.find_job, self.task.job_id, self.task.row_id)
        if not source.awaiting:
            raise Rejected(
                "not_awaiting_upload",
                f"job '{self.task.job_id}' (job_details row {source.row_id}) is not awaiting upload: its is_uploaded is not 1",
                "Upload the artist's files in the studio first; a delivered job awaits again after its next upload.",
            )
        self.task = replace(self.task, sku=source.sku)
        self.live.know(sku=source.sku)
        self.reach("lookup:after")
        return source

    async def plan(self, source: StudioJob) -> Sequence[PlannedFile]:
        """Which files, and where each goes. Everything that can be refused without a download is refused here."""
        listed = await self._call(self.ports.catalogue.list_files, self.task.job_id)
        selection = select_files(listed, self.options.file_selection, job_id=self.task.job_id)
        layout = plan_layout(selection.files, source.sku, self.options.layout_collisions)
        facts = [f"SKU {source.sku}.", selection.summary, *layout.notes]
        await self._advance(Status.PROCESSING, Stage.LOOKUP, " ".join(facts), sku=source.sku)
        return layout.files

    async def download_and_judge(
        self, plan: Sequence[PlannedFile], workspace: Workspace
    ) -> tuple[Sequence[LocalFile], Verdict]:
        """Fetch in parallel; each finished file enters, in the plan's order, the zip that streams to the validator."""
        objects = await self._stat_all(plan)
        total_bytes = sum(found.size for found in objects)
        here = await asyncio.to_thread(workspace.clear_all_but, objects)
        missing_bytes = sum(found.size for found in objects if found.key not in here)
        await asyncio.to_thread(self._take_room, workspace, total_bytes, missing_bytes)
        self.live.know(files=len(plan), bytes=total_bytes)
        message = f"downloading {len(plan)} files, {total_bytes} bytes"
        message += f"; {len(here)} of them may be here from the attempt before" if here else ""
        size = PackageSize(len(plan), total_bytes)
        await self._advance(Status.PROCESSING, Stage.DOWNLOAD, message, total_bytes=total_bytes, size=size)
        self.reach("download:before")
        turns = Turns(self.options.download_concurrency)
        arrivals = [
            Arrival(planned.target, found.size, workspace.place(planned.key))
            for planned, found in zip(plan, objects, strict=True)
        ]
        downloads = [
            asyncio.create_task(self._fetch(planned, found, workspace, turns, arrival))
            for planned, found, arrival in zip(plan, objects, arrivals, strict=True)
        ]
        judging = asyncio.create_task(self._judge(arrivals))
        try:
            verdict = await _first_to_decide(judging, downloads)
        finally:
            await _stop([*downloads, judging])
        return [download.result() for download in downloads if verdict.passed], verdict

    async def _stat_all(self, plan: Sequence[PlannedFile]) -> Sequence[ObjectInfo]:
        at_once = asyncio.Semaphore(STATS_AT_ONCE)

        async def stat(planned: PlannedFile) -> ObjectInfo:
            async with at_once:
                return await self.ports.store.stat(planned.key)

        found = await asyncio.gather(*(stat(planned) for planned in plan), return_exceptions=True)
        failures = [answer for answer in found if isinstance(answer, BaseException)]
        if failures:
            raise _summarised(failures)
        return [answer for answer in found if isinstance(answer, ObjectInfo)]

    def _take_room(self, workspace: Workspace, total_bytes: int, missing_bytes: int) -> None:
        """Memory, and disk for the download, or the job waits without spending an attempt; one that could never fit is
        refused. What other tasks keep on the disk for their next attempts goes first; what other attempts have reserved
        is theirs."""
        misfit = find_misfit(
            total_bytes,
            total_disk_bytes=self.ports.host.total_disk(self.options.work_dir),
            limits=self.options.admission,
        )
        if misfit is not None:
            raise Rejected(
                "disk_too_small",
                f"the job can never run on this worker: {misfit.reason}",
                f"Point WORK_DIR ({self.options.work_dir}) at a larger disk and submit the job again.",
            )
        with workspace.deciding():
            kept_by_others = remove_oldest(self.options.work_dir, but_of=self.task.task_id)
            while isinstance(decision := self._decide(workspace, missing_bytes), Defer) and decision.code == DISK_SHORT:
                if next(kept_by_others, None) is None:
                    break
            if isinstance(decision, Defer):
                short = "disk" if decision.code == DISK_SHORT else "memory"
                raise Deferred(
                    decision.code,
                    f"waiting for {short} on the worker's host: {decision.reason}",
                    f"Free some there (WORK_DIR is {self.options.work_dir}); the job goes on by itself and spends no attempt.",
                )
            workspace.reserve(missing_bytes)

    def _decide(self, workspace: Workspace, missing_bytes: int) -> Admit | Defer:
        free_bytes = self.ports.host.free_disk(self.options.work_dir) - workspace.reserved_by_others()
        return decide(
            memory_used_percent=self.ports.host.memory().used_percent,
            limits=self.options.admission,
            free_disk_bytes=max(0, free_bytes),
            needed_disk_bytes=missing_bytes,
        )

    async def _fetch(
        self, planned: PlannedFile, found: ObjectInfo, workspace: Workspace, turns: Turns, arrival: Arrival
    ) -> LocalFile:
        to = workspace.place(planned.key)
        async with turns.take(found.size):
            fetched = await asyncio.to_thread(workspace.find, found)
        if fetched is not None:
            self.kept_files += 1
            self.live.add_bytes(fetched.size)
        else:
            fetched = await self.ports.store.fetch(
                planned.key, to, self.live.add_bytes, known=found, turns=turns, follower=arrival
            )
            workspace.note(planned.key, fetched)
        file = PackageFile(planned.key, planned.target, fetched.size, fetched.sha256, fetched.crc32, fetched.etag)
        local = LocalFile(file, to)
        arrival.become(local)
        return local

    async def _judge(self, arrivals: Sequence[Arrival]) -> Verdict:
        async def in_order() -> AsyncIterator[Arrival]:
            for arrival in arrivals:
                yield arrival
            for arrival in arrivals:
                await arrival.whole()
            self.reach("download:after")
            self.reach("validate:before")
            kept, files = self.kept_files, len(arrivals)
            fetched = f"kept {kept} of {files} files from the attempt before, downloaded {files - kept}"
            message = fetched if kept else f"downloaded {files} files"
            await self._advance(Status.PROCESSING, Stage.VALIDATE, f"{message}; the validator judges the zip")

        assert self.task.sku is not None
        try:
            verdict = await self.ports.validator.judge(self.task.sku, self._zip(in_order()))
        except Unavailable as error:
            await self._note_unanswered(error)
            raise
        self.reach("validate:after")
        return verdict

    async def _zip(self, files: AsyncIterator[Arrival]) -> AsyncIterator[bytes]:
        self.reach("zip:before")
        async for chunk in self.ports.archiver.stream(files):
            yield chunk
        self.reach("zip:after")

    async def _note_unanswered(self, error: Unavailable) -> None:
        http_status = getattr(error, "http_status", None)
        if http_status not in (None, 200) and self.task.sku is not None:
            rows = self.ports.catalogue.unanswered(self.task, self.task.sku, http_status, self.ports.validator.url)
            await self._advance(Status.PROCESSING, Stage.VALIDATE, error.message, also=rows)

    async def refuse(self, verdict: Verdict) -> None:
        """The validator said no: recorded, nothing delivered."""
        assert self.task.sku is not None
        reasons = "; ".join(verdict.reasons) or "it gave no reason"
        problem = Problem(
            "validation_failed",
            ErrorClass.REJECTED.value,
            f"the validator answered {verdict.http_status} '{verdict.result}' for SKU {self.task.sku}: {reasons}",
            "Mend the files the validator names and upload them in the studio again; nothing was delivered.",
        )
        rows = self.ports.catalogue.refused(self.task, self.task.sku, verdict, self.ports.validator.url)
        await self._finish(Status.VALIDATION_FAILED, Stage.VALIDATE, problem.message, problem, rows)

    async def pass_validation(self, verdict: Verdict) -> None:
        """The validator said yes."""
        reasons = f" ({'; '.join(verdict.reasons)})" if verdict.reasons else ""
        self.live.know(verdict=verdict.result)
        await self._advance(
            Status.VALIDATION_PASSED,
            Stage.VALIDATE,
            f"the validator answered '{verdict.result}'{reasons}",
            also=self.ports.catalogue.judged(self.task, verdict),
            verdict=verdict.result,
            announce_staging=True,
        )

    async def stage(self, destination: DropoffSession, package: Sequence[LocalFile]) -> None:
        """Upload into the hidden staging folder, keeping what an earlier attempt staged of the very same package."""
        self.reach("stage:before")
        self.lease.check()
        task_id, fence = self.task.task_id, self.claim.fence
        files = [local.file for local in package]
        await destination.adopt(task_id, fence)
        total_bytes = sum(file.size for file in files)
        await self._advance(
            Status.UPLOADING,
            Stage.UPLOAD,
            f"uploading {len(files)} files, {total_bytes} bytes",
            files=files,
            total_bytes=total_bytes,
        )
        self.staged = await destination.stage(task_id, fence, _at_once(package), self.live.add_bytes)
        self.reach("stage:after")

    async def publish(self, destination: DropoffSession) -> None:
        """Make the package visible, whole, by one directory rename."""
        await self._require_unchanged()
        kept = f" ({self.staged.kept_bytes} bytes were there from the attempt before)" if self.staged.kept_bytes else ""
        message = f"every file is staged{kept}; publishing as {self.task.job_id}/{self.task.sku}"
        self.announced_publish = True
        await self._advance(Status.UPLOADING, Stage.PUBLISH, message, announce_publish=True)
        self.reach("publish:before")
        self.lease.check()
        await destination.publish(self.task.task_id, self.claim.fence, self.task.job_id, lambda: self.reach("publish:between"))
        self.reach("publish:after")

    async def _require_unchanged(self) -> None:
        """The last look before the package becomes visible: the studio may have withdrawn the upload meanwhile."""
        source = await self._call(self.ports.catalogue.find_job, self.task.job_id, self.task.row_id)
        if not source.awaiting or source.sku != self.task.sku:
            began, now = f"SKU {self.task.sku}", f"SKU {source.sku}, {'awaiting' if source.awaiting else 'not awaiting upload'}"
            raise Rejected(
                "withdrawn",
                f"job '{self.task.job_id}' was changed in the studio while it ran: it began with {began}, now it has {now}",
                "Nothing was delivered. Submit the job again if it is to be delivered as it is now.",
            )

    async def record(self) -> None:
        """The studio's rows and the ledger's, in one transaction."""
        assert self.task.sku is not None
        self.reach("record:before")
        rows = self.ports.catalogue.delivered(self.task, self.task.sku)
        await self._finish(Status.COMPLETED, Stage.DONE, f"delivered as {self.task.job_id}/{self.task.sku}", None, rows)
        self.reach("record:after")

    async def clean_up(self, destination: DropoffSession) -> None:
        """Remove what is left in staging. The job is delivered: if this fails, the janitor comes (`remove_staging`)."""
        self.reach("cleanup:before")
        try:
            await destination.discard(self.task.task_id)
            await self._call(self.ports.cleaning.cleaned, self.task.task_id)
        except DeliveryError:
            return
        self.reach("cleanup:after")

    async def _advance(
        self,
        status: Status,
        stage: Stage,
        message: str,
        *,
        total_bytes: int = 0,
        also: Recording | None = None,
        **facts: Any,
    ) -> None:
        self.lease.check()
        self.live.show(status, stage, message, total_bytes=total_bytes)
        await self._call(
            lambda: self.ports.claims.advance(self.claim, status=status, stage=stage, message=message, also=also, **facts)
        )

    async def _finish(self, status: Status, stage: Stage, message: str, problem: Problem | None, rows: Recording) -> None:
        self.lease.conclude()
        await self._call(
            lambda: self.ports.claims.finish(
                self.claim, status=status, stage=stage, message=message, problem=problem, also=rows
            )
        )

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.to_thread(function, *arguments)


async def remove_staging(task_id: str, dropoff: Dropoff, cleaning: Cleaning) -> None:
    """Remove what an ended task left at the destination: its worker died, or could not reach it. Raises `DeliveryError`."""
    async with dropoff.session() as destination:
        await destination.discard(task_id)
    await asyncio.to_thread(cleaning.cleaned, task_id)


async def _at_once(package: Sequence[LocalFile]) -> AsyncIterator[LocalFile]:
    for local in package:
        yield local


async def _first_to_decide(judging: asyncio.Task[Verdict], downloads: Sequence[asyncio.Task[Any]]) -> Verdict:
    """The verdict, or the failure of a download as soon as it fails: never the broken-off upload that follows from it."""
    waiting: set[asyncio.Task[Any]] = {judging, *downloads}
    while not judging.done():
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        failures = [error for task in done if task is not judging and (error := task.exception()) is not None]
        if failures:
            raise _summarised(failures)
    verdict = judging.result()
    if verdict.passed and not all(download.done() for download in downloads):
        raise Unavailable(
            "validator_early",
            "the validator passed the package before it had received all of it",
            "Ask the validator's operators; the job is tried again.",
        )
    return verdict


async def _stop(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _summarised(failures: Sequence[BaseException]) -> BaseException:
    """The failure that decides: a rejection before anything that could be retried; the rest are counted in it."""
    first = next((failure for failure in failures if isinstance(failure, Rejected)), failures[0])
    same = [failure for failure in failures if isinstance(failure, Rejected) and failure is not first]
    if isinstance(first, Rejected) and same:
        also = "; ".join(failure.message for failure in same[:4])
        more = f" (and {len(same) - 4} more)" if len(same) > 4 else ""
        return Rejected(first.code, f"{first.message}; {also}{more}", first.next_step)
    return first
