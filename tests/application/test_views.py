"""A task as callers see it: the ledger decides, a live view only adds how far the stage is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ncr_upload.application.views import VIEW_FIELDS, iso_time, view_of, with_live
from ncr_upload.domain.jobs import TERMINAL, Problem, Stage, Status, Task

TASK = Task(
    task_id="t1",
    job_id="job-1",
    username="ann",
    campaign="spring",
    row_id=7,
    batch_id=None,
    status=Status.PROCESSING,
    stage=Stage.DOWNLOAD,
    progress=5.0,
    message="downloading",
    attempt=1,
    max_attempts=5,
    created_at=1_795_467_361.25,
    updated_at=1_795_467_362.0,
)
LIVE = view_of(replace(TASK, progress=25.0, message="17 of 36 files", updated_at=TASK.updated_at + 1))


def test_a_view_has_every_field_of_the_contract_and_no_other() -> None:
    assert tuple(view_of(TASK)) == VIEW_FIELDS


def test_times_are_utc_with_a_z() -> None:
    assert iso_time(0) == "1970-01-01T00:00:00.000Z"
    assert view_of(TASK)["created_at"].endswith(".250Z")


def test_a_problem_is_told_in_full() -> None:
    view = view_of(replace(TASK, problem=Problem("object_missing", "rejected", "what", "next")))
    assert view["problem"] == {"code": "object_missing", "class": "rejected", "message": "what", "next_step": "next"}


def test_the_live_view_of_the_same_attempt_adds_its_progress() -> None:
    view = with_live(TASK, LIVE)
    assert (view["progress"], view["message"]) == (25.0, "17 of 36 files")


@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_a_live_view_never_touches_an_ended_task(status: Status) -> None:
    ended = replace(TASK, status=status, stage=Stage.DONE)
    assert with_live(ended, LIVE | {"status": status.value, "stage": "done"}) == view_of(ended)


@pytest.mark.parametrize(
    "stale",
    [
        {"attempt": 2},
        {"status": "uploading"},
        {"stage": "lookup"},
        {"stage": "unheard-of"},
    ],
)
def test_a_live_view_of_another_moment_changes_nothing(stale: dict[str, Any]) -> None:
    assert with_live(TASK, LIVE | stale) == view_of(TASK)


def test_a_live_view_of_another_shape_changes_nothing() -> None:
    assert with_live(TASK, {"status": "processing", "attempt": 1, "progress": 99}) == view_of(TASK)
