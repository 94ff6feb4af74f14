"""One attempt at a delivery, from the studio's database to the partner's folder. Read `Delivery.run` from top to bottom."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from ncr_upload.application.crash_points import Reach, pass_by
from ncr_upload.application.download_cache import DownloadCache
from ncr_upload.application.downloads import Downloads, summarised
from ncr_upload.application.lease import Lease
from ncr_upload.application.live import LiveStatus
from ncr_upload.application.parking import require_open
from ncr_upload.application.ports import (
    AnnouncedPublish,
    Archiver,
    Catalogue,
    Claims,
    Cleaning,
    Dropoff,
    DropoffSession,
    Host,
    ObjectStore,
    Parking,
    Previous,
    Recording,
    Staged,
    StudioJob,
    Validator,
    Verdict,
)
from ncr_upload.application.workspace import Workspace
from ncr_upload.domain.admission import AdmissionLimits
from ncr_upload.domain.errors import CancelRequested, DeliveryError, NotPublished, PackageChanged, Rejected, Unavailable
from ncr_upload.domain.jobs import Claim, Problem, Stage, Status, Task
from ncr_upload.domain.layout import plan_layout
from ncr_upload.domain.packages import PackageFile, PlannedFile
from ncr_upload.domain.retries import ErrorClass
from ncr_upload.domain.selection import select_files
from ncr_upload.domain.text import REASONS, join_bounded

PREVIOUS_KEPT = "previous_kept"
"""The code of a clean-up that would have removed the only whole delivery there may be."""

T = TypeVar("T")


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
    stage_before_verdict: bool
    admission: AdmissionLimits
    download_cache_bytes: int = 0


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
        self.cache = make_cache(ports, options)
        self.announced_publish = claim.publish_fence is not None
        self.reach = reach
        self.package: Sequence[PackageFile] = ()
        self.staged = Staged(0, 0)
        self.early_bytes = 0
        self.adopted = ""
        self.began = time.monotonic()
        self.ended: Task | None = None

    def run(self) -> None:
        """Deliver, or end with the validator's "no". Raises `DeliveryError` for everything else."""
        if self.claim.cancel_requested:
            raise CancelRequested(self.task.task_id)
        if self.claim.publish_fence is not None and self.lease.run(self.resume_publish()):
            return
        self.require_attempt()
        self.require_open_destination()
        source = self.look_up()
        plan = self.plan(source)
        self.lease.run(self.deliver(plan))

    async def deliver(self, plan: Sequence[PlannedFile]) -> None:
        """What asks others than the databases: in an event loop."""
        with Workspace(self.options.work_dir, self.task.task_id, self.claim.fence, self.cache.clear) as workspace:
            async with self.download(plan, workspace) as downloads:
                if self.options.stage_before_verdict:
                    await self.stage_then_decide(downloads)
                else:
                    await self.decide_then_stage(downloads)

    async def decide_then_stage(self, downloads: Downloads) -> None:
        """The validator's "yes" first; until then the destination hears nothing of the package."""
        verdict = await self.judge(downloads)
        if not verdict.passed:
            await self.refuse(verdict)
            return
        await self.pass_validation(verdict)
        await self._call(self.require_open_destination)
        patience_seconds = time.monotonic() - self.began  # when it comes again, it is zipped and judged again
        async with self.ports.dropoff.session(patience_seconds) as destination:
            await self.adopt(destination)
            await self.begin_upload(downloads)
            await self.finish_upload(destination, self.upload(destination, downloads))

    async def stage_then_decide(self, downloads: Downloads) -> None:
        """Upload into the hidden staging folder while files arrive and the validator judges them: removed again on a "no"."""
        async with self.ports.dropoff.session() as destination:
            await self.adopt(destination)
            uploading = asyncio.create_task(self.upload(destination, downloads))
            try:
                verdict = await self.judge(downloads, uploading)
                if verdict.passed:
                    await self.pass_validation(verdict)
                    await self.begin_upload(downloads)
                    await self.finish_upload(destination, uploading)
                    return
            finally:
                await stop([uploading])
            await self.refuse(verdict)
            await self.clean_up(destination)

    async def finish_upload(self, destination: DropoffSession, uploading: Awaitable[None]) -> None:
        """From the moment the package may be delivered."""
        await uploading
        self.reach("stage:after")
        await self.record(await self.publish(destination))
        await self.clean_up(destination)

    async def resume_publish(self) -> bool:
        """If an earlier attempt's publish went through although nobody heard of it: record that, and be done."""
        announced = AnnouncedPublish(self.task.job_id, await self._call(self.ports.claims.package_sizes, self.task.task_id))
        async with self.ports.dropoff.session() as destination:
            self.lease.check()
            remark = await destination.adopt(self.task.task_id, self.claim.fence, announced)
            if not await destination.is_published(self.task.task_id, self.claim.fence):
                message = "the publish that an earlier attempt had announced did not happen"
                await self._retract_publish(Status.PROCESSING, Stage.LOOKUP, f"{message}: {remark}" if remark else message)
                return False
            await self.record(remark)
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

    def require_open_destination(self) -> None:
        """Nothing is fetched for, nor asked of, a destination that is known to be parked. Raises `StillParked`."""
        self._ask(require_open, self.ports.parking, self.ports.dropoff.destination)

    def look_up(self) -> StudioJob:
        """SKU and gate."""
        self.reach("lookup:before")
        source = self._ask(self.ports.catalogue.find_job, self.task.job_id, self.task.row_id)
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

    def plan(self, source: StudioJob) -> Sequence[PlannedFile]:
        """Which files, and where each goes. Everything that can be refused without a download is refused here."""
        listed = self._ask(self.ports.catalogue.list_files, self.task.job_id)
        selection = select_files(listed, self.options.file_selection, job_id=self.task.job_id)
        layout = plan_layout(selection.files, source.sku, self.options.layout_collisions)
        facts = [f"SKU {source.sku}.", selection.summary, *layout.notes]
        foreseen = self.ports.catalogue.foreseen(self.task, source.sku)
        self._ask(self._advancing(Status.PROCESSING, Stage.LOOKUP, " ".join(facts), sku=source.sku, also=foreseen))
        return layout.files

    @asynccontextmanager
    async def download(self, plan: Sequence[PlannedFile], workspace: Workspace) -> AsyncIterator[Downloads]:
        """Fetch in parallel, from when there is room for it until the attempt needs no more."""
        ports, options = self.ports, self.options
        ahead = options.stage_before_verdict
        downloads = Downloads(
            plan,
            workspace,
            ports.store,
            self.cache,
            ports.host,
            options.admission,
            self.live.add_bytes,
            distrustful=ahead,
            again=self.task.attempt > 1,
        )
        here = await downloads.prepare()
        size = downloads.size
        self.live.know(files=size.files, bytes=size.bytes)
        message = f"downloading {size.files} files, {size.bytes} bytes"
        message += f"; {here} of them may be here already" if here else ""
        message += "; each is staged when it has arrived, and nothing is visible before the verdict" if ahead else ""
        await self._advance(
            Status.PROCESSING, Stage.DOWNLOAD, message, total_bytes=size.bytes, size=size, announce_staging=ahead
        )
        self.reach("download:before")
        downloads.begin(options.download_concurrency)
        try:
            yield downloads
        finally:
            await stop(downloads.tasks)

    async def judge(self, downloads: Downloads, *beside: asyncio.Task[None]) -> Verdict:
        """Each file enters, in the plan's order and as it comes, the zip that streams to the validator. The failure of a
        download, or of what runs beside, is raised as soon as it fails: never the broken-off zip that follows from it."""
        assert self.task.sku is not None
        self.reach("zip:before")
        package, told, taken = self.ports.archiver.stream(downloads.arrivals), threading.Event(), threading.Event()
        judging = asyncio.create_task(self.ports.validator.judge(self.task.sku, self._end_when(told, package, taken)))
        arriving = asyncio.create_task(self._arrive(downloads, told))
        waiting: set[asyncio.Task[Any]] = {judging, arriving, *beside}
        try:
            while not judging.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                failures = [error for task in done if task is not judging and (error := task.exception()) is not None]
                if failures:
                    raise summarised(failures)
        finally:
            package.stop()
            told.set()
            await stop([judging, arriving])
        try:
            verdict = judging.result()
        except PackageChanged:
            await self._call(downloads.distrust)
            raise
        except Unavailable as error:
            await self._note_unanswered(error)
            raise
        self.reach("validate:after")
        if verdict.passed and not taken.is_set():
            raise Unavailable(
                "validator_early",
                "the validator passed the package before it had received all of it",
                "Ask the validator's operators; the job is tried again.",
            )
        return verdict

    async def _arrive(self, downloads: Downloads, told: threading.Event) -> None:
        await downloads.whole()
        self.reach("download:after")
        self.reach("validate:before")
        message = f"{downloads.tell_sources()}; the validator judges the zip"
        await self._advance(Status.PROCESSING, Stage.VALIDATE, message)
        told.set()

    def _end_when(self, told: threading.Event, package: Iterable[bytes], taken: threading.Event) -> Iterator[bytes]:
        """No verdict comes before the history says that there is all to judge; `taken` is set when it all went out."""
        yield from package
        taken.set()
        told.wait()
        self.reach("zip:after")

    async def _note_unanswered(self, error: Unavailable) -> None:
        http_status = getattr(error, "http_status", None)
        if http_status not in (None, 200) and self.task.sku is not None:
            rows = self.ports.catalogue.unanswered(self.task, self.task.sku, http_status, self.ports.validator.url)
            try:
                await self._advance(Status.PROCESSING, Stage.VALIDATE, error.message, also=rows)
            except Rejected as refused:  # that list is not worth the job
                await self._advance(Status.PROCESSING, Stage.VALIDATE, f"{error.message}; {refused.message}")

    async def refuse(self, verdict: Verdict) -> None:
        """The validator said no: recorded, nothing delivered."""
        assert self.task.sku is not None
        reasons = join_bounded(verdict.reasons, REASONS) or "it gave no reason"
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
        reasons = f" ({join_bounded(verdict.reasons, REASONS)})" if verdict.reasons else ""
        self.live.know(verdict=verdict.result)
        await self._advance(
            Status.VALIDATION_PASSED,
            Stage.VALIDATE,
            f"the validator answered '{verdict.result}'{reasons}",
            also=self.ports.catalogue.judged(self.task, verdict),
            verdict=verdict.result,
            announce_staging=True,
        )

    async def adopt(self, destination: DropoffSession) -> None:
        """Make the hidden staging folder this attempt's, with what an earlier one staged."""
        self.reach("stage:before")
        self.lease.check()
        self.adopted = await destination.adopt(self.task.task_id, self.claim.fence)

    async def begin_upload(self, downloads: Downloads) -> None:
        """The package as it will be delivered is written down."""
        self.package = files = [local.file for local in downloads.results()]
        message = f"uploading {len(files)} files, {downloads.size.bytes} bytes" + (f"; {self.adopted}" if self.adopted else "")
        await self._advance(Status.UPLOADING, Stage.UPLOAD, message, files=files, total_bytes=downloads.size.bytes)
        self.live.add_bytes(self.early_bytes)

    async def upload(self, destination: DropoffSession, downloads: Downloads) -> None:
        """Into the staging folder, keeping what is there of the very same package."""
        files, job_id = downloads.as_they_come(), self.task.job_id
        previous = Previous(job_id, await self._call(self.ports.claims.delivered_files, job_id))
        self.staged = await destination.stage(self.task.task_id, self.claim.fence, files, self._count_uploaded, previous)

    def _count_uploaded(self, count: int) -> None:
        if self.live.stage is Stage.UPLOAD:
            self.live.add_bytes(count)
        else:
            self.early_bytes += count

    async def publish(self, destination: DropoffSession) -> str:
        """Make the package visible, whole, by one directory rename; what is to be said of it, if anything."""
        await self._require_unchanged()
        times = self.staged.mtimes
        message = f"every file is staged{self.staged.remark}; publishing as {self.task.job_id}/{self.task.sku}"
        files = [replace(file, mtime=times.get(file.target)) for file in self.package] if times else None
        assert self.task.sku is not None
        rehearsed = self.ports.catalogue.rehearsed(self.task, self.task.sku)
        await self._advance(Status.UPLOADING, Stage.PUBLISH, message, announce_publish=True, files=files, also=rehearsed)
        self.announced_publish = True
        self.reach("publish:before")
        self.lease.check()
        try:
            remark = await destination.publish(
                self.task.task_id, self.claim.fence, self.task.job_id, lambda: self.reach("publish:between")
            )
        except NotPublished as failure:
            await self._retract_publish(Status.UPLOADING, Stage.PUBLISH, f"not published: {failure.message}")
            raise failure.cause from None
        self.reach("publish:after")
        return remark

    async def _retract_publish(self, status: Status, stage: Stage, message: str) -> None:
        """An announced publish has not happened: the attempt counts, and the task can be cancelled again."""
        await self._advance(status, stage, message, retract_publish=True)
        self.announced_publish = False

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

    async def record(self, remark: str = "") -> None:
        """The studio's rows and the ledger's, in one transaction. The `remark` tells how the publish came about."""
        assert self.task.sku is not None
        self.reach("record:before")
        rows = self.ports.catalogue.delivered(self.task, self.task.sku)
        message = f"delivered as {self.task.job_id}/{self.task.sku}" + (f": {remark}" if remark else "")
        await self._finish(Status.COMPLETED, Stage.DONE, message, None, rows)
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

    async def _advance(self, status: Status, stage: Stage, message: str, **facts: Any) -> None:
        await self._call(self._advancing(status, stage, message, **facts))

    def _advancing(
        self, status: Status, stage: Stage, message: str, *, total_bytes: int = 0, **facts: Any
    ) -> Callable[[], None]:
        """Shown at once; the ledger's part is left to be called."""
        self.lease.check()
        self.live.show(status, stage, message, total_bytes=total_bytes)
        return lambda: self.ports.claims.advance(self.claim, status=status, stage=stage, message=message, **facts)

    async def _finish(self, status: Status, stage: Stage, message: str, problem: Problem | None, rows: Recording) -> None:
        self.lease.conclude()
        self.ended = await self._call(
            lambda: self.ports.claims.finish(
                self.claim, status=status, stage=stage, message=message, problem=problem, also=rows
            )
        )

    def _ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """As long as nothing runs beside it, without an event loop: most jobs that are refused never need one."""
        self.lease.check()
        try:
            return function(*arguments)
        finally:
            self.lease.check()

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        """In a thread that stays for the next job too: one of the loop's own would be started and ended for each."""
        call = partial(contextvars.copy_context().run, function, *arguments)
        return await asyncio.get_running_loop().run_in_executor(_threads(os.getpid()), call)


@lru_cache(maxsize=1)
def _threads(_process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(4, thread_name_prefix="records")


def make_cache(ports: PipelinePorts, options: PipelineOptions) -> DownloadCache:
    return DownloadCache(options.work_dir, options.download_cache_bytes, ports.host)


async def remove_staging(task_id: str, dropoff: Dropoff, cleaning: Cleaning) -> None:
    """Remove what an ended task left at the destination: its worker died, or could not reach it. Raises `DeliveryError`."""
    successor = await asyncio.to_thread(cleaning.find_successor, task_id)
    async with dropoff.session() as destination:
        try:
            await destination.discard(task_id, successor)
        except Unavailable as failure:
            if failure.code == PREVIOUS_KEPT:
                await asyncio.to_thread(cleaning.note_kept, task_id, f"{failure.message}. {failure.next_step}")
            raise
    await asyncio.to_thread(cleaning.cleaned, task_id)


async def stop(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel them and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
