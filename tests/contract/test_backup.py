"""The ledger as a file: what a backup holds, and that putting it back delivers nothing again."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from sqlalchemy import Engine, delete, text

from databases import SERVERS, Databases
from ledgers import Ledger, sql_ledger
from ncr_upload.adapters.sql.backup import CHILDREN, FENCE_STEP, KEYED, LEFT_OUT, Restored, restore_backup, write_backup
from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.adapters.sql.tables import metadata
from ncr_upload.domain.errors import LeaseLost, Rejected
from ncr_upload.domain.jobs import Problem, Stage, Status, Task
from ncr_upload.migrations.apply import downgrade, newest_revision, upgrade
from studio_rows import open_database


@pytest.fixture
def ledger(engine: Engine) -> Ledger:
    return sql_ledger(engine)


def end(ledger: Ledger, task: Task, status: Status = Status.FAILED) -> None:
    claim = ledger.claim(task)
    problem = Problem("broken", "rejected", "it was broken", "mend it")
    ledger.claims.finish(claim, status=status, stage=Stage.LOOKUP, message="ended", problem=problem, also=None)


def save(engine: Engine, revision: str | None = None) -> bytes:
    to = io.BytesIO()
    assert write_backup(engine, to, revision or newest_revision()) > 0
    return to.getvalue()


def restore(engine: Engine, backup: bytes) -> Restored:
    return restore_backup(engine, io.BytesIO(backup), newest_revision())


def lose_everything(engine: Engine) -> None:
    with engine.begin() as connection:
        for table in metadata.tables.values():
            connection.execute(delete(table))


def test_every_table_is_saved_or_left_out_on_purpose() -> None:
    assert {*KEYED, *CHILDREN, *LEFT_OUT} == set(metadata.tables.values())


def test_a_lost_ledger_comes_back_with_its_history(ledger: Ledger, engine: Engine) -> None:
    ended, waiting = ledger.accept("job-1", "job-2")
    end(ledger, ended)
    history = ledger.submissions.history(ended.task_id)
    backup = save(engine)
    lose_everything(engine)

    back = restore(engine, backup)

    assert (back.tasks, len(back.live), back.kept, back.superseded) == (2, 1, 0, 0)
    assert ledger.status(ended) is Status.FAILED
    assert ledger.submissions.history(ended.task_id) == history
    assert ledger.status(waiting) is Status.PENDING
    assert [event.kind for event in ledger.submissions.history(waiting.task_id)][-1] == "restored"


def test_a_task_that_ended_after_the_backup_stays_ended(ledger: Ledger, engine: Engine) -> None:
    (task,) = ledger.accept("job-1")
    backup = save(engine)
    end(ledger, task)

    back = restore(engine, backup)

    assert (back.tasks, back.kept) == (0, 1)
    assert ledger.status(task) is Status.FAILED
    assert ledger.recovery.due(10) == []


def test_a_restored_live_task_can_be_claimed_and_its_former_worker_is_fenced_off(ledger: Ledger, engine: Engine) -> None:
    (task,) = ledger.accept("job-1")
    before = ledger.claim(task, "w1", lease_seconds=3600)
    backup = save(engine)
    lose_everything(engine)
    restore(engine, backup)

    after = ledger.claim(task, "w2")

    assert after.fence > before.fence + FENCE_STEP - 1
    with pytest.raises(LeaseLost):
        ledger.claims.advance(before, status=Status.PROCESSING, stage=Stage.LOOKUP, message="")


def test_a_job_that_was_submitted_again_since_is_not_live_twice(ledger: Ledger, engine: Engine) -> None:
    (old,) = ledger.accept("job-1")
    backup = save(engine)
    lose_everything(engine)
    (new,) = ledger.accept("job-1")

    back = restore(engine, backup)

    assert (len(back.live), back.superseded) == (0, 1)
    assert ledger.status(old) is Status.CANCELLED
    assert ledger.status(new) is Status.PENDING


@pytest.mark.parametrize("damage", ["cut", "not gzip", "a row missing", "newer"])
def test_a_damaged_backup_changes_nothing(damage: str, tmp_path: Path, databases: Databases) -> None:
    import gzip

    engine = open_database(databases.create("sqlite", tmp_path))
    ledger = sql_ledger(engine)
    ledger.accept("job-1", "job-2")
    backup = save(engine)
    lines = gzip.decompress(backup).splitlines(keepends=True)
    spoilt = {
        "cut": backup[:-20],
        "not gzip": b"hello",
        "a row missing": gzip.compress(b"".join(lines[:1] + lines[2:])),
        "newer": gzip.compress(b"".join([lines[0].replace(b'"revision": "0', b'"revision": "9'), *lines[1:]])),
    }[damage]
    lose_everything(engine)

    with pytest.raises(Rejected, match="cannot be restored"):
        restore(engine, spoilt)

    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM ncr_jobs")).scalar() == 0
    engine.dispose()


@pytest.mark.parametrize("kind", SERVERS)
def test_a_backup_of_sqlite_can_be_restored_elsewhere(kind: str, tmp_path: Path, databases: Databases) -> None:
    source = open_database(databases.create("sqlite", tmp_path))
    (task,) = sql_ledger(source).accept("job-ü")
    target = open_database(databases.create(kind, tmp_path))
    restore(target, save(source))
    assert sql_ledger(target).status(task) is Status.PENDING
    source.dispose()
    target.dispose()


def test_a_database_at_an_older_revision_can_be_saved_before_it_is_upgraded(tmp_path: Path, databases: Databases) -> None:
    engine = open_database(databases.create("sqlite", tmp_path))
    ledger = sql_ledger(engine)
    (task,) = ledger.accept("job-1")
    downgrade(engine, "0001")
    backup = save(engine, "0001")
    upgrade(engine)
    lose_everything(engine)
    restore(engine, backup)
    assert ledger.status(task) is Status.PENDING
    engine.dispose()


def test_an_empty_database_gives_an_empty_backup(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/empty.db")
    to = io.BytesIO()
    assert write_backup(engine, to, None) == 0
    engine.dispose()
