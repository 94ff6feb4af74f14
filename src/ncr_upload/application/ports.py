"""What the use cases need of the outside world. Each port says what it promises and what it raises.

Ports that move bytes are asynchronous; ports that keep records are synchronous and short (time-outs of a
few seconds inside). Every method may raise `Unavailable` when its part cannot be reached.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ncr_upload.domain.batches import Share, WorkerRoom
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import Claim, Event, NewJob, Problem, Stage, Status, Task
from ncr_upload.domain.packages import DeliveredFile, PackageFile, PackageSize, SourceFile
from ncr_upload.domain.parking import Parked

if TYPE_CHECKING:
    from ncr_upload.application.arrivals import Arrival, Follower, Turns

OnBytes = Callable[[int], None]
"""Told how many more bytes have moved; called from the event loop, must not block."""

Recording = Callable[[Any], str | None]
"""Rows to write inside the ledger's own transaction. The argument is that transaction and is the adapters' own affair; the
result, if any, is a remark for the task's history."""


# --- the machine, in figures --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `source` says what was read: 'cgroup2', 'cgroup1' or 'host'."""

    used: int
    total: int
    source: str

    @property
    def used_percent(self) -> float:
        return 100.0 * self.used / self.total if self.total else 0.0


# --- object storage ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    key: str
    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """A downloaded object. `sha256` is lower-case hex."""

    size: int
    sha256: str
    crc32: int
    etag: str


class ObjectStore(Protocol):
    """The bucket the job's files are in. `source` names it: objects of the same source, key, size and ETag are the same bytes,
    checked in the same way."""

    @property
    def source(self) -> str: ...

    async def stat(self, key: str) -> ObjectInfo:
        """Size and ETag of an object. Raises `Rejected` ('object_missing', 'storage_denied'), `Unavailable`."""

    async def glance(self, keys: Sequence[str]) -> Mapping[str, ObjectInfo]:
        """What a list of their folder tells of these objects, for less than `stat` of each: of some, perhaps of none, and where
        a store's lists lag behind, perhaps not as they are now. It is no failure if there is none."""

    async def fetch(
        self,
        key: str,
        to: Path,
        on_bytes: OnBytes,
        *,
        known: ObjectInfo | None = None,
        turns: Turns | None = None,
        follower: Follower | None = None,
    ) -> Fetched:
        """Download into `to`, which exists only once it is complete and its size and MD5 ETag (where it is one) agree.
        Hashes once; memory is bounded by the chunks of the requests that are under way. Raises as `stat`; wrong bytes are
        `Unavailable`. A large object that is `known` is fetched over several requests at once, each of which waits for its
        turn; `follower` is told how much of its beginning has come."""


# --- the zip ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A package file with its place on this host's disk."""

    file: PackageFile
    path: Path


class Zip(Protocol):
    """A zip while it is made, for a thread: it waits there for the files that have still to arrive."""

    def __iter__(self) -> Iterator[bytes]:
        """Once. Raises `PackageChanged` for a file that is not on the disk as it was downloaded."""

    def stop(self) -> None:
        """Nobody wants it any more: a thread that waits is freed, by an exception."""


class Archiver(Protocol):
    """Makes the zip the validator judges."""

    def stream(self, files: Sequence[Arrival]) -> Zip:
        """The zip, while its files arrive. The same files in the same order give the same bytes; only the packing of deflated
        entries depends on the host's zlib."""


# --- the validator ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """The validator's answer. `result` is 'Valid' or 'Warning' when `passed`, else what it said.

    `http_status` and `body` are kept as the validator sent them (for `model_validation`); `reasons` are its findings
    in words, worst first.
    """

    passed: bool
    result: str
    http_status: int
    body: str
    reasons: tuple[str, ...] = ()


class Validator(Protocol):
    """Judges the zip of a package."""

    @property
    def url(self) -> str:
        """Where it is asked, without any secret in it."""

    async def judge(self, sku: str, package: Iterable[bytes]) -> Verdict:
        """Post the zip, which is read in a thread that no cancellation waits for, and read the verdict. An answer that is
        neither a pass nor a "no" raises `Unavailable`; when it was an HTTP answer, the exception's `http_status` attribute is
        its status (else None)."""


# --- the destination --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Staged:
    """What need not be sent again. Kept is what an earlier attempt had staged: whole files, and bytes, those of parts included.
    Linked is what the previous delivery has unchanged. `mtimes`: see `PackageFile.mtime`, by target."""

    kept_files: int
    kept_bytes: int
    linked_files: int = 0
    linked_bytes: int = 0
    mtimes: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def remark(self) -> str:
        """For the timeline; empty when everything was sent."""
        kept = f" ({self.kept_bytes} bytes were there from the attempt before)" if self.kept_bytes else ""
        linked = f" ({self.linked_files} files, {self.linked_bytes} bytes, were linked from the previous delivery)"
        return kept + (linked if self.linked_files else "")


@dataclass(frozen=True, slots=True)
class Previous:
    """What was delivered last as `job_id`, as far as it is known by hash, size and time."""

    job_id: str
    files: Sequence[DeliveredFile]


class Dropoff(Protocol):
    """The partner's SFTP folder. One session per attempt; see docs/adr for how renames fence and publish.

    Raises `DestinationParked` for what an operator must mend there (disk full, quota, login refused, host key
    differs), `Unavailable` for what may heal by itself.
    """

    @property
    def destination(self) -> str:
        """Server, folder and login name in one line, no secret in it."""

    def session(self, patience_seconds: float = 0) -> AbstractAsyncContextManager[DropoffSession]:
        """Connect, with the host key pinned. Raises `Deferred` when all workers together have all the connections they may, for
        some seconds or for as long as the caller's patience, if that is more."""


class Sharing(Protocol):
    """What all workers, on every host, share of a destination. Only the database's clock counts. Every method may raise
    `Unavailable`."""

    def take_connection(self, destination: str, holder: str, most: int, leave: int, lease_seconds: float) -> int | None:
        """The number of one of the `most` connections, held from now on until it is given back or its lease runs out; None
        when no more than `leave` of them are free."""

    def renew_connections(self, holder: str, count: int, lease_seconds: float) -> bool:
        """Hold on to those `count` that the holder has; False when one was lost."""

    def release_connections(self, holder: str, slot: int | None = None) -> None:
        """Give back one, or all that the holder has."""

    def book_bytes(self, destination: str, count: int, bytes_per_second: float) -> float:
        """Book the next `count` bytes at this rate; in how many seconds they may begin."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """A staging folder. `task_id` is None for one of a probe. `idle_seconds`, by the server's own clock, is how long nothing in
    it has changed; 0 where the server does not tell."""

    name: str
    task_id: str | None
    idle_seconds: float


class Successor(StrEnum):
    """What has come after a package that is no longer wanted."""

    NONE = "none"
    """Nothing: what it had set aside is put back."""
    DELIVERED = "delivered"
    """It was delivered itself, or a later task of its job was: what it had set aside may go."""
    UNKNOWN = "unknown"
    """Somebody else may have put what has the final name there: it is not touched."""


@dataclass(frozen=True, slots=True)
class AnnouncedPublish:
    """What an earlier attempt was about to publish, by the ledger: size of each file, by target."""

    job_id: str
    files: Mapping[str, int]


class DropoffSession(Protocol):
    async def probe(self, parked_for: str = "") -> None:
        """Raise why no job could be delivered now: what a delivery does is tried in a scratch folder. `parked_for` is the code
        of the failure that the destination is parked for: what failed then must work again too."""

    async def adopt(self, task_id: str, fence: int, announced: AnnouncedPublish | None = None) -> str:
        """Make the staging folder `{task_id}-{fence}` this attempt's own. One rename takes over what an older fence
        staged, which also takes it away from any worker that still holds the older fence. A publish that broke off is waited
        for until nothing moves, then finished file by file if it was `announced`, else undone: a delivery that was set aside
        for a package that did not follow is put back at once. Return a remark for the history if files were moved. Raises
        `PublishUnsettled` when the publish can be neither finished nor undone."""

    async def stage(
        self,
        task_id: str,
        fence: int,
        files: AsyncIterator[Arrival],
        on_bytes: OnBytes,
        previous: Previous | None = None,
    ) -> Staged:
        """Upload the files into the staging folder, large ones while they arrive; after the last, verify every size. A file is
        there under its name only once what was sent of it has the hash that it has since it is whole. Files that an
        earlier attempt staged whole and with the same hash are kept, and those it staged in part are continued; what the
        previous delivery has unchanged is linked, where the server can, and never written into; whatever else is there goes.
        A failure of `files` ends it and is raised. When the disk is full, everything staged goes. If it is cancelled, what was
        staged stays for the next attempt, or for `discard`."""

    async def publish(self, task_id: str, fence: int, job_id: str, between: Callable[[], None]) -> str:
        """Rename the staged package to `{base}/{job_id}`; an existing delivery is first renamed aside, then `between` called.
        Return once every file has been listed there, with a remark for the history if files had to be moved one by one.
        Idempotent for the owner of the fence; for anyone else it fails and changes nothing that is visible.

        Raises `NotPublished` when it has not happened and all is as before, `PublishUnsettled` when a part of it has, and
        `Unavailable` when nobody can tell."""

    async def is_published(self, task_id: str, fence: int) -> bool:
        """Return whether every file of the package of this fence is listed under its final name (asked after `adopt`, when
        an earlier attempt had announced a publish and its answer was lost)."""

    async def leftovers(self) -> list[Leftover]:
        """Every staging folder there is, whoever made it."""

    async def clear(self, leftover: Leftover, successor: Successor = Successor.UNKNOWN) -> None:
        """Remove that folder, as `discard` does."""

    async def discard(self, task_id: str, successor: Successor = Successor.NONE) -> None:
        """Remove every staging folder of the task, whatever its fence. What was set aside and not replaced is put back first.
        Raises `Unavailable` ('previous_kept') rather than remove what nothing has replaced."""


# --- the studio's database --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StudioJob:
    """The `job_details` row of a job. `awaiting` is `is_uploaded = 1`."""

    row_id: int
    sku: str
    awaiting: bool


class Catalogue(Protocol):
    """The studio's tables: read, and written only inside the ledger's transactions (see `Recording`)."""

    def find_job(self, job_id: str, row_id: int | None) -> StudioJob:
        """The active row of the job. Raises `Rejected` ('sku_not_found', 'sku_ambiguous', 'row_mismatch')."""

    def list_files(self, job_id: str) -> Sequence[SourceFile]:
        """Every `file_type='base'` row of the job, in no particular order."""

    def delivered(self, task: Task, sku: str) -> Recording:
        """The rows of a delivery."""

    def rehearsed(self, task: Task, sku: str) -> Recording:
        """`delivered`, tried and taken back: whatever refuses those rows does so before the package is visible. Nothing is
        tried where nothing can be taken back. Raises `Rejected` ('database_row_refused') for a row that no try will get in."""

    def foreseen(self, task: Task, sku: str) -> Recording | None:
        """Return `rehearsed` for before the first download, or None where the tables have just taken the same user's rows."""

    def judged(self, task: Task, verdict: Verdict) -> Recording:
        """The validator's newest answer about the job."""

    def refused(self, task: Task, sku: str, verdict: Verdict, api_url: str) -> Recording:
        """The rows of a validator's "no", `judged` included."""

    def unanswered(self, task: Task, sku: str, http_status: int, api_url: str) -> Recording:
        """The row of a non-200 answer that is no verdict."""


# --- the ledger -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AlreadyLive:
    """`job_id` is in flight as `task_id`."""

    job_id: str
    task_id: str


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A caller's key for one request, and the SHA-256 (hex) of what was asked."""

    key: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class KeyReused:
    """The key was used before, for another request."""

    key: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """A job that a caller wants on its own. `remark` begins its history."""

    job: NewJob
    remark: str = "accepted"
    idempotency: Idempotency | None = None


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """How the tasks of a batch stand. Times are seconds since the epoch by the ledger's clock; `now` is when it was asked.
    `moved_at` is when one of them last started or ended, or else when they were accepted. `conflicts` are the jobs that were
    left out of it because they were in flight already."""

    batch_id: str
    now: float
    created_at: float
    updated_at: float
    moved_at: float
    shares: tuple[Share, ...]
    started_at: float | None = None
    finished_at: float | None = None
    conflicts: tuple[AlreadyLive, ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """`cursor` asks for the next page; None on the last."""

    tasks: tuple[Task, ...]
    total: int
    cursor: str | None


class CancelAnswer(StrEnum):
    """What became of the wish to cancel a task."""

    CANCELLED = "cancelled"
    REQUESTED = "requested"
    """A worker has it, and stops within LEASE_RENEW_SECONDS."""
    PUBLISHING = "publishing"
    """Too late: its package is being published, or may have been."""
    ENDED = "ended"


class Submissions(Protocol):
    """The ledger as callers see it: what was accepted, and what became of it."""

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
        """Write all jobs in one transaction, the first `release` of them ready to claim, or none of them: then the
        answer names those already live. The database, not a check before it, decides who is first. With `skip_live` the
        jobs of a batch that are live are left out and noted as its conflicts, unless no job would remain. `remark` begins
        the history. A request repeated with its `idempotency` is answered with the tasks of the first time, as they were
        when they were accepted, and accepts nothing."""

    def accept_each(self, wanted: Sequence[Wanted]) -> list[Task | AlreadyLive | KeyReused | Unavailable]:
        """Each job on its own, as `accept` would in turn, with the fewest transactions: the answer for each, in this order.
        `Unavailable` is one of them and not raised, since others may have been written by then."""

    def task(self, task_id: str) -> Task | None: ...

    def tasks(self, task_ids: Sequence[str]) -> list[Task | None]:
        """The same of many at once."""

    def cancel(self, task_id: str) -> CancelAnswer | None:
        """Cancel a waiting task at once, ask a running one's worker to stop; None for an id never issued. A task is
        either cancelled or published, never both."""

    def history(self, task_id: str) -> list[Event]: ...

    def active(
        self, *, username: str | None, campaign: str | None, status: Status | None, limit: int, cursor: str | None
    ) -> Page: ...

    def batch(self, batch_id: str, *, limit: int, cursor: str | None) -> tuple[BatchCounts, Page] | None: ...

    def conflicts(self, batch_id: str) -> list[AlreadyLive]:
        """The jobs that were left out of the batch, each with the task that was in flight then."""

    def cancel_batch(self, batch_id: str) -> dict[CancelAnswer, int] | None:
        """Cancel every task of the batch as `cancel` does, in one transaction: how many got which answer; None for an id
        never issued."""

    def unsuccessful(self, batch_id: str) -> list[NewJob] | None:
        """The batch's jobs that failed or that the validator refused; None for an id never issued."""


class Claims(Protocol):
    """The ledger as a worker sees it. Every write names the claim's fence and raises `LeaseLost` when it is stale."""

    def claim(self, task_id: str, worker: str, lease_seconds: float) -> Claim | None:
        """Take the task if it is due and nobody's lease is running; None otherwise."""

    def delivered_files(self, job_id: str) -> Sequence[DeliveredFile]:
        """The files of the last completed task of the job, those whose `mtime` is known."""

    def package_sizes(self, task_id: str) -> Mapping[str, int]:
        """Return the size of each file of the task's package by target, as of the last time it was announced."""

    def renew(self, claim: Claim) -> None:
        """Extend the lease from the database's now. Raises `LeaseLost`, `CancelRequested`."""

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
        """Write the new status, a history line and `also`, in one transaction. `size` is the package's, as soon as it is
        known; `files` say it again. `announce_staging` notes, before anything
        is sent, that there may be staging folders to remove (see `Cleaning`); `announce_publish`, before the renames, that
        this fence is about to publish, and raises `CancelRequested` when the caller was faster; `retract_publish`, that an
        earlier announced publish has not happened."""

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
        """End the task in a terminal status, in the stage where it ended, with `also`, in one transaction; the task as it is
        then.

        If the commit's answer is lost, the row itself is asked; calling it again after it worked is harmless.
        """

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
        """Give the task back to wait `delay_seconds`, or until the parked destination `waits_for` is healed; an unspent
        attempt is not counted. The task as it is then. Raises `CancelRequested` when the caller has cancelled it meanwhile."""


class Recovery(Protocol):
    """The ledger as the sweeper sees it."""

    def due(self, limit: int, but_newest: int = 0) -> list[str]:
        """Waiting tasks that are due, oldest first, without the newest of them, which may be many."""

    def abandoned(self, limit: int) -> list[str]:
        """Tasks that could be claimed now because their worker's lease ran out, oldest first."""

    def exhausted(self, limit: int) -> list[Task]:
        """Live tasks with an expired lease and no attempt left (their worker died each time)."""

    def give_up(self, task: Task, problem: Problem) -> bool:
        """End an exhausted task as failed; False if it has moved on meanwhile."""

    def release_batch_jobs(self, batch_size: int, workers: Sequence[WorkerRoom] = ()) -> list[str]:
        """Make further jobs of running batches ready, at most `batch_size` in flight per batch and no more than the
        `workers` have room for (`domain.batches.plan_room`); their task ids."""


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker's main process said of itself and its host. Bytes; `resident_bytes` is the worker with its children.
    `seen_at`: seconds since the epoch by the ledger's clock."""

    worker: str
    room: WorkerRoom
    memory: Memory
    resident_bytes: int
    free_disk_bytes: int
    seen_at: float = 0.0


class WorkerReports(Protocol):
    """What the workers last said of themselves."""

    def report(self, report: WorkerReport) -> None:
        """Say it again; the last word of a worker counts. Reports of a day ago are forgotten."""

    def recent(self, within_seconds: float) -> list[WorkerReport]:
        """The reports of no longer ago than that, by worker name."""

    def leave(self, worker: str) -> None:
        """The worker has stopped."""


@dataclass(frozen=True, slots=True)
class Figures:
    """How the ledger stands, for monitoring. `oldest_due_seconds`: how long the task that has been due longest has waited."""

    live: dict[Status, int]
    ended_last_hour: dict[Status, int]
    oldest_due_seconds: float
    stalled_batches: int


class Statistics(Protocol):
    """The ledger in figures."""

    def figures(self, batch_timeout_seconds: float) -> Figures:
        """Now. See `stalled`."""

    def stalled(self, batch_timeout_seconds: float) -> list[str]:
        """The ids of batches that have live tasks, and in which none has started or ended for that long."""


class Cleaning(Protocol):
    """Which tasks may still have staging folders at the destination, or a workspace on a host, that nobody needs."""

    def find_statuses(self, task_ids: Sequence[str]) -> dict[str, Status]:
        """The status of each of these tasks that the ledger knows."""

    def unclean(self, limit: int) -> list[str]:
        """Ended tasks whose staging nobody is removing now."""

    def take_cleaning(self, task_id: str, hold_seconds: float) -> bool:
        """Whether the caller is to remove the task's staging; nobody else is told so for `hold_seconds`."""

    def cleaned(self, task_id: str) -> None:
        """The task's staging is gone."""

    def find_successor(self, task_id: str) -> Successor:
        """Return what has come after the task's package, by its own end and by later tasks of its job."""

    def note_kept(self, task_id: str, message: str) -> None:
        """Write into the ended task's history what is kept at the destination, unless that is its last line already."""

    def ended_long_ago(self, task_ids: Sequence[str], seconds: float) -> dict[str, bool]:
        """Of the tasks this ledger knows, which have ended more than so long ago."""

    def forget_keys(self, seconds: float) -> int:
        """Forget idempotency keys older than so long; how many."""


class Parking(Protocol):
    """Which destinations wait for an operator, one record each, and when each is probed next."""

    def park(self, destination: str, problem: Problem, probe_seconds: float) -> tuple[Parked, bool]:
        """Note that the destination is parked; whether it was not before."""

    def find_parked(self, destination: str) -> Parked | None:
        """None when it is not parked."""

    def probe_due(self) -> bool:
        """Whether any parked destination is to be probed now."""

    def take_probe(self, destination: str, hold_seconds: float) -> bool:
        """Whether the caller is to probe it; nobody else is told so for `hold_seconds`."""

    def stay_parked(
        self, destination: str, problem: Problem, *, tell: Callable[[Parked], str], wait_seconds: float, park_seconds: float
    ) -> None:
        """A probe failed: the next one is due after the same time as the last. Every task that waits for it is told so, and
        looks again `wait_seconds` after that, but at the latest `park_seconds` after it was accepted."""

    def heal(self, destination: str, message: str) -> int:
        """The destination is parked no longer: every task that waits for it is due now, with `message` in its history.
        How many they are."""


class Duties(Protocol):
    """What one worker at a time does for all, every so often."""

    def due_duties(self, names: Sequence[str]) -> list[str]: ...

    def take_duty(self, name: str, every_seconds: float) -> bool:
        """Whether the caller is to do it now; nobody else is told so for `every_seconds`."""


class History(Protocol):
    """The ledger as the past."""

    def prune(self, keep_seconds: float, limit: int) -> int:
        """Remove tasks, with their events and files, that ended longer ago than that, and batches and idempotency keys as
        old; at most `limit` of each. What is live, or not yet cleaned up at the destination, stays. Returns how many
        tasks went."""


# --- Redis ------------------------------------------------------------------------------------------------------


class StatusBoard(Protocol):
    """Live status for quick reading; the ledger is the truth. Failing to write here is never the job's failure."""

    def post(self, views: Sequence[dict[str, Any]], *, live: bool, fence: int = 0) -> None:
        """Show each of the `views` as that of its own `task_id`. A live view fades after some seconds unless posted again; a
        final one stays JOB_EXPIRE_HOURS. A view with an older fence, or a live one after the final one, changes nothing."""

    def read(self, task_ids: Sequence[str]) -> list[dict[str, Any] | None]:
        """What was posted last for each, or None. Raises `Unavailable` within a second when Redis does not answer."""

    def ping(self) -> None: ...


class JobQueue(Protocol):
    """The doorbell: tells some worker to look at a task. May be lost or repeated, both harmless."""

    def ring(self, task_ids: Sequence[str], *, first: bool = False) -> None:
        """For each of them once, in this order. `first`: before all that was rung for without it. Raises `Unavailable` within a
        few seconds; some may have been rung for by then."""

    def ring_duty(self, name: str) -> None:
        """Tell some worker to look whether this duty is due. Before all jobs. Raises as `ring`."""

    def depth(self, *, first: bool = False) -> int:
        """Messages waiting, of those rung with the same `first`."""

    def workers(self) -> dict[str, Any]:
        """What the workers say of themselves, for at most two seconds: {'active': {...}, 'scheduled': {...},
        'stats': {...}}, each keyed by worker name; empty when none answers."""

    def is_worker_alive(self) -> bool:
        """Whether any worker answers within a second; no task is run."""


# --- the machine ------------------------------------------------------------------------------------------------


class Host(Protocol):
    def memory(self) -> Memory:
        """Memory of this container, or of the host where there is none."""

    def process_memory(self, *, children: bool = False) -> int:
        """Resident bytes of this process, now; with `children`, of all its descendants too."""

    def free_disk(self, path: Path) -> int:
        """Free bytes where `path` is. Raises `Unavailable`, as does `total_disk`."""

    def total_disk(self, path: Path) -> int:
        """Bytes of the whole disk where `path` is."""
