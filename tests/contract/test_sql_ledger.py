"""What only the ledger on SQL promises: its tables, its transactions, its errors."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import OperationalError

from databases import SERVERS
from fault_table import fault
from ledgers import Ledger, sql_ledger
from ncr_upload.adapters.sql.tables import PARTIAL_INDICES, metadata
from ncr_upload.application.ports import CancelAnswer, Idempotency
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import NewJob, Stage, Status
from ncr_upload.domain.packages import PackageFile


@pytest.fixture
def ledger(engine: Engine) -> Ledger:
    return sql_ledger(engine)


def test_the_migrations_make_the_tables_the_code_uses(ledger: Ledger, engine: Engine) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    indices = [index for table in metadata.tables.values() for index in table.indexes]
    partial = {index.name for index in indices if index.dialect_options["postgresql"]["where"] is not None}
    assert len(partial) == 6

    def is_ours(item: Any, name: str | None, kind: str, *_: Any) -> bool:
        if kind == "index" and name in partial:
            return engine.dialect.name in PARTIAL_INDICES
        return kind != "table" or name in metadata.tables

    ours = {"include_object": is_ours}
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={**ours, "compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_a_second_start_finds_nothing_to_migrate(ledger: Ledger, engine: Engine) -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    from ncr_upload import migrations
    from ncr_upload.migrations.apply import newest_revision, upgrade

    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert newest_revision() == ScriptDirectory.from_config(config).get_current_head()
    assert upgrade(engine) == (newest_revision(), newest_revision())


def test_a_finish_and_its_recording_are_one_transaction(ledger: Ledger, engine: Engine) -> None:
    (task,) = ledger.accept("job-1")
    claim = ledger.uploading(task)

    def broken(_: Any) -> None:
        raise OperationalError("INSERT", {}, Exception("disk full"))

    with pytest.raises(Unavailable):
        ledger.claims.finish(claim, status=Status.COMPLETED, stage=Stage.DONE, message="", problem=None, also=broken)
    assert ledger.status(task) is Status.UPLOADING


@fault(
    "Ledger: a due job's row is written between a claim's look at it and its write",
    injector="a statement in between",
    invariants="LO",
    outcome="not claimed, nothing written; due as before",
)
@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_a_claim_takes_the_row_only_as_it_has_seen_it(ledger: Ledger, engine: Engine) -> None:
    (task,) = ledger.accept("job-1")
    late = create_engine(engine.url)
    written: list[str] = []

    def write_between(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "xmin" in statement and statement.startswith("WITH") and not written:
            written.append(statement)
            with late.begin() as connection:
                connection.execute(text("UPDATE ncr_jobs SET publish_fence = 7 WHERE task_id = :t"), {"t": task.task_id})

    event.listen(engine, "before_cursor_execute", write_between)
    assert ledger.claims.claim(task.task_id, "w1", 20) is None
    late.dispose()
    assert written
    assert [line.kind for line in ledger.submissions.history(task.task_id)] == ["accepted"]
    claim = ledger.claim(task)
    assert (claim.fence, claim.publish_fence) == (1, 7)


def test_the_recorded_package_is_the_last_one_recorded(ledger: Ledger, engine: Engine) -> None:
    (task,) = ledger.accept("job-1")
    claim = ledger.claim(task)
    first = PackageFile("k", "SKU1/a.glb", 3, "aa", 4_000_000_000, "e1")
    for package in ([first, replace(first, target="SKU1/b.glb")], [replace(first, sha256="bb")]):
        ledger.claims.advance(claim, status=Status.PROCESSING, stage=Stage.UPLOAD, message="", files=package)
        with engine.connect() as connection:
            found = connection.execute(text("SELECT target, size, sha256, crc32, etag FROM ncr_files")).all()
        assert [tuple(row) for row in found] == [(f.target, f.size, f.sha256, f.crc32, f.etag) for f in package]


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_a_batch_that_breaks_half_way_leaves_nothing_of_itself(ledger: Ledger, engine: Engine) -> None:
    broken = "CREATE TRIGGER broken BEFORE INSERT ON ncr_jobs WHEN NEW.job_id = 'job-7' BEGIN SELECT RAISE(FAIL, 'no'); END"
    with engine.begin() as connection:
        connection.execute(text(broken))
    with pytest.raises(Unavailable):
        ledger.accept(*(f"job-{number}" for number in range(10)), batch_id="b1")
    with engine.connect() as connection:
        for table in ("ncr_jobs", "ncr_batches", "ncr_events"):
            assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() == 0


@fault(
    "Ledger: a held job cancelled while the sweeper releases it",
    injector="open transaction",
    invariants="LOS",
    outcome="stays cancelled; never rung for",
)
@pytest.mark.parametrize("engine", SERVERS, indirect=True)
def test_a_job_that_is_cancelled_while_its_batch_releases_it_stays_ended(ledger: Ledger, engine: Engine) -> None:
    first, held = ledger.accept("job-1", "job-2", batch_id="b1", release=1)
    assert ledger.submissions.cancel(first.task_id) is CancelAnswer.CANCELLED
    with ThreadPoolExecutor(1) as sweeper, engine.begin() as caller:
        caller.execute(
            text("UPDATE ncr_jobs SET status = 'cancelled', finished_at = 1 WHERE task_id = :t"), {"t": held.task_id}
        )
        releasing = sweeper.submit(ledger.recovery.release_batch_jobs, 1)
        with pytest.raises(TimeoutError):  # it waits for the caller's transaction
            releasing.result(0.5)
        caller.commit()
        assert releasing.result(10) == []
    assert ledger.recovery.due(10) == []


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_a_locked_database_is_unavailable_and_names_it_without_a_password(ledger: Ledger, engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))  # holds the write lock: every transaction begins IMMEDIATE
        with pytest.raises(Unavailable, match=r"test\.db"):
            ledger.accept("job-1")


@pytest.mark.parametrize("statement", ["DROP TABLE ncr_idempotency", "ALTER TABLE ncr_jobs DROP COLUMN campaign"])
def test_a_missing_table_or_column_is_named_with_what_to_do(ledger: Ledger, engine: Engine, statement: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(statement))
    with pytest.raises(Unavailable, match=r"ncr_idempotency|campaign") as told:
        ledger.submissions.accept(
            [NewJob("job-1", "ann", "spring")], batch_id=None, release=1, idempotency=Idempotency("k-1", "f" * 64)
        )
    assert told.value.code == "database_schema"
    assert "ncr db upgrade" in told.value.next_step


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_a_sweep_looks_at_what_it_seeks_by_an_index_of_that_alone(ledger: Ledger, engine: Engine) -> None:
    ledger.accept("one", "two", "three", batch_id="batch", release=1)
    sent: list[tuple[str, Any]] = []
    event.listen(engine, "before_cursor_execute", lambda _c, _cursor, query, given, *_: sent.append((query, given)))
    ledger.recovery.due(10, 5)
    ledger.recovery.abandoned(10)
    ledger.recovery.exhausted(10)
    ledger.recovery.release_batch_jobs(1)
    with engine.connect() as connection:
        asked = [(query, given) for query, given in sent if query.startswith(("SELECT", "WITH"))]
        plans = [
            [row[-1] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", given)] for query, given in asked
        ]
    used = [set(re.findall(r"ix_ncr_jobs_(\w+)", " ".join(plan))) for plan in plans]
    assert used == [{"waiting"}, {"taken"}, {"taken"}, {"live_batch"}, {"in_flight"}], plans
