"""Between rows of the ledger and the domain's values: nothing is lost on the way, on every database."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from typing import Any

import pytest
from sqlalchemy import Engine, select, update

from databases import SERVERS
from ledgers import sql_ledger
from ncr_upload.adapters.sql.rows import (
    has_attempt_left,
    line_of,
    problem_columns,
    read_now,
    read_row,
    read_task,
    take_row,
    task_of,
    write_event,
)
from ncr_upload.adapters.sql.tables import events, jobs
from ncr_upload.domain.jobs import PROGRESS_SPAN, Problem, Stage, Status, Task
from ncr_upload.domain.retries import LOOKS

PROBLEM = Problem("disk_full", "transient", "kein Platz 💾", "Free some.")
FACTS: dict[str, Any] = {
    "status": "uploading",
    "stage": "upload",
    "message": "12 of 36 files ü",
    "attempt": 2,
    "max_attempts": 5,
    "started_at": 1_700_000_001.25,
    "finished_at": 1_700_000_002.5,
    "sku": "SKÜ-1",
    "verdict": "Warning",
    "file_count": 36,
    "byte_count": 10**15,
    "worker": "w1",
    "publish_fence": 3,
}


@pytest.fixture
def task(engine: Engine) -> Task:
    (task,) = sql_ledger(engine).accept("job-1")
    return task


def set_columns(engine: Engine, task: Task, **values: Any) -> None:
    with engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.task_id == task.task_id).values(**values))


def find(engine: Engine, task: Task) -> Task:
    with engine.connect() as connection:
        found = read_task(connection, task.task_id)
    assert found is not None
    return found


def test_every_column_of_a_task_arrives_in_its_field(engine: Engine, task: Task) -> None:
    set_columns(engine, task, **FACTS, **problem_columns(PROBLEM))
    found = find(engine, task)
    expected = {
        **{name: FACTS[name] for name in ("message", "attempt", "max_attempts", "started_at", "finished_at", "sku", "verdict")},
        **{"status": Status.UPLOADING, "stage": Stage.UPLOAD, "files": 36, "bytes": 10**15},
        **{"problem": PROBLEM, "publish_announced": True, "due_at": None, "progress": 60.0},
        **{"task_id": task.task_id, "job_id": "job-1", "username": "ann", "campaign": "spring"},
        **{"row_id": None, "batch_id": None, "created_at": task.created_at, "updated_at": task.updated_at},
    }
    assert {field.name: getattr(found, field.name) for field in fields(found)} == expected


def test_what_is_null_is_none_and_no_problem(engine: Engine, task: Task) -> None:
    found = find(engine, task)
    assert (found.sku, found.verdict, found.files, found.bytes, found.problem) == (None,) * 5
    assert (found.started_at, found.finished_at, found.publish_announced) == (None, None, False)


def test_a_problem_that_is_over_leaves_no_column_behind(engine: Engine, task: Task) -> None:
    set_columns(engine, task, **problem_columns(PROBLEM))
    assert find(engine, task).problem == PROBLEM
    set_columns(engine, task, **problem_columns(None))
    assert find(engine, task).problem is None
    with engine.connect() as connection:
        row = read_row(connection, task.task_id)
    assert {name for name in row if name.startswith("problem_") and row[name] is not None} == set()


def test_only_a_task_that_waits_says_when_it_is_due(engine: Engine, task: Task) -> None:
    set_columns(engine, task, claimable_at=1_700_000_000.5)
    assert find(engine, task).due_at == 1_700_000_000.5
    set_columns(engine, task, worker="w1")  # claimed: it is the end of the lease
    assert find(engine, task).due_at is None
    set_columns(engine, task, worker=None, claimable_at=None)
    assert find(engine, task).due_at is None


@pytest.mark.parametrize("stage", Stage)
def test_the_progress_is_the_beginning_of_the_stage(stage: Stage) -> None:
    row = dict.fromkeys((column.name for column in jobs.c), None) | {
        "status": "processing",
        "stage": stage.value,
        "message": "",
    }
    assert task_of(row).progress == PROGRESS_SPAN[stage][0]


@pytest.mark.parametrize("changes", [{"status": "lost"}, {"stage": "nowhere"}])
def test_a_row_with_a_word_of_another_release_is_not_misread(changes: dict[str, str]) -> None:
    row = dict.fromkeys((column.name for column in jobs.c), None) | {"status": "processing", "stage": "upload"} | changes
    with pytest.raises(ValueError, match=r"lost|nowhere"):
        task_of(row)


def test_a_task_that_is_not_there_is_none(engine: Engine, task: Task) -> None:
    with engine.begin() as connection:
        assert read_row(connection, "no such task") is None
        assert read_task(connection, "no such task") is None
        assert not take_row(connection, "no such task")
        assert take_row(connection, task.task_id)


@pytest.mark.parametrize("engine", SERVERS, indirect=True)
def test_a_row_that_another_transaction_writes_is_passed_over_at_once(engine: Engine, task: Task) -> None:
    """SQLite has one writer at a time: there is no other transaction to pass over."""
    with engine.begin() as writing, engine.begin() as asking:
        writing.execute(update(jobs).where(jobs.c.task_id == task.task_id).values(message="being written"))
        assert not take_row(asking, task.task_id)
    with engine.begin() as asking:
        assert take_row(asking, task.task_id)


@pytest.mark.parametrize(
    ("attempt", "publish_fence", "left"),
    [(0, None, True), (4, None, True), (5, None, False), (5, 3, True), (4 + LOOKS, 3, True), (5 + LOOKS, 3, False)],
)
def test_an_announced_publish_gives_a_few_attempts_more_to_look(
    engine: Engine, task: Task, attempt: int, publish_fence: int | None, left: bool
) -> None:
    set_columns(engine, task, attempt=attempt, max_attempts=5, publish_fence=publish_fence)
    with engine.connect() as connection:
        found = connection.execute(select(jobs.c.task_id).where(has_attempt_left())).scalars().all()
    assert (task.task_id in found) is left


def test_a_line_of_the_history_has_the_databases_time_and_an_actor_that_fits(engine: Engine, task: Task) -> None:
    with engine.begin() as connection:
        before = read_now(connection)
        write_event(connection, task.task_id, attempt=1, stage="upload", kind="note", actor="a" * 300, message="ü" * 5000)
    with engine.connect() as connection:
        line = connection.execute(select(events).order_by(events.c.id.desc()).limit(1)).mappings().one()
    assert (line["task_id"], line["attempt"], line["stage"], line["kind"]) == (task.task_id, 1, "upload", "note")
    assert (line["actor"], line["message"]) == ("a" * 255, "ü" * 5000)
    assert before <= line["at"] <= before + 60
    assert abs(before - time.time()) < 3600, "seconds since the epoch"


def test_a_line_that_goes_with_a_change_is_cut_alike() -> None:
    line = line_of(attempt=1, stage="upload", kind="note", actor="a" * 300, message="words")
    assert line == {
        **{"line_attempt": 1, "line_stage": "upload", "line_kind": "note"},
        **{"line_actor": "a" * 255, "line_message": "words"},
    }


def test_a_task_that_was_read_is_equal_to_the_same_read_again(engine: Engine, task: Task) -> None:
    assert find(engine, task) == find(engine, task) == replace(task)
