"""Counters and histograms of what all processes have done, for `/metrics`.

Each process adds up its own counts. It stores the sums in one row of its own, every few seconds and when it ends; a killed
process loses the counts of those seconds. A row that is no longer written is folded into the totals, so no sum ever falls.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ncr_upload.application.ports import Claims, Fetched, ObjectInfo, ObjectStore, OnBytes
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import TERMINAL, Claim, Problem, Stage, Status, Task
from ncr_upload.domain.packages import DeliveredFile
from ncr_upload.domain.retries import ErrorClass

log = logging.getLogger(__name__)

Counts = Mapping[str, float]
"""Sums by series key. Adding two such mappings key by key is always right, also for keys that only a newer release knows."""

OnEnded = Callable[[Status, int], None]
"""Told, after the transaction, that so many jobs ended without a worker."""

FLUSH_SECONDS = 5.0
FOLD_IDLE_SECONDS = 3600.0
FOLDED_KEPT_SECONDS = 7 * 86400.0
UNBOUNDED = "+Inf"
SUM = "sum"


@dataclass(frozen=True, slots=True)
class Family:
    """A metric: its name, help text, label, the label's values that exist from the start, and its buckets if it has any.

    Labels hold values of our own only, never words from outside, so the number of series is bounded.
    """

    name: str
    text: str
    label: str | None = None
    values: tuple[str, ...] = ("",)
    buckets: tuple[float, ...] = ()

    def key(self, value: str = "") -> str:
        """Return the key of a counter's series."""
        return f"{self.name}|{value}"

    def bucket_key(self, value: str, bound: str) -> str:
        """Return the key of one bucket of a histogram's series, or of its `SUM`."""
        return f"{self.name}|{value}|{bound}"


_ENDS = tuple(sorted(status.value for status in TERMINAL))
_RETRIED = tuple(sorted(each.value for each in ErrorClass if each is not ErrorClass.REJECTED))
_STAGES = tuple(stage.value for stage in (Stage.LOOKUP, Stage.DOWNLOAD, Stage.VALIDATE, Stage.UPLOAD, Stage.PUBLISH))
_STAGE_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_JOB_BOUNDS = (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)

JOBS_ENDED = Family("ncr_jobs_ended", "Jobs that have ended.", "status", _ENDS)
RETRIES = Family("ncr_retries", "Attempts after which the job waits for the next one, by class of error.", "class", _RETRIED)
DOWNLOADED_BYTES = Family("ncr_downloaded_bytes", "Bytes received from the object storage.")
DELIVERED_BYTES = Family("ncr_delivered_bytes", "Bytes of the packages that were delivered.")
STAGE_SECONDS = Family("ncr_stage_seconds", "Time that an attempt spent in a stage.", "stage", _STAGES, _STAGE_BOUNDS)
JOB_SECONDS = Family("ncr_job_seconds", "Time from a job's acceptance to its end.", "status", _ENDS, _JOB_BOUNDS)
FAMILIES = (JOBS_ENDED, RETRIES, DOWNLOADED_BYTES, DELIVERED_BYTES, STAGE_SECONDS, JOB_SECONDS)


def ignore_end(status: Status, count: int) -> None:
    """Count nothing."""


def histogram_of(family: Family, value: str, counts: Counts) -> tuple[list[tuple[str, float]], float]:
    """Return the cumulative buckets and the sum of one series. Bounds of other releases are kept, in their order."""
    start = family.bucket_key(value, "")
    known = {f"{bound:g}" for bound in family.buckets}
    stored = {key.removeprefix(start) for key in counts if key.startswith(start)} - {SUM, UNBOUNDED}
    buckets, total = [], 0.0
    for bound in [*sorted(known | stored, key=float), UNBOUNDED]:
        total += counts.get(start + bound, 0.0)
        buckets.append((bound, total))
    return buckets, counts.get(start + SUM, 0.0)


class MetricsStore(Protocol):
    """The counts of all processes. Every method may raise `Unavailable`."""

    def store(self, process: str, counts: Counts, *, is_new: bool, ended: bool) -> Counts | None:
        """Store the sums of a process in place of its last ones; repeating it is harmless. `is_new`: none of its earlier calls
        is known to have worked. `ended`: this is the last one.

        Returns None when the sums are stored. When the row had been folded, nothing is stored, and the counts that the totals
        took from it are returned: empty when the row is gone altogether.
        """

    def fold(self, idle_seconds: float, keep_seconds: float) -> int:
        """Add the rows of ended processes, and those not written for so long, to the totals; return how many. What was taken
        from a process that may still run is kept for `keep_seconds`."""

    def read(self) -> Counts:
        """Return the sums of all processes there ever were."""


class MemoryMetrics:
    """A `MetricsStore` in this process alone."""

    def __init__(self) -> None:
        self._rows: dict[str, Counts] = {}
        self._folded: dict[str, Counts] = {}
        self._totals: Counter[str] = Counter()

    def store(self, process: str, counts: Counts, *, is_new: bool, ended: bool) -> Counts | None:
        if process in self._folded or (process not in self._rows and not is_new):
            return self._folded.get(process, {})
        self._rows[process] = dict(counts)
        if ended:
            self._take(process)
        return None

    def fold(self, idle_seconds: float, keep_seconds: float) -> int:  # noqa: ARG002 - the port's signature
        """Fold every row: this store has no clock."""
        processes = list(self._rows)
        for process in processes:
            self._folded[process] = self._take(process)
        return len(processes)

    def _take(self, process: str) -> Counts:
        counts = self._rows.pop(process)
        self._totals.update(counts)
        return counts

    def read(self) -> Counts:
        return add_counts([self._totals, *self._rows.values()])


def add_counts(rows: Iterable[Counts]) -> dict[str, float]:
    """Return the sum of the rows, key by key."""
    total: dict[str, float] = {}
    for counts in rows:
        for key, value in counts.items():
            total[key] = total.get(key, 0.0) + value
    return total


class MetricsRecorder:
    """Adds up what this process does. A thread, started by the first count, stores the sums every `flush_seconds`.

    Make it after the fork, not before. Counting never fails and never waits for the database.
    """

    def __init__(self, store: MetricsStore, flush_seconds: float = FLUSH_SECONDS) -> None:
        self._store = store
        self._flush_seconds = flush_seconds
        self._counts: dict[str, float] = {}
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None
        self._process = str(uuid.uuid4())
        self._is_new = True
        self._is_waiting = False
        self._sent: Counts = {}

    def count(self, family: Family, value: str = "", amount: float = 1) -> None:
        """Add to a counter."""
        self._add({family.key(value): amount})

    def observe(self, family: Family, value: str, amount: float) -> None:
        """Add one measurement to a histogram."""
        place = bisect_left(family.buckets, amount)
        bound = f"{family.buckets[place]:g}" if place < len(family.buckets) else UNBOUNDED
        self._add({family.bucket_key(value, bound): 1, family.bucket_key(value, SUM): max(0.0, amount)})

    def job_ended(self, status: Status, count: int = 1) -> None:
        """Count jobs that ended."""
        if count:
            self.count(JOBS_ENDED, status.value, count)

    def _add(self, counts: Counts) -> None:
        with self._lock:
            for key, value in counts.items():
                self._counts[key] = self._counts.get(key, 0.0) + value
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
                self._thread.start()
        self._changed.set()

    def _run(self) -> None:
        while True:
            self._changed.wait()
            time.sleep(self._flush_seconds)
            self.flush()

    def flush(self, *, ended: bool = False) -> bool:
        """Store the sums now; return whether they are stored. When the store is away, the next flush stores them."""
        with self._flushing:
            self._changed.clear()
            with self._lock:
                counts = dict(self._counts)
            if not counts:
                return True
            try:
                self._flush(counts, ended=ended)
                self._is_waiting = False
                return True
            except Unavailable as error:
                if not self._is_waiting:
                    log.info("metrics: kept in memory until they can be stored: %s", error.message)
                self._is_waiting = True
                self._changed.set()
            except Exception:
                log.exception("metrics_not_stored")
                self._changed.set()
            return False

    def _flush(self, counts: Counts, *, ended: bool) -> None:
        before, self._sent = self._sent, counts
        taken = self._store.store(self._process, counts, is_new=self._is_new, ended=ended)
        if taken is None:
            self._is_new = False
            return
        # The row is part of the totals by now: what came since goes into a row of another name.
        self._process, self._is_new, self._sent = str(uuid.uuid4()), True, {}
        taken = taken or before
        with self._lock:
            left = {key: value - taken.get(key, 0.0) for key, value in self._counts.items()}
            self._counts = {key: value for key, value in left.items() if value > 0}
            counts = self._sent = dict(self._counts)
        if counts:
            self._store.store(self._process, counts, is_new=True, ended=ended)
            self._is_new = False


@dataclass(slots=True)
class _Clock:
    stage: Stage
    since: float


class CountedClaims:
    """`Claims` that also counts ends, retries and the time of each stage: after the ledger's transaction, never in it."""

    def __init__(self, claims: Claims, recorder: MetricsRecorder, now: Callable[[], float] = time.monotonic) -> None:
        self._claims = claims
        self._recorder = recorder
        self._now = now
        self._clocks: dict[tuple[str, int], _Clock] = {}

    def claim(self, task_id: str, worker: str, lease_seconds: float) -> Claim | None:
        claim = self._claims.claim(task_id, worker, lease_seconds)
        if claim is not None:
            self._clocks.clear()  # of an attempt that lost its lease
            self._clocks[task_id, claim.fence] = _Clock(Stage.LOOKUP, self._now())
        return claim

    def delivered_files(self, job_id: str) -> Sequence[DeliveredFile]:
        return self._claims.delivered_files(job_id)

    def package_sizes(self, task_id: str) -> Mapping[str, int]:
        return self._claims.package_sizes(task_id)

    def renew(self, claim: Claim) -> None:
        self._claims.renew(claim)

    def advance(self, claim: Claim, *, status: Status, stage: Stage, message: str, **facts: Any) -> None:
        self._claims.advance(claim, status=status, stage=stage, message=message, **facts)
        clock = self._clocks.get((claim.task.task_id, claim.fence))
        if clock is not None and clock.stage is not stage:
            now = self._now()
            self._recorder.observe(STAGE_SECONDS, clock.stage.value, now - clock.since)
            clock.stage, clock.since = stage, now

    def finish(
        self, claim: Claim, *, status: Status, stage: Stage, message: str, problem: Problem | None, **facts: Any
    ) -> Task:
        task = self._claims.finish(claim, status=status, stage=stage, message=message, problem=problem, **facts)
        if self._stop_clock(claim):
            self._recorder.job_ended(status)
            if task.finished_at is not None:
                self._recorder.observe(JOB_SECONDS, status.value, task.finished_at - task.created_at)
            if status is Status.COMPLETED and task.bytes:
                self._recorder.count(DELIVERED_BYTES, amount=task.bytes)
        return task

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
        task = self._claims.put_back(
            claim,
            problem=problem,
            message=message,
            delay_seconds=delay_seconds,
            spend_attempt=spend_attempt,
            waits_for=waits_for,
        )
        if self._stop_clock(claim):
            self._recorder.count(RETRIES, problem.error_class)
        return task

    def _stop_clock(self, claim: Claim) -> bool:
        """Count the stage in which the attempt ended; return whether this is its first end."""
        clock = self._clocks.pop((claim.task.task_id, claim.fence), None)
        if clock is None:
            return False
        self._recorder.observe(STAGE_SECONDS, clock.stage.value, self._now() - clock.since)
        return True


class CountedStore:
    """`ObjectStore` that also counts the bytes received."""

    def __init__(self, store: ObjectStore, recorder: MetricsRecorder) -> None:
        self._store = store
        self._recorder = recorder

    @property
    def source(self) -> str:
        return self._store.source

    async def stat(self, key: str) -> ObjectInfo:
        return await self._store.stat(key)

    async def glance(self, keys: Sequence[str]) -> Mapping[str, ObjectInfo]:
        return await self._store.glance(keys)

    async def fetch(self, key: str, to: Path, on_bytes: OnBytes, **choices: Any) -> Fetched:
        received = 0

        def count(amount: int) -> None:
            nonlocal received
            received += amount
            on_bytes(amount)

        try:
            return await self._store.fetch(key, to, count, **choices)
        finally:
            if received:
                self._recorder.count(DOWNLOADED_BYTES, amount=received)
