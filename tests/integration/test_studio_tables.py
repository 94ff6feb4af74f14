"""The studio's tables for development and tests, as an outsider uses them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from sqlalchemy import Dialect, Engine, text
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.schema import CreateTable

from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.entrypoints.embedded.studio import (
    MODEL_VALIDATION,
    Listed,
    RowTaken,
    add_job,
    create_tables,
    missing_tables,
    read_rows,
)

NOON = datetime(2026, 11, 23, 12, 0, 0)  # noqa: DTZ001 - studio time carries no zone


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    opened = open_engine(f"sqlite:///{tmp_path / 'studio.db'}")
    create_tables(opened)
    yield opened
    opened.dispose()


def ask(engine: Engine, statement: str) -> list[tuple[object, ...]]:
    with engine.begin() as connection:
        result = connection.execute(text(statement))
        return [tuple(row) for row in result] if result.returns_rows else []


def test_every_table_of_the_studio_is_made_and_making_them_again_keeps_their_rows(engine: Engine) -> None:
    add_job(engine, "job-1", "SKU1", [])
    create_tables(engine)
    assert missing_tables(engine) == set()
    assert ask(engine, "SELECT job_id FROM job_details") == [("job-1",)]


@pytest.mark.parametrize(("dialect", "kind"), [(postgresql.dialect(), "TEXT"), (mysql.dialect(), "MEDIUMTEXT")])
def test_a_long_verdict_has_room_in_the_studios_databases(dialect: Dialect, kind: str) -> None:
    assert f"json {kind}," in str(CreateTable(MODEL_VALIDATION).compile(dialect=dialect)).replace(" \n", "\n")


def test_an_outsider_can_insert_with_few_columns(engine: Engine) -> None:
    ask(engine, "INSERT INTO job_details (job_id, sku_id, is_uploaded) VALUES ('j', 's', 1)")
    ask(engine, "INSERT INTO job_files (job_id, file_path) VALUES ('j', 'a/b.glb')")
    for statement in (
        "INSERT INTO model_validation (job_id) VALUES ('j')",
        "INSERT INTO validation_failed_req (job_id) VALUES ('j')",
        "INSERT INTO email (sku, campagin) VALUES ('s', 'c')",
        "INSERT INTO history_log (sku_id) VALUES ('s')",
    ):
        ask(engine, statement)
    assert ask(engine, "SELECT status, is_reviewed, upload_count FROM job_details") == [("Active", 0, 0)]
    assert ask(engine, 'SELECT file_type, "timestamp" IS NOT NULL FROM job_files') == [("base", 1)]


def test_times_are_kept_in_whole_seconds(engine: Engine) -> None:
    add_job(engine, "j", "s", [Listed("a/b.glb", NOON)])
    assert ask(engine, 'SELECT "timestamp" FROM job_files') == [("2026-11-23 12:00:00",)]


def test_a_job_put_in_place_again_awaits_again_with_its_new_files(engine: Engine) -> None:
    row_id = add_job(engine, "j", "s", [Listed("old.glb", NOON)], row_id=123)
    ask(engine, "UPDATE job_details SET is_uploaded = 0, upload_count = 1")
    assert add_job(engine, "j", "s", [Listed("new.glb", NOON)], row_id=123) == row_id == 123
    assert ask(engine, "SELECT is_uploaded, upload_count FROM job_details") == [(1, 1)]
    assert ask(engine, "SELECT file_path FROM job_files") == [("new.glb",)]


def test_a_row_id_of_another_job_is_refused_and_nothing_is_written(engine: Engine) -> None:
    add_job(engine, "theirs", "s", [], row_id=123)
    with pytest.raises(RowTaken, match="theirs"):
        add_job(engine, "ours", "s", [Listed("a.glb", NOON)], row_id=123)
    assert ask(engine, "SELECT job_id FROM job_details") == [("theirs",)]
    assert ask(engine, "SELECT count(*) FROM job_files") == [(0,)]


def test_reading_a_jobs_rows_leaves_out_those_of_others(engine: Engine) -> None:
    add_job(engine, "mine", "s1", [])
    add_job(engine, "other", "s2", [])
    ask(engine, "INSERT INTO email (sku) VALUES ('s1')")
    ask(engine, "INSERT INTO email (sku) VALUES ('s2')")
    rows = read_rows(engine, "mine", "s1")
    assert [row["job_id"] for row in rows["job_details"]] == ["mine"]
    assert [row["sku"] for row in rows["email"]] == ["s1"]
