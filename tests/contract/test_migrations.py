"""Migrations keep what is there, wait for each other, and leave a newer database alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, inspect, text

from databases import SERVERS, Databases
from ledgers import sql_ledger
from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.domain.jobs import Stage, Status
from ncr_upload.domain.packages import PackageFile
from ncr_upload.entrypoints.bootstrap.records import upgrade_database
from ncr_upload.entrypoints.settings import Settings
from ncr_upload.migrations.apply import REVISIONS, current_revision, downgrade, newest_revision, upgrade
from studio_rows import put_job

KINDS = ["sqlite", *SERVERS]
PREVIOUS = sorted(path.name.split("_")[0] for path in REVISIONS.glob("[0-9]*_*.py"))[-2]
FILE = PackageFile("k", "SKU1/a.glb", 3, "aa", 1, "e1")


def populate(engine: Engine) -> None:
    """A task in each state that matters, with events, files and a batch; and a row of the studio's."""
    ledger = sql_ledger(engine)
    done, running, _ = ledger.accept("done", "running", "waiting")
    ledger.accept("a", "b", batch_id="batch-1", release=1)
    claim = ledger.uploading(done)
    ledger.claims.advance(claim, status=Status.UPLOADING, stage=Stage.UPLOAD, message="ü 🚀", files=[FILE])
    ledger.claims.finish(claim, status=Status.COMPLETED, stage=Stage.DONE, message="delivered", problem=None)
    ledger.claim(running)
    put_job(engine, "done")


def content(engine: Engine, columns: dict[str, list[str]] | None = None) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every table but Alembic's own; only these columns where they are given."""
    told = columns or columns_of(engine)
    with engine.connect() as connection:
        return {
            table: sorted((tuple(row) for row in connection.execute(text(f"SELECT {', '.join(names)} FROM {table}"))), key=repr)
            for table, names in told.items()
        }


def columns_of(engine: Engine) -> dict[str, list[str]]:
    found = inspect(engine)
    tables = [name for name in found.get_table_names() if name.startswith("ncr_") and name != "ncr_alembic_version"]
    return {table: [column["name"] for column in found.get_columns(table)] for table in sorted(tables)}


def test_a_populated_database_goes_one_step_down_and_up_again_with_its_rows(engine: Engine) -> None:
    populate(engine)
    newest = content(engine)
    assert downgrade(engine, PREVIOUS) == (newest_revision(), PREVIOUS)
    older = columns_of(engine)
    kept = content(engine, older)
    assert {table: len(rows) for table, rows in kept.items()} == {table: len(newest[table]) for table in older}
    assert upgrade(engine) == (PREVIOUS, newest_revision())
    assert content(engine, older) == kept
    assert sql_ledger(engine).accept("after")


@pytest.mark.parametrize("kind", KINDS)
def test_a_database_populated_at_the_first_revision_keeps_its_rows_on_the_way_up(
    databases: Databases, tmp_path: Path, kind: str
) -> None:
    engine = open_engine(databases.create(kind, tmp_path))
    upgrade(engine)
    downgrade(engine, "0001")
    columns = "task_id, job_id, username, campaign, status, stage, message, attempt, max_attempts, fence, cancel_requested"
    values = "'t-1', 'job-1', 'ann 🚀', 'spring', 'pending', 'queued', 'accepted', 0, 3, 0, 0, 1.5, 1.5, 1.5"
    with engine.begin() as connection:
        connection.execute(text(f"INSERT INTO ncr_jobs ({columns}, created_at, updated_at, claimable_at) VALUES ({values})"))
    before = content(engine, older := columns_of(engine))
    assert upgrade(engine) == ("0001", newest_revision())
    assert content(engine, older) == before
    found = sql_ledger(engine).submissions.task("t-1")
    assert found is not None
    assert (found.username, found.status) == ("ann 🚀", Status.PENDING)
    assert sql_ledger(engine).claim(found).fence == 1
    engine.dispose()


@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_that_start_at_once_migrate_once(databases: Databases, tmp_path: Path, kind: str) -> None:
    settings = Settings(_env_file=None, database_url=SecretStr(databases.create(kind, tmp_path)))
    with ThreadPoolExecutor(4) as programs:
        answers = list(programs.map(lambda _: upgrade_database(settings), range(4)))
    assert sorted(before or "" for before, _ in answers)[0] == ""
    assert {after for _, after in answers} == {newest_revision()}
    engine = open_engine(settings.resolved_database_url())
    assert sql_ledger(engine).accept("job-1")
    engine.dispose()


def test_the_release_before_leaves_a_newer_database_alone(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE ncr_alembic_version SET version_num = '9999'"))
    assert upgrade(engine) == ("9999", "9999")
    assert current_revision(engine) == "9999"
