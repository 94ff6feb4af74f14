"""A task as callers see it (wire format): one function for the API's answers and for what workers post to Redis."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from ncr_upload.domain.jobs import TERMINAL, Problem, Stage, Task

VIEW_FIELDS = (
    *("job_id", "task_id", "username", "campaign", "row_id", "batch_id", "status", "stage", "progress", "message"),
    *("attempt", "max_attempts", "timestamp", "created_at", "started_at", "finished_at", "next_attempt_at"),
    *("sku", "verdict", "files", "bytes", "problem"),
)

_STAGE_ORDER = list(Stage)


@lru_cache(maxsize=4096)  # the same few are asked for again and again
def iso_time(epoch_seconds: float) -> str:
    """ISO 8601 in UTC with milliseconds and Z: ``2026-11-23T20:56:01.250Z``."""
    return datetime.fromtimestamp(epoch_seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def view_of(task: Task) -> dict[str, Any]:
    """The public view of `task`. A worker posts the same of a task whose stage, progress and message are newer than the
    ledger's row (`dataclasses.replace`)."""
    return {
        "job_id": task.job_id,
        "task_id": task.task_id,
        "username": task.username,
        "campaign": task.campaign,
        "row_id": task.row_id,
        "batch_id": task.batch_id,
        "status": task.status.value,
        "stage": task.stage.value,
        "progress": task.progress,
        "message": task.message,
        "attempt": task.attempt,
        "max_attempts": task.max_attempts,
        "timestamp": iso_time(task.updated_at),
        "created_at": iso_time(task.created_at),
        "started_at": optional_time(task.started_at),
        "finished_at": optional_time(task.finished_at),
        "next_attempt_at": optional_time(task.due_at),
        "sku": task.sku,
        "verdict": task.verdict,
        "files": task.files,
        "bytes": task.bytes,
        "problem": _problem_view(task.problem),
    }


def with_live(task: Task, live: Mapping[str, Any] | None) -> dict[str, Any]:
    """The view of the ledger's `task`, with the progress of the `live` view where it speaks of the same attempt in the
    same status and is not behind. An ended task is never touched."""
    view = view_of(task)
    if live is None or task.status in TERMINAL or not _is_same_moment(task, live):
        return view
    return view | {name: live[name] for name in ("stage", "progress", "message", "timestamp")}


def is_whole(view: Mapping[str, Any]) -> bool:
    """Whether a view read from Redis can stand for itself (an older release may have posted another shape)."""
    return set(VIEW_FIELDS) <= set(view)


def _is_same_moment(task: Task, live: Mapping[str, Any]) -> bool:
    if not is_whole(live) or live["stage"] not in _STAGE_ORDER:
        return False
    same = live["status"] == task.status and live["attempt"] == task.attempt
    return same and _STAGE_ORDER.index(live["stage"]) >= _STAGE_ORDER.index(task.stage)


def optional_time(epoch_seconds: float | None) -> str | None:
    """As `iso_time`; None stays None."""
    return None if epoch_seconds is None else iso_time(epoch_seconds)


def _problem_view(problem: Problem | None) -> dict[str, str] | None:
    if problem is None:
        return None
    return {
        "code": problem.code,
        "class": problem.error_class,
        "message": problem.message,
        "next_step": problem.next_step,
    }
