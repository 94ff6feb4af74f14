"""What monitoring reads from SQL, on every database."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, text

from ledgers import sql_ledger
from ncr_upload.adapters.sql.statistics import SqlStatistics
from ncr_upload.adapters.sql.workers import SqlWorkerReports
from ncr_upload.application.ports import Figures, Memory, WorkerReport
from ncr_upload.domain.batches import WorkerRoom
from ncr_upload.domain.jobs import Stage, Status


def report_of(worker: str, capacity: int = 4) -> WorkerReport:
    return WorkerReport(worker, WorkerRoom(capacity, 4), Memory(5 * 2**30, 2**33, "cgroup2"), 2**29, 2**41)


def test_the_last_word_of_each_worker_is_kept(engine: Engine) -> None:
    reports = SqlWorkerReports(engine)
    reports.report(report_of("w2"))
    for capacity in (4, 1):
        reports.report(report_of("w1", capacity))
    assert [(report.worker, report.room.capacity) for report in reports.recent(60)] == [("w1", 1), ("w2", 4)]
    (first, _) = reports.recent(60)
    assert (first.memory, first.resident_bytes, first.free_disk_bytes) == (Memory(5 * 2**30, 2**33, "cgroup2"), 2**29, 2**41)


def test_a_worker_that_left_or_fell_silent_is_not_listed_and_after_a_day_forgotten(engine: Engine) -> None:
    reports = SqlWorkerReports(engine)
    for worker in ("gone", "left", "silent", "there"):
        reports.report(report_of(worker))
    reports.leave("left")
    with engine.begin() as connection:
        connection.execute(text("UPDATE ncr_workers SET seen_at = seen_at - 100 WHERE worker = 'silent'"))
        connection.execute(text("UPDATE ncr_workers SET seen_at = seen_at - 90000 WHERE worker = 'gone'"))
    assert [report.worker for report in reports.recent(90)] == ["there"]
    reports.report(report_of("there"))
    with engine.connect() as connection:
        assert set(connection.execute(text("SELECT worker FROM ncr_workers")).scalars()) == {"silent", "there"}


def test_the_ledger_is_told_in_figures(engine: Engine) -> None:
    ledger, statistics = sql_ledger(engine), SqlStatistics(engine)
    assert statistics.figures(300) == Figures({}, {}, 0.0, 0)
    running, failed, waiting = ledger.accept("a", "b", "c")
    ledger.claim(running)
    ledger.claims.finish(ledger.claim(failed), status=Status.FAILED, stage=Stage.LOOKUP, message="", problem=None)
    ledger.expire(waiting)
    found = statistics.figures(300)
    assert (found.live, found.ended_last_hour) == ({Status.PROCESSING: 1, Status.PENDING: 1}, {Status.FAILED: 1})
    assert found.oldest_due_seconds > 3600


@pytest.mark.parametrize(("seconds_ago", "stalled"), [(0, 0), (301, 1)])
def test_a_batch_in_which_nothing_starts_or_ends_is_stalled(engine: Engine, seconds_ago: int, stalled: int) -> None:
    ledger = sql_ledger(engine)
    first, _ = ledger.accept("a", "b", batch_id="b1")
    ledger.claims.finish(ledger.claim(first), status=Status.FAILED, stage=Stage.LOOKUP, message="", problem=None)
    with engine.begin() as connection:
        for column in ("created_at", "started_at", "finished_at"):
            connection.execute(text(f"UPDATE ncr_jobs SET {column} = {column} - :s"), {"s": seconds_ago})
        connection.execute(text("UPDATE ncr_batches SET created_at = created_at - :s"), {"s": seconds_ago})
    assert SqlStatistics(engine).figures(300).stalled_batches == stalled
    assert SqlStatistics(engine).stalled(300) == ["b1"] * stalled
    found = ledger.submissions.batch("b1", limit=1, cursor=None)
    assert found is not None
    assert (found[0].now - found[0].moved_at > 300) is bool(stalled)
