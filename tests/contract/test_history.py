"""History is kept for so long, then goes in small steps; what is live, or left something at the destination, stays."""

from __future__ import annotations

from sqlalchemy import Engine, text

from ledgers import Ledger, sql_ledger
from ncr_upload.application.ports import Idempotency
from ncr_upload.domain.jobs import NewJob, Stage, Status, Task
from ncr_upload.domain.packages import PackageFile

DAY = 86400.0
FILE = PackageFile("k", "SKU1/a.glb", 3, "aa", 1, "e1")


def end(ledger: Ledger, task: Task, *, old: bool = True) -> None:
    claim = ledger.claim(task)
    ledger.claims.advance(claim, status=Status.PROCESSING, stage=Stage.LOOKUP, message="", files=[FILE])
    ledger.claims.finish(claim, status=Status.FAILED, stage=Stage.LOOKUP, message="", problem=None)
    if old:
        ledger.set_time("finished_at", task.task_id)


def prune(ledger: Ledger, limit: int = 100) -> int:
    return ledger.history.prune(DAY, limit)


def test_what_ended_long_ago_goes_and_nothing_else(ledger: Ledger) -> None:
    old, recent, waiting, running = ledger.accept("old", "recent", "waiting", "running")
    end(ledger, old)
    end(ledger, recent, old=False)
    ledger.claim(running)
    assert (prune(ledger), prune(ledger)) == (1, 0)
    assert ledger.submissions.task(old.task_id) is None
    assert all(ledger.submissions.task(task.task_id) for task in (recent, waiting, running))


def test_a_task_that_left_staging_behind_stays_until_it_is_cleaned(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    claim = ledger.claim(task)
    ledger.claims.advance(claim, status=Status.PROCESSING, stage=Stage.LOOKUP, message="", announce_staging=True)
    ledger.claims.finish(claim, status=Status.FAILED, stage=Stage.LOOKUP, message="", problem=None)
    ledger.set_time("finished_at", task.task_id)
    assert prune(ledger) == 0
    ledger.cleaning.cleaned(task.task_id)
    assert prune(ledger) == 1


def count(engine: Engine, table: str) -> int:
    with engine.connect() as connection:
        found: int = connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()
        return found


def test_a_task_goes_with_its_events_and_files_a_few_at_a_time(engine: Engine) -> None:
    ledger = sql_ledger(engine)
    for task in ledger.accept(*(f"job-{number}" for number in range(7))):
        end(ledger, task)
    assert [prune(ledger, 3) for _ in range(4)] == [3, 3, 1, 0]
    assert {table: count(engine, table) for table in ("ncr_jobs", "ncr_events", "ncr_files")} == {
        "ncr_jobs": 0,
        "ncr_events": 0,
        "ncr_files": 0,
    }


def make_old(engine: Engine, table: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {table} SET created_at = 1"))


def test_a_batch_is_seen_whole_or_not_at_all(engine: Engine) -> None:
    ledger = sql_ledger(engine)
    first, second = ledger.accept("a", "b", batch_id="batch-1")
    make_old(engine, "ncr_batches")
    end(ledger, first)
    assert prune(ledger) == 0
    found = ledger.submissions.batch("batch-1", limit=10, cursor=None)
    assert found is not None
    assert found[1].total == 2
    end(ledger, second)
    prune(ledger)
    assert prune(ledger) + prune(ledger) <= 2
    assert ledger.submissions.batch("batch-1", limit=10, cursor=None) is None
    assert count(engine, "ncr_jobs") == 0


def test_an_old_idempotency_key_may_be_used_anew(engine: Engine) -> None:
    ledger = sql_ledger(engine)

    def submit() -> object:
        return ledger.submissions.accept(
            [NewJob("job-1", "ann", "spring")], batch_id=None, release=1, idempotency=Idempotency("k-1", "f" * 64)
        )

    (first,) = submit()  # type: ignore[misc]
    end(ledger, first)
    make_old(engine, "ncr_idempotency")
    while prune(ledger, 1) or count(engine, "ncr_idempotency"):
        pass
    (second,) = submit()  # type: ignore[misc]
    assert second.task_id != first.task_id
