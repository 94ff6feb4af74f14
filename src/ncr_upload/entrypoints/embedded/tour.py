"""The demo's two jobs, through the real HTTP API: one product delivered, one refused; and what came of each."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import httpx

from ncr_upload.entrypoints.embedded.endpoints import Endpoints

Json: TypeAlias = dict[str, Any]
Rows: TypeAlias = dict[str, list[Json]]

JOB_SECONDS = 60.0
CLEANUP_SECONDS = 10.0
_POLL_SECONDS = 0.1
_ENDED = frozenset({"completed", "validation_failed", "failed", "cancelled"})


@dataclass(frozen=True, slots=True)
class DeliveredFile:
    """`path` is relative to the destination's root."""

    path: str
    size: int
    sha256: str


@dataclass(slots=True)
class Chapter:
    """What came of one job. `failures` says in words what is not as it must be."""

    job_id: str
    sku: str
    status: Json = field(default_factory=dict)
    files: list[DeliveredFile] = field(default_factory=list)
    rows_before: Rows = field(default_factory=dict)
    rows_after: Rows = field(default_factory=dict)
    timeline: list[Json] = field(default_factory=list)
    took_seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.failures.append(f"{self.job_id}: {otherwise}")

    def to_json(self) -> Json:
        return asdict(self)


class TourStopped(Exception):
    """The API did not answer as it must; the message says to what."""


OnStatus = Callable[[Json], None]


def run_job(endpoints: Endpoints, job: Json, on_status: OnStatus) -> tuple[Json, list[Json]]:
    """Submit the job and follow it to its end; its last status and its timeline. Raises `TourStopped`."""
    api = endpoints["api"]
    with httpx.Client(base_url=api["url"], headers={"X-API-Key": api["key"]}, timeout=10, trust_env=False) as client:
        accepted = _ask(client, "POST", "/process-job", 202, json=job)
        status = _follow(client, accepted["task_id"], on_status)
        history = _ask(client, "GET", f"/jobs/{accepted['task_id']}/history", 200)
        return status, history["events"]


def _follow(client: httpx.Client, task_id: str, on_status: OnStatus) -> Json:
    deadline = time.monotonic() + JOB_SECONDS
    while True:
        status = _ask(client, "GET", f"/job-status/{task_id}", 200)
        on_status(status)
        if status["status"] in _ENDED:
            return status
        if time.monotonic() > deadline:
            raise TourStopped(
                f"task {task_id} has not ended after {JOB_SECONDS:.0f} s: {status['status']}, {status['message']}"
            )
        time.sleep(_POLL_SECONDS)


def _ask(client: httpx.Client, method: str, path: str, expected: int, **options: Any) -> Json:
    try:
        response = client.request(method, path, **options)
    except httpx.HTTPError as error:
        raise TourStopped(f"{method} {path}: {type(error).__name__}: {error}") from error
    if response.status_code != expected:
        raise TourStopped(f"{method} {path} answered {response.status_code} instead of {expected}: {response.text[:500]}")
    answer: Json = response.json()
    return answer


def list_delivered(root: Path, job_id: str) -> list[DeliveredFile]:
    """What the partner sees of the job, by path."""
    found = sorted(path for path in (root / job_id).rglob("*") if path.is_file())
    return [
        DeliveredFile(str(path.relative_to(root)), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in found
    ]


def check_delivered(chapter: Chapter, expected: dict[str, bytes], sftp_root: Path) -> None:
    """Hold the delivery against the generated files, and the rows against docs/contract.md, section 1."""
    chapter.expect(chapter.status["status"] == "completed", f"ended as {chapter.status['status']}: {chapter.status['message']}")
    wanted = {f"{chapter.job_id}/{target}": hashlib.sha256(data).hexdigest() for target, data in expected.items()}
    got = {file.path: file.sha256 for file in chapter.files}
    for path in sorted(wanted.keys() | got.keys()):
        if path not in got:
            chapter.expect(False, f"{path} was not delivered")
        elif path not in wanted:
            chapter.expect(False, f"{path} was delivered and is no file of the product")
        else:
            chapter.expect(wanted[path] == got[path], f"{path} was delivered with other bytes")
    details = chapter.rows_after["job_details"][0]
    approved = details["is_uploaded"] == 0 and details["job_status"] == "IAPPROVED"
    chapter.expect(approved, f"job_details was not updated: {details}")
    for table in ("email", "history_log"):
        added = len(chapter.rows_after[table]) - len(chapter.rows_before[table])
        chapter.expect(added == 1, f"{added} rows were added to {table} instead of one")
    check_nothing_staged(chapter, sftp_root)


def check_refused(chapter: Chapter, sftp_root: Path) -> None:
    """Nothing of the job may be at the destination, and its reason must be said."""
    status = chapter.status
    chapter.expect(status["status"] == "validation_failed", f"ended as {status['status']} instead of validation_failed")
    chapter.expect(
        "ACCESSOR_INDEX_OOB" in str(status["problem"]), f"the reason does not name the broken mesh: {status['problem']}"
    )
    chapter.expect(not (sftp_root / chapter.job_id).exists(), "something of a refused package was delivered")
    chapter.expect(not chapter.rows_after["email"], "an email row was written for a refused package")
    check_nothing_staged(chapter, sftp_root)


def check_nothing_staged(chapter: Chapter, sftp_root: Path) -> None:
    """The worker clears its staging folder after it has told the outcome: give it a moment."""
    deadline = time.monotonic() + CLEANUP_SECONDS
    while left := [path.name for path in (sftp_root / ".ncr-staging").glob(f"*{chapter.status['task_id']}*")]:
        if time.monotonic() > deadline:
            chapter.expect(False, f"staging was left at the destination: {', '.join(left)}")
            return
        time.sleep(_POLL_SECONDS)
