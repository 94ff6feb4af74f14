"""Counters add up right across processes, restarts, lost answers and rows that are folded, on every database."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from databases import SERVERS, Databases
from ledgers import sql_ledger
from ncr_upload.adapters.sql.metrics import TOTALS, SqlMetrics
from ncr_upload.adapters.sql.recovery import SqlRecovery
from ncr_upload.adapters.sql.submissions import SqlSubmissions
from ncr_upload.application.metrics import JOBS_ENDED, Counts, MemoryMetrics, MetricsRecorder, MetricsStore
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import NewJob, Problem, Status
from studio_rows import open_database

DAY = 86400.0
COMPLETED, FAILED = JOBS_ENDED.key("completed"), JOBS_ENDED.key("failed")


class LosesAnswers:
    """A store that does what it is asked and then says that it did not answer, as often as it is told."""

    def __init__(self, store: MetricsStore) -> None:
        self._store = store
        self.lost = 0

    def store(self, process: str, counts: Counts, *, is_new: bool, ended: bool) -> Counts | None:
        found = self._store.store(process, counts, is_new=is_new, ended=ended)
        if self.lost:
            self.lost -= 1
            raise Unavailable("database_unavailable", "the answer was lost", "Wait.")
        return found

    def fold(self, idle_seconds: float, keep_seconds: float) -> int:
        return self._store.fold(idle_seconds, keep_seconds)

    def read(self) -> Counts:
        return self._store.read()


@pytest.fixture(params=["sqlite", *SERVERS, "memory"])
def store(request: pytest.FixtureRequest, databases: Databases, tmp_path: Path) -> Iterator[MetricsStore]:
    if request.param == "memory":
        yield MemoryMetrics()
        return
    engine = open_database(databases.create(request.param, tmp_path))
    yield SqlMetrics(engine)
    engine.dispose()


def recorder_of(store: MetricsStore) -> MetricsRecorder:
    """One that stores only when it is told to."""
    return MetricsRecorder(store, flush_seconds=3600)


def flush_until_stored(recorder: MetricsRecorder, *, ended: bool) -> None:
    while not recorder.flush(ended=ended):
        time.sleep(0.01)


def test_what_several_processes_counted_is_added_up(store: MetricsStore) -> None:
    first, second = recorder_of(store), recorder_of(store)
    first.job_ended(Status.COMPLETED, 2)
    first.flush()
    first.job_ended(Status.COMPLETED)
    first.job_ended(Status.FAILED)
    second.job_ended(Status.COMPLETED)
    for recorder in (first, second, first):  # storing again what is stored changes nothing
        recorder.flush()
    assert store.read() == {COMPLETED: 4, FAILED: 1}


def test_nothing_is_counted_twice_when_the_answer_is_lost(store: MetricsStore) -> None:
    unsure = LosesAnswers(store)
    recorder = recorder_of(unsure)
    for ended in range(3):
        unsure.lost = 1
        recorder.job_ended(Status.COMPLETED)
        recorder.flush()
        assert store.read() == {COMPLETED: ended + 1}
    recorder.flush()
    assert store.read() == {COMPLETED: 3}


def test_an_ended_process_is_folded_at_once_and_nothing_is_lost(store: MetricsStore) -> None:
    recorder = recorder_of(store)
    recorder.job_ended(Status.COMPLETED, 5)
    recorder.flush(ended=True)
    store.fold(idle_seconds=DAY, keep_seconds=2 * DAY)
    assert store.read() == {COMPLETED: 5}
    assert store.fold(idle_seconds=DAY, keep_seconds=2 * DAY) == 0


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_comes_back_after_it_was_folded_is_counted_once(store: MetricsStore, lost: int) -> None:
    """Stopped for long, or cut off from the database, perhaps in the midst of storing."""
    unsure = LosesAnswers(store)
    recorder = recorder_of(unsure)
    recorder.job_ended(Status.COMPLETED, 5)
    recorder.flush()
    unsure.lost = lost
    recorder.job_ended(Status.FAILED)
    recorder.flush()
    assert store.fold(idle_seconds=-1, keep_seconds=DAY) == 1
    assert store.read() == {COMPLETED: 5, FAILED: 1}
    recorder.flush()
    assert store.read() == {COMPLETED: 5, FAILED: 1}
    recorder.job_ended(Status.COMPLETED)
    recorder.flush()
    recorder.flush()
    assert store.read() == {COMPLETED: 6, FAILED: 1}
    assert store.fold(idle_seconds=-1, keep_seconds=DAY) == 1
    assert store.read() == {COMPLETED: 6, FAILED: 1}


def test_a_process_whose_row_is_gone_altogether_stores_only_what_is_new(engine: Engine) -> None:
    store = SqlMetrics(engine)
    recorder = recorder_of(store)
    recorder.job_ended(Status.COMPLETED, 5)
    recorder.flush()
    assert store.fold(idle_seconds=-1, keep_seconds=DAY) == 1
    store.fold(idle_seconds=DAY, keep_seconds=-1)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT process FROM ncr_metrics")).scalars().all() == [TOTALS]
    recorder.job_ended(Status.COMPLETED)
    recorder.flush()
    assert store.read() == {COMPLETED: 6}


def test_counters_never_fall_while_processes_come_and_go_and_are_folded(engine: Engine) -> None:
    store, done = SqlMetrics(engine), threading.Event()

    def live(number: int) -> None:
        for _ in range(4):
            recorder = recorder_of(store)
            for _ in range(5):
                recorder.job_ended(Status.COMPLETED)
                recorder.flush()
            flush_until_stored(recorder, ended=number % 2 == 0)

    def fold() -> None:
        while not done.is_set():
            with suppress(Unavailable):  # SQLite has one writer at a time
                store.fold(idle_seconds=-1, keep_seconds=DAY)
            time.sleep(0.005)

    def watch() -> list[float]:
        seen = []
        while not done.is_set():
            seen.append(store.read().get(COMPLETED, 0))
            time.sleep(0.001)
        return seen

    with ThreadPoolExecutor(7) as threads:
        folding = [threads.submit(fold), threads.submit(fold)]
        watching = threads.submit(watch)
        for living in [threads.submit(live, number) for number in range(4)]:
            living.result()
        done.set()
        for each in folding:
            each.result()
        seen = watching.result()
    assert seen == sorted(seen)
    assert store.read() == {COMPLETED: 80}


def test_jobs_that_end_without_a_worker_are_told_of(engine: Engine) -> None:
    ended: list[tuple[Status, int]] = []
    ledger = sql_ledger(engine)
    submissions = SqlSubmissions(engine, max_attempts=1, on_ended=lambda status, count: ended.append((status, count)))
    recovery = SqlRecovery(engine, lambda status, count: ended.append((status, count)))
    (waiting,) = ledger.accept("waiting")
    for _ in range(2):  # the second time it has ended already
        submissions.cancel(waiting.task_id)
    assert ended == [(Status.CANCELLED, 1)]
    ledger.accept("a", "b", "c", batch_id="batch-1")
    submissions.cancel_batch("batch-1")
    submissions.cancel_batch("batch-1")
    assert sum(count for _, count in ended) == 4
    accepted = submissions.accept([NewJob("spent", "ann", "spring")], batch_id=None, release=1)
    task = accepted[0]
    ledger.claim(task)  # type: ignore[arg-type]
    ledger.expire(task)  # type: ignore[arg-type]
    (exhausted,) = recovery.exhausted(10)
    for _ in range(2):
        recovery.give_up(exhausted, Problem("worker_died", "unknown", "it died", "Look."))
    assert ended[-1] == (Status.FAILED, 1)
    assert sum(count for status, count in ended if status is Status.FAILED) == 1
