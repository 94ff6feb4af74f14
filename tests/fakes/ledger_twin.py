"""In-memory twins of the ledger, the status board and the job queue, for fast tests.

`tests/contract` holds the ledger's twin to the same promises as the one on SQL. The clock is this process's.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ncr_upload.application.ports import (
    AlreadyLive,
    BatchCounts,
    CancelAnswer,
    Figures,
    Idempotency,
    KeyReused,
    Memory,
    Page,
    Recording,
    Successor,
    Wanted,
    WorkerReport,
)
from ncr_upload.domain.batches import BatchLoad, Share, WorkerRoom, plan_room, release_next
from ncr_upload.domain.errors import CancelRequested, LeaseLost, Unavailable
from ncr_upload.domain.jobs import LIVE, Claim, Event, NewJob, Problem, Stage, Status, Task, may_follow, progress_percent
from ncr_upload.domain.packages import DeliveredFile, PackageFile, PackageSize, measure
from ncr_upload.domain.parking import FORGOTTEN_SECONDS, Parked, plan_probing
from ncr_upload.domain.retries import LOOKS, count_attempt


@dataclass
class _Row:
    task: Task
    claimable_at: float | None
    fence: int = 0
    publish_fence: int | None = None
    staging_due_at: float | None = None
    worker: str | None = None
    waits_for: str | None = None
    cancel_requested: bool = False
    files: tuple[PackageFile, ...] = ()
    events: list[Event] = field(default_factory=list)

    @property
    def is_live(self) -> bool:
        return self.task.status in LIVE

    @property
    def has_attempt_left(self) -> bool:
        looks = LOOKS if self.publish_fence is not None else 0
        return self.task.attempt < self.task.max_attempts + looks


@dataclass
class _Destination:
    parked: Parked
    probe_seconds: float
    healed_at: float | None = None


class MemoryLedger:
    """`Submissions`, `Claims`, `Recovery`, `Cleaning`, `Parking`, `Duties` and `History` in dictionaries."""

    def __init__(self, *, max_attempts: int = 3, clock: Callable[[], float] = time.time) -> None:
        self._max_attempts = max_attempts
        self._clock = clock
        self._rows: dict[str, _Row] = {}
        self._batches: dict[str, float] = {}
        self._conflicts: dict[str, list[AlreadyLive]] = {}
        self._keys: dict[str, tuple[str, list[Task]]] = {}
        self._destinations: dict[str, _Destination] = {}
        self._duties: dict[str, float] = {}
        self._lock = threading.RLock()

    # --- History

    def prune(self, keep_seconds: float, limit: int) -> int:
        before = self._clock() - keep_seconds

        def is_old(row: _Row) -> bool:
            return row.task.finished_at is not None and row.task.finished_at < before

        with self._lock:
            for batch_id, created_at in list(self._batches.items())[:limit]:
                mine = [row for row in self._rows.values() if row.task.batch_id == batch_id]
                if created_at < before and all(is_old(row) for row in mine):
                    del self._batches[batch_id]
            old = [
                task_id
                for task_id, row in self._rows.items()
                if is_old(row) and row.staging_due_at is None and row.task.batch_id not in self._batches
            ]
            for task_id in old[:limit]:
                del self._rows[task_id]
            self._keys = {
                key: (fingerprint, tasks) for key, (fingerprint, tasks) in self._keys.items() if tasks[0].created_at >= before
            }
        return len(old[:limit])

    # --- Submissions

    def accept(
        self,
        jobs: Sequence[NewJob],
        *,
        batch_id: str | None,
        release: int,
        remark: str = "accepted",
        skip_live: bool = False,
        idempotency: Idempotency | None = None,
    ) -> list[Task] | list[AlreadyLive] | KeyReused:
        with self._lock:
            if idempotency is not None and idempotency.key in self._keys:
                fingerprint, tasks = self._keys[idempotency.key]
                return tasks if fingerprint == idempotency.fingerprint else KeyReused(idempotency.key)
            running = {row.task.job_id: row.task.task_id for row in self._rows.values() if row.is_live}
            live = [AlreadyLive(job.job_id, running[job.job_id]) for job in jobs if job.job_id in running]
            if live and (not skip_live or len(live) == len(jobs)):
                return live
            jobs = [job for job in jobs if job.job_id not in running]
            now = self._clock()
            if batch_id is not None:
                self._batches[batch_id] = now
                self._conflicts[batch_id] = live
            held = f"{remark}; waits for its turn in the batch"
            accepted = [
                self._insert(job, batch_id, now, remark if index < release else held, released=index < release)
                for index, job in enumerate(jobs)
            ]
            if idempotency is not None:
                self._keys[idempotency.key] = (idempotency.fingerprint, accepted)
            return accepted

    def accept_each(self, wanted: Sequence[Wanted]) -> list[Task | AlreadyLive | KeyReused | Unavailable]:
        answers: list[Task | AlreadyLive | KeyReused | Unavailable] = []
        for each in wanted:
            try:
                found = self.accept([each.job], batch_id=None, release=1, remark=each.remark, idempotency=each.idempotency)
            except Unavailable as error:
                answers.append(error)
            else:
                answers.append(found if isinstance(found, KeyReused) else found[0])
        return answers

    def _insert(self, job: NewJob, batch_id: str | None, now: float, message: str, *, released: bool) -> Task:
        task = Task(
            task_id=str(uuid.uuid4()),
            job_id=job.job_id,
            username=job.username,
            campaign=job.campaign,
            row_id=job.row_id,
            batch_id=batch_id,
            status=Status.PENDING,
            stage=Stage.QUEUED,
            progress=0.0,
            message=message,
            attempt=0,
            max_attempts=self._max_attempts,
            created_at=now,
            updated_at=now,
            due_at=now if released else None,
        )
        row = self._rows[task.task_id] = _Row(task, now if released else None)
        self._note(row, "accepted", f"user {job.username}", task.message)
        return task

    def task(self, task_id: str) -> Task | None:
        row = self._rows.get(task_id)
        return row.task if row is not None else None

    def tasks(self, task_ids: Sequence[str]) -> list[Task | None]:
        return [self.task(task_id) for task_id in task_ids]

    def cancel(self, task_id: str) -> CancelAnswer | None:
        with self._lock:
            row = self._rows.get(task_id)
            if row is None:
                return None
            if not row.is_live:
                return CancelAnswer.CANCELLED if row.task.status is Status.CANCELLED else CancelAnswer.ENDED
            if row.publish_fence is not None:
                return CancelAnswer.PUBLISHING
            row.cancel_requested = True
            if row.worker is not None:
                self._note(row, "cancel_requested", "api", "the caller asked for the job to be cancelled")
                return CancelAnswer.REQUESTED
            row.fence += 1
            row.claimable_at = None
            problem = Problem("cancelled", "cancelled", "the caller cancelled the job", "Submit the job again if needed.")
            self._change(row, status=Status.CANCELLED, message=problem.message, problem=problem, finished_at=self._clock())
            self._note(row, "cancelled", "api", problem.message)
            return CancelAnswer.CANCELLED

    def history(self, task_id: str) -> list[Event]:
        row = self._rows.get(task_id)
        return list(row.events) if row is not None else []

    def active(
        self, *, username: str | None, campaign: str | None, status: Status | None, limit: int, cursor: str | None
    ) -> Page:
        def wanted(task: Task) -> bool:
            return all(
                value in (None, found)
                for value, found in ((username, task.username), (campaign, task.campaign), (status, task.status))
            )

        with self._lock:
            return self._page(lambda row: row.is_live and wanted(row.task), limit, cursor)

    def batch(self, batch_id: str, *, limit: int, cursor: str | None) -> tuple[BatchCounts, Page] | None:
        with self._lock:
            if batch_id not in self._batches:
                return None
            tasks = [row.task for row in self._rows.values() if row.task.batch_id == batch_id]
            page = self._page(lambda row: row.task.batch_id == batch_id, limit, cursor)
            ended = all(task.finished_at for task in tasks)
            counts = BatchCounts(
                batch_id,
                self._clock(),
                self._batches[batch_id],
                updated_at=max(task.updated_at for task in tasks),
                moved_at=max(task.finished_at or task.started_at or task.created_at for task in tasks),
                shares=_shares(tasks),
                started_at=min((task.started_at for task in tasks if task.started_at), default=None),
                finished_at=max((task.finished_at for task in tasks if task.finished_at), default=None) if ended else None,
                conflicts=tuple(self._conflicts[batch_id]),
            )
            return counts, page

    def conflicts(self, batch_id: str) -> list[AlreadyLive]:
        return self._conflicts[batch_id]

    def unsuccessful(self, batch_id: str) -> list[NewJob] | None:
        with self._lock:
            if batch_id not in self._batches:
                return None
            tasks = [row.task for row in self._rows.values() if row.task.batch_id == batch_id]
            failed = [task for task in tasks if task.status in (Status.FAILED, Status.VALIDATION_FAILED)]
            return [NewJob(task.job_id, task.username, task.campaign, task.row_id) for task in failed]

    def cancel_batch(self, batch_id: str) -> dict[CancelAnswer, int] | None:
        with self._lock:
            if batch_id not in self._batches:
                return None
            tasks = [row.task for row in self._rows.values() if row.task.batch_id == batch_id]
            return dict(Counter(answer for task in tasks if (answer := self.cancel(task.task_id))))

    def _page(self, wanted: Callable[[_Row], bool], limit: int, cursor: str | None) -> Page:
        found = [(position, row.task) for position, row in enumerate(self._rows.values(), 1) if wanted(row)]
        after = [(position, task) for position, task in found if position > int(cursor or 0)]
        shown = after[:limit]
        more = len(after) > limit
        return Page(tuple(task for _, task in shown), len(found), str(shown[-1][0]) if more else None)

    # --- Claims

    def claim(self, task_id: str, worker: str, lease_seconds: float) -> Claim | None:
        with self._lock:
            row = self._rows.get(task_id)
            if row is None or not self._is_due(row) or not row.has_attempt_left:
                return None
            now = self._clock()
            taken_over = f"the lease of worker {row.worker} ran out, and another worker has taken the job over"
            why = "a worker has taken the job" if row.worker is None else taken_over
            row.fence += 1
            row.worker = worker
            row.waits_for = None
            row.claimable_at = now + lease_seconds
            self._change(
                row,
                status=Status.PROCESSING,
                stage=Stage.LOOKUP,
                message=why,
                attempt=row.task.attempt + 1,
                started_at=row.task.started_at or now,
                due_at=None,
                problem=None,
            )
            self._note(row, "claimed", worker, f"{why}: {count_attempt(row.task.attempt, row.task.max_attempts)} begins")
            return Claim(row.task, row.fence, worker, lease_seconds, row.cancel_requested, row.publish_fence)

    def renew(self, claim: Claim) -> None:
        with self._lock:
            row = self._owned(claim)
            if row.cancel_requested:
                raise CancelRequested(claim.task.task_id)
            row.claimable_at = self._clock() + claim.lease_seconds

    def delivered_files(self, job_id: str) -> list[DeliveredFile]:
        with self._lock:
            done = [row for row in self._rows.values() if row.task.job_id == job_id and row.task.status is Status.COMPLETED]
            return [
                DeliveredFile(file.target, file.size, file.sha256, file.mtime)
                for file in (done[-1].files if done else ())
                if file.mtime is not None
            ]

    def package_sizes(self, task_id: str) -> dict[str, int]:
        return {file.target: file.size for file in self._rows[task_id].files}

    def advance(
        self,
        claim: Claim,
        *,
        status: Status,
        stage: Stage,
        message: str,
        also: Recording | None = None,
        sku: str | None = None,
        verdict: str | None = None,
        size: PackageSize | None = None,
        files: Sequence[PackageFile] | None = None,
        announce_staging: bool = False,
        announce_publish: bool = False,
        retract_publish: bool = False,
    ) -> None:
        with self._lock:
            row = self._movable(claim, status)
            if announce_publish and row.cancel_requested:
                raise CancelRequested(claim.task.task_id)
            if retract_publish:
                row.publish_fence = None
            if announce_staging:
                row.staging_due_at = self._clock()
            if also is not None:
                also(None)
            facts: dict[str, Any] = {"sku": sku, "verdict": verdict}
            if files is not None:
                row.files, size = tuple(files), measure(files)
            if size is not None:
                facts |= {"files": size.files, "bytes": size.bytes}
            if announce_publish:
                row.publish_fence = claim.fence
            known = {name: value for name, value in facts.items() if value is not None}
            self._change(row, status=status, stage=stage, message=message, **known)
            self._note(row, "stage", claim.worker, message)

    def finish(
        self,
        claim: Claim,
        *,
        status: Status,
        stage: Stage,
        message: str,
        problem: Problem | None,
        also: Recording | None = None,
    ) -> Task:
        with self._lock:
            row = self._rows[claim.task.task_id]
            if row.task.status is status and row.fence == claim.fence:
                return row.task
            row = self._movable(claim, status)
            if also is not None:
                also(None)
            if row.staging_due_at is not None:
                row.staging_due_at = self._clock() + 10
            row.claimable_at = None
            self._change(row, status=status, stage=stage, message=message, problem=problem, finished_at=self._clock())
            self._note(row, status.value, claim.worker, message)
            return row.task

    def put_back(
        self,
        claim: Claim,
        *,
        problem: Problem,
        message: str,
        delay_seconds: float,
        spend_attempt: bool,
        waits_for: str | None = None,
    ) -> Task:
        with self._lock:
            row = self._movable(claim, Status.PENDING)
            if row.cancel_requested:
                raise CancelRequested(claim.task.task_id)
            row.worker = None
            row.waits_for = waits_for
            row.claimable_at = self._clock() + delay_seconds
            self._change(
                row,
                status=Status.PENDING,
                stage=Stage.QUEUED,
                message=message,
                problem=problem,
                attempt=row.task.attempt - (0 if spend_attempt else 1),
                due_at=row.claimable_at,
            )
            self._note(row, "put_back", claim.worker, message)
            return row.task

    # --- Recovery

    def due(self, limit: int, but_newest: int = 0) -> list[str]:
        due = self._claimable(limit + but_newest, abandoned=False)
        return due[: max(0, len(due) - but_newest)]

    def abandoned(self, limit: int) -> list[str]:
        return self._claimable(limit, abandoned=True)

    def _claimable(self, limit: int, *, abandoned: bool) -> list[str]:
        with self._lock:
            found = [row for row in self._rows.values() if self._is_due(row) and row.has_attempt_left]
            due = [row for row in found if (row.worker is not None) is abandoned]
            return [row.task.task_id for row in sorted(due, key=lambda row: row.claimable_at or 0)[:limit]]

    def exhausted(self, limit: int) -> list[Task]:
        with self._lock:
            rows = [row for row in self._rows.values() if self._is_due(row) and not row.has_attempt_left]
            return [row.task for row in rows[:limit]]

    def give_up(self, task: Task, problem: Problem) -> bool:
        with self._lock:
            row = self._rows[task.task_id]
            if not self._is_due(row) or row.task.attempt != task.attempt:
                return False
            row.fence += 1
            row.claimable_at = None
            self._change(
                row, status=Status.FAILED, message=problem.message, problem=problem, finished_at=self._clock(), due_at=None
            )
            self._note(row, Status.FAILED.value, "sweeper", problem.message)
            return True

    def release_batch_jobs(self, batch_size: int, workers: Sequence[WorkerRoom] = ()) -> list[str]:
        with self._lock:
            live = [row for row in self._rows.values() if row.is_live and row.task.batch_id is not None]
            held = {batch_id: [row for row in live if self._is_held(row, batch_id)] for batch_id in self._batches}
            loads = [
                BatchLoad(batch_id, sum(row.task.batch_id == batch_id for row in live) - len(rows), len(rows))
                for batch_id, rows in held.items()
            ]
            room = plan_room(workers, in_flight=sum(load.in_flight for load in loads))
            released = []
            for batch_id, count in release_next(loads, batch_size=batch_size, room=room).items():
                for row in held[batch_id][:count]:
                    row.claimable_at = self._clock()
                    self._change(row, message="accepted", due_at=row.claimable_at)
                    released.append(row.task.task_id)
            return released

    @staticmethod
    def _is_held(row: _Row, batch_id: str) -> bool:
        return row.task.batch_id == batch_id and row.claimable_at is None

    # --- Cleaning

    def find_statuses(self, task_ids: Sequence[str]) -> dict[str, Status]:
        with self._lock:
            return {task_id: self._rows[task_id].task.status for task_id in task_ids if task_id in self._rows}

    def unclean(self, limit: int) -> list[str]:
        with self._lock:
            return [task_id for task_id, row in self._rows.items() if self._is_unclean(row)][:limit]

    def take_cleaning(self, task_id: str, hold_seconds: float) -> bool:
        with self._lock:
            row = self._rows.get(task_id)
            if row is None or not self._is_unclean(row):
                return False
            row.staging_due_at = self._clock() + hold_seconds
            return True

    def cleaned(self, task_id: str) -> None:
        self._rows[task_id].staging_due_at = None

    def find_successor(self, task_id: str) -> Successor:
        with self._lock:
            if task_id not in self._rows:
                return Successor.UNKNOWN
            tasks = list(self._rows)
            job_id = self._rows[task_id].task.job_id
            since = [self._rows[each] for each in tasks[tasks.index(task_id) :] if self._rows[each].task.job_id == job_id]
            if any(row.task.status is Status.COMPLETED for row in since):
                return Successor.DELIVERED
            return Successor.UNKNOWN if any(row.is_live for row in since) else Successor.NONE

    def note_kept(self, task_id: str, message: str) -> None:
        with self._lock:
            row = self._rows[task_id]
            if row.events[-1].message != message:
                self._note(row, "kept", "janitor", message)

    def ended_long_ago(self, task_ids: Sequence[str], seconds: float) -> dict[str, bool]:
        found = {task_id: self._rows[task_id].task.finished_at for task_id in task_ids if task_id in self._rows}
        return {task_id: at is not None and self._clock() - at > seconds for task_id, at in found.items()}

    def forget_keys(self, seconds: float) -> int:
        with self._lock:
            kept = {key: first for key, first in self._keys.items() if self._clock() - first[1][0].created_at <= seconds}
            forgotten = len(self._keys) - len(kept)
            self._keys = kept
            return forgotten

    def _is_unclean(self, row: _Row) -> bool:
        return not row.is_live and row.staging_due_at is not None and row.staging_due_at <= self._clock()

    # --- Parking

    def park(self, destination: str, problem: Problem, probe_seconds: float) -> tuple[Parked, bool]:
        with self._lock:
            known = self._destinations.get(destination)
            if known is not None and self._is_parked(known):
                return self._read_parked(known), False
            now = self._clock()
            healthy = now - known.healed_at if known is not None and known.healed_at is not None else None
            seconds = plan_probing(probe_seconds, known.probe_seconds if known else None, healthy)
            parked = Parked(destination, now, problem.code, problem.message, problem.next_step, now + seconds, seconds, 0)
            self._destinations[destination] = _Destination(parked, seconds)
            return parked, True

    def find_parked(self, destination: str) -> Parked | None:
        known = self._destinations.get(destination)
        return self._read_parked(known) if known is not None and self._is_parked(known) else None

    def _is_parked(self, known: _Destination) -> bool:
        return known.healed_at is None and known.parked.probe_at > self._clock() - FORGOTTEN_SECONDS

    def _read_parked(self, known: _Destination) -> Parked:
        return replace(known.parked, seconds_to_probe=max(0.0, known.parked.probe_at - self._clock()))

    def probe_due(self) -> bool:
        return any(self._probe_is_due(known) for known in self._destinations.values())

    def _probe_is_due(self, known: _Destination) -> bool:
        return self._is_parked(known) and known.parked.probe_at <= self._clock()

    def take_probe(self, destination: str, hold_seconds: float) -> bool:
        with self._lock:
            known = self._destinations.get(destination)
            if known is None or not self._probe_is_due(known):
                return False
            known.parked = replace(known.parked, probe_at=self._clock() + hold_seconds)
            return True

    def stay_parked(
        self, destination: str, problem: Problem, *, tell: Callable[[Parked], str], wait_seconds: float, park_seconds: float
    ) -> None:
        with self._lock:
            known = self._destinations.get(destination)
            if known is None or known.healed_at is not None:
                return
            cause = {"code": problem.code, "message": problem.message, "next_step": problem.next_step}
            probe_at = self._clock() + known.probe_seconds
            known.parked = replace(known.parked, probe_at=probe_at, probes=known.parked.probes + 1, **cause)
            for row in self._waiting_for(destination):
                row.claimable_at = min(probe_at + wait_seconds, row.task.created_at + park_seconds)
                message = tell(self._read_parked(known))
                row.task = replace(row.task, message=message, problem=problem, due_at=row.claimable_at)

    def heal(self, destination: str, message: str) -> int:
        with self._lock:
            if destination in self._destinations and self._destinations[destination].healed_at is None:
                self._destinations[destination].healed_at = self._clock()
            waiting = self._waiting_for(destination)
            for row in waiting:
                row.waits_for, row.claimable_at = None, self._clock()
                self._change(row, message=message, problem=None, due_at=row.claimable_at)
                self._note(row, "unparked", "probe", message)
            return len(waiting)

    def _waiting_for(self, destination: str) -> list[_Row]:
        return [row for row in self._rows.values() if row.waits_for == destination and row.worker is None and row.is_live]

    # --- Duties

    def due_duties(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if self._duties.get(name, 0) <= self._clock()]

    def take_duty(self, name: str, every_seconds: float) -> bool:
        with self._lock:
            due = self._duties.get(name, 0) <= self._clock()
            if due:
                self._duties[name] = self._clock() + every_seconds
            return due

    # --- for tests

    def make_probe_due(self, seconds_ago: float) -> None:
        for known in self._destinations.values():
            known.parked = replace(known.parked, probe_at=self._clock() - seconds_ago)

    def set_time(self, column: str, task_id: str) -> None:
        """A column that holds a time, to long ago, if it is set."""
        row = self._rows[task_id]
        if not hasattr(row, column):
            row.task = replace(row.task, **{column: 1.0})
        elif getattr(row, column) is not None:
            setattr(row, column, 1.0)

    # --- inside

    def _is_due(self, row: _Row) -> bool:
        return row.is_live and row.claimable_at is not None and row.claimable_at <= self._clock()

    def _owned(self, claim: Claim) -> _Row:
        row = self._rows[claim.task.task_id]
        if row.fence != claim.fence or not row.is_live or row.worker is None:
            raise LeaseLost(claim.task.task_id, claim.fence)
        return row

    def _movable(self, claim: Claim, status: Status) -> _Row:
        row = self._owned(claim)
        if row.task.status is not status and not may_follow(row.task.status, status):
            raise LeaseLost(claim.task.task_id, claim.fence)
        return row

    def _change(self, row: _Row, **changes: Any) -> None:
        task = replace(row.task, updated_at=self._clock(), **changes)
        row.task = replace(task, progress=progress_percent(task.stage), publish_announced=row.publish_fence is not None)

    def _note(self, row: _Row, kind: str, actor: str, message: str) -> None:
        row.events.append(Event(self._clock(), row.task.attempt, row.task.stage, kind, actor, message))


REDIS_AWAY = Unavailable("redis_unavailable", "Redis at nowhere:1 did not answer", "Check that Redis runs.")


def _shares(tasks: Sequence[Task]) -> tuple[Share, ...]:
    places = sorted({(task.status, task.stage) for task in tasks})
    there = {place: [task for task in tasks if (task.status, task.stage) == place] for place in places}
    return tuple(
        Share(*place, len(found), sum(task.bytes is not None for task in found), sum(task.bytes or 0 for task in found))
        for place, found in there.items()
    )


class MemoryStatusBoard:
    """`StatusBoard` in a dictionary. `away`: as if Redis had gone; `frozen`: calls wait until it is set."""

    def __init__(self) -> None:
        self.away = False
        self.thawed = threading.Event()
        self.thawed.set()
        self._views: dict[str, tuple[int, bool, str]] = {}

    def post(self, views: Sequence[dict[str, Any]], *, live: bool, fence: int = 0) -> None:
        self.ping()
        for view in views:
            stored_fence, stored_live, _ = self._views.get(view["task_id"], (fence, True, ""))
            if stored_fence < fence or (stored_fence == fence and (stored_live or not live)):
                self._views[view["task_id"]] = (fence, live, json.dumps(view))

    def read(self, task_ids: Sequence[str]) -> list[dict[str, Any] | None]:
        self.ping()
        stored = [self._views.get(task_id) for task_id in task_ids]
        return [None if each is None else json.loads(each[2]) for each in stored]

    def ping(self) -> None:
        self.thawed.wait()
        if self.away:
            raise REDIS_AWAY


class MemoryJobQueue:
    """`JobQueue` in a list. `away` and `thawed` as for the board."""

    def __init__(self, *, workers: Sequence[str] = ()) -> None:
        self.away = False
        self.thawed = threading.Event()
        self.thawed.set()
        self.rung: list[str] = []
        self.rung_first: list[str] = []
        self.duties: list[str] = []
        self._workers = workers

    def ring(self, task_ids: Sequence[str], *, first: bool = False) -> None:
        self._answer()
        (self.rung_first if first else self.rung).extend(task_ids)

    def ring_duty(self, name: str) -> None:
        self._answer()
        self.duties.append(name)

    def depth(self, *, first: bool = False) -> int:
        self._answer()
        return len(self.rung_first if first else self.rung)

    def workers(self) -> dict[str, Any]:
        self._answer()
        return {question: {name: [] for name in self._workers} for question in ("active", "scheduled", "stats")}

    def is_worker_alive(self) -> bool:
        self._answer()
        return bool(self._workers)

    def _answer(self) -> None:
        self.thawed.wait()
        if self.away:
            raise REDIS_AWAY


class MemoryWorkerReports:
    """`WorkerReports` in a dictionary."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._reports: dict[str, WorkerReport] = {}

    def report(self, report: WorkerReport) -> None:
        self._reports[report.worker] = replace(report, seen_at=self._clock())

    def recent(self, within_seconds: float) -> list[WorkerReport]:
        since = self._clock() - within_seconds
        return [self._reports[name] for name in sorted(self._reports) if self._reports[name].seen_at >= since]

    def leave(self, worker: str) -> None:
        self._reports.pop(worker, None)


class MemoryStatistics:
    """`Statistics` with the figures it is given."""

    def __init__(self) -> None:
        self.told = Figures({}, {}, 0.0, 0)
        self.stalled_batches: list[str] = []

    def figures(self, batch_timeout_seconds: float) -> Figures:
        return self.told

    def stalled(self, batch_timeout_seconds: float) -> list[str]:
        return self.stalled_batches


class MemoryHost:
    """`Host` with the figures it is given."""

    def __init__(self, used: int = 20, total: int = 100) -> None:
        self.figures = Memory(used, total, "host")

    def memory(self) -> Memory:
        return self.figures

    def process_memory(self, *, children: bool = False) -> int:
        return 2 if children else 1

    def free_disk(self, path: object) -> int:
        return 10**12

    def total_disk(self, path: object) -> int:
        return 10**13
