"""Compares what was asked for with what was found. Nothing here believes what the product says of itself.

`judge_job` once a trial's jobs should have ended, `judge_leftovers` once everything is quiet. Both are pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["lost", "duplicated", "partially_visible", "stuck", "leaked", "previous_lost"]
KINDS: tuple[Kind, ...] = ("lost", "duplicated", "partially_visible", "stuck", "leaked", "previous_lost")
ENDED = ("completed", "validation_failed", "failed", "cancelled")

Expected = Literal["delivered", "refused", "missing"]


@dataclass(frozen=True)
class Finding:
    """One promise broken."""

    kind: Kind
    job_id: str
    what: str


@dataclass
class Asked:
    """A job as the workload asked for it. `versions`: the hashes of each upload, in order, the next one only after the one
    before was delivered. `scarce`: attempts may run out, so that a failure is an end like another. `copied`: the destination
    copied folders in place of renaming them, so that a part of a package may have been visible for a while."""

    job_id: str
    expected: Expected = "delivered"
    versions: list[Mapping[str, str]] = field(default_factory=list)
    accepted: set[str] = field(default_factory=set)
    cancelled: set[str] = field(default_factory=set)
    cancel_confirmed: set[str] = field(default_factory=set)
    scarce: bool = False
    copied: bool = False


@dataclass
class Found:
    """What there is of a job. `tasks` and `events` are rows of the ledger; `uploads`, `emails` and `history` count what the
    studio's tables say; `delivered` is path → hash at the final name; `published` what the observer saw come there."""

    tasks: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    uploads: int
    emails: int
    history: int
    delivered: Mapping[str, str] | None
    published: int
    partial: Sequence[str] = ()
    previous_lost: Sequence[str] = ()


def judge_job(asked: Asked, found: Found) -> list[Finding]:
    """Every promise that was broken for this job."""
    done = [task for task in found.tasks if task["status"] == "completed"]
    judged: list[tuple[Kind, str]] = [
        *_lost_or_stuck(asked, found),
        *_wrong_ends(asked, found),
        *_deliveries(asked, len(done)),
        *_records(found, len(done)),
        *_at_the_destination(asked, found, len(done)),
    ]
    return [Finding(kind, asked.job_id, what) for kind, what in judged]


def _lost_or_stuck(asked: Asked, found: Found) -> Iterable[tuple[Kind, str]]:
    for task_id in sorted(asked.accepted - {str(task["task_id"]) for task in found.tasks}):
        yield "lost", f"task {task_id} was accepted, and the ledger does not know it"
    for task in found.tasks:
        if task["status"] not in ENDED:
            yield "stuck", f"task {task['task_id']} is still '{task['status']}' in stage '{task['stage']}': {task['message']}"


def _wrong_ends(asked: Asked, found: Found) -> Iterable[tuple[Kind, str]]:
    for task in found.tasks:
        status, code, task_id = task["status"], task["problem_code"], task["task_id"]
        if status == "completed" and task_id in asked.cancel_confirmed:
            yield "lost", f"task {task_id} was answered as cancelled, and it was delivered"
        if status in ("completed", *_live_of(status)) or _is_excused(asked, task):
            continue
        yield "lost", f"task {task_id} ended as '{status}' ({code}): {task['message']}"


def _live_of(status: str) -> tuple[str, ...]:
    return () if status in ENDED else (status,)


def _is_excused(asked: Asked, task: Mapping[str, Any]) -> bool:
    """Whether the task had to end without a delivery, or may."""
    status, code = task["status"], task["problem_code"]
    if status == "cancelled":
        return task["task_id"] in asked.cancelled
    if status == "validation_failed":
        return asked.expected == "refused"
    if asked.scarce:
        return True
    # What was submitted once more after it had ended finds nothing that awaits upload.
    ended_before = code == "not_awaiting_upload" and asked.expected != "missing"
    return ended_before or (code == "object_missing" and asked.expected == "missing")


def _deliveries(asked: Asked, done: int) -> Iterable[tuple[Kind, str]]:
    wanted = len(asked.versions) if asked.expected == "delivered" else 0
    if done > wanted:
        yield "duplicated", f"{done} tasks completed for {wanted} uploads to deliver"
    if done < wanted - (1 if asked.cancelled else 0) and not asked.scarce:
        yield "lost", f"{done} tasks completed for {wanted} uploads to deliver"


def _records(found: Found, done: int) -> Iterable[tuple[Kind, str]]:
    for name, count in (("upload_count", found.uploads), ("email rows", found.emails), ("history_log rows", found.history)):
        if count != done:
            yield ("duplicated" if count > done else "lost"), f"{name}: {count} for {done} completed tasks"
    ends = Counter(str(event["task_id"]) for event in found.events if event["kind"] in ENDED)
    for task in found.tasks:
        count = ends[str(task["task_id"])]
        if task["status"] in ENDED and count != 1:
            yield ("duplicated" if count > 1 else "lost"), f"task {task['task_id']} has {count} events that say it ended"


def _at_the_destination(asked: Asked, found: Found, done: int) -> Iterable[tuple[Kind, str]]:
    for sighting in found.previous_lost:
        yield "previous_lost", sighting
    for sighting in found.partial if not asked.copied else ():
        yield "partially_visible", sighting
    if found.published > done and not asked.copied:
        yield "duplicated", f"{found.published} folders were seen at the final name for {done} completed tasks"
    if found.delivered is None:
        if done:
            yield "lost", "it is completed, and there is no folder at the destination"
    elif not done:
        yield "lost", f"{len(found.delivered)} files are at the destination, and no task completed"
    elif done <= len(asked.versions) and found.delivered != asked.versions[done - 1]:
        kind: Kind = "lost" if found.delivered in asked.versions else "partially_visible"
        yield kind, f"the destination does not hold version {done}: {_differing(found.delivered, asked.versions[done - 1])}"


def _differing(found: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    paths = sorted(path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path))
    return f"{len(paths)} files differ, such as {paths[0]}"


@dataclass
class Leftovers:
    """What should not be there once everything is quiet: names, each list empty when nothing leaked."""

    staging: Sequence[str] = ()
    workspaces: Sequence[str] = ()
    temporary: Sequence[str] = ()
    leases: Sequence[str] = ()
    redis_keys: Sequence[str] = ()


def judge_leftovers(left: Leftovers) -> list[Finding]:
    """Every kind of thing that was left behind."""
    named = {
        "staging folders": left.staging,
        "workspaces": left.workspaces,
        "temporary files": left.temporary,
        "leases or cleanings": left.leases,
        "Redis keys": left.redis_keys,
    }
    return [
        Finding("leaked", "", f"{len(names)} {what}: {', '.join(list(names)[:5])}") for what, names in named.items() if names
    ]
