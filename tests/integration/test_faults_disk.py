"""A worker without room: the job waits unspent, leaves nothing on the full disk, and goes on when there is room."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from disks import small_disk
from fault_table import fault
from ncr_upload.application import download_cache
from ncr_upload.domain.admission import SPARE_DISK_BYTES
from ncr_upload.domain.jobs import Status, Task
from ncr_upload.entrypoints.embedded.product import Product
from outcomes import assert_delivered_once, assert_told, assert_undelivered
from workplace import Workplace

UNSPENT = "deferred, no attempt spent; delivered once there is room"


@pytest.fixture
def work_dir(tmp_path: Path, workplace: Workplace) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    workplace.change(work_dir=folder, park_hours=1)
    return folder


@pytest.fixture
def disk(work_dir: Path) -> Iterator[Path]:
    """Large enough for the small product, until something else fills it."""
    with small_disk(work_dir, f"{SPARE_DISK_BYTES + 4_000_000}"):
        yield work_dir


def fill(disk: Path, *, leave_bytes: int) -> None:
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - leave_bytes))


def assert_waits_unspent(workplace: Workplace, task: Task, code: str, *told: str) -> None:
    assert (task.status, task.attempt, task.problem and task.problem.code) == (Status.PENDING, 0, code), task.message
    assert_told(workplace, task, "deferred", *told, "attempt 1 of 3, not counted", "next try in")
    assert workplace.delivered(task.job_id) is None


@fault("Worker: disk too small for the job", injector="small tmpfs as WORK_DIR", invariants="LOPRH", outcome=UNSPENT)
def test_a_disk_without_room_is_told_before_anything_is_fetched(
    workplace: Workplace, job_id: str, product: Product, disk: Path
) -> None:
    workplace.place(job_id, product)
    fill(disk, leave_bytes=2_000_000)
    (task,) = workplace.submit(job_id)
    waiting = workplace.attempt(task)
    assert_waits_unspent(workplace, waiting, waiting.problem.code if waiting.problem else "", "WORK_DIR", str(disk))
    assert not any("downloading" in line for line in workplace.history(task))
    (disk / "filler").unlink()
    assert_undelivered(workplace, waiting)
    workplace.let_time_pass()
    assert_delivered_once(workplace, workplace.attempt(task), product, spent=1)


@fault("Worker: disk full while downloading", injector="small tmpfs as WORK_DIR", invariants="LOPRH", outcome=UNSPENT)
def test_a_disk_that_fills_up_during_a_download_defers_the_job(
    workplace: Workplace, job_id: str, small: Product, disk: Path
) -> None:
    """Another program takes the room after the job has been let in."""

    def fill_up(reached: str) -> None:
        if reached == "download:before":
            fill(disk, leave_bytes=500_000)

    workplace.place(job_id, small)
    (task,) = workplace.submit(job_id)
    waiting = workplace.attempt(task, fill_up)
    assert_waits_unspent(workplace, waiting, "disk_full", str(disk))
    (disk / "filler").unlink()
    assert_undelivered(workplace, waiting)
    workplace.let_time_pass()
    assert_delivered_once(workplace, workplace.attempt(task), small, spent=1)


@fault("Worker: disk out of files", injector="tmpfs with few inodes as WORK_DIR", invariants="LOPRH", outcome=UNSPENT)
@pytest.mark.parametrize("free_files", [0, 1, 2, 3])
def test_a_disk_that_takes_no_more_files_defers_the_job(
    workplace: Workplace, job_id: str, small: Product, work_dir: Path, free_files: int
) -> None:
    """The lock, the folder, the first file: whichever of them does not fit."""
    workplace.place(job_id, small)
    with small_disk(work_dir, f"{SPARE_DISK_BYTES + 4_000_000}", files=10):
        others = [work_dir / f"filler-{number}" for number in range(9 - free_files)]
        for other in others:
            other.touch()
        (task,) = workplace.submit(job_id)
        waiting = workplace.attempt(task)
        assert waiting.problem is not None
        assert_waits_unspent(workplace, waiting, waiting.problem.code, str(work_dir))
        for other in others:
            other.unlink()
        assert_undelivered(workplace, waiting)
        workplace.let_time_pass()
        assert_delivered_once(workplace, workplace.attempt(task), small, spent=1)


@fault("Worker: WORK_DIR cannot be made", injector="a file in its place", invariants="LOPRH", outcome=UNSPENT)
def test_a_work_dir_that_cannot_be_made_defers_the_job_naming_it(
    workplace: Workplace, job_id: str, small: Product, work_dir: Path
) -> None:
    workplace.place(job_id, small)
    work_dir.rmdir()
    work_dir.write_text("in the way")
    (task,) = workplace.submit(job_id)
    waiting = workplace.attempt(task)
    assert_waits_unspent(workplace, waiting, "work_dir_unusable", str(work_dir), "WORK_DIR")
    work_dir.unlink()
    workplace.let_time_pass()
    assert_delivered_once(workplace, workplace.attempt(task), small, spent=1)


@fault(
    "Worker: room that never suffices",
    injector="small tmpfs as WORK_DIR",
    invariants="LPRH",
    outcome="fails after PARK_HOURS, saying what is short; other jobs go on",
)
def test_a_job_that_never_has_room_fails_in_the_end_and_the_others_go_on(
    workplace: Workplace, job_id: str, product: Product, small: Product, work_dir: Path
) -> None:
    with small_disk(work_dir, f"{SPARE_DISK_BYTES + 6_000_000}"):
        fill(work_dir, leave_bytes=SPARE_DISK_BYTES + 2_500_000)
        workplace.place(job_id, product)
        (large,) = workplace.submit(job_id)
        for _ in range(4):
            waiting = workplace.attempt(large)
            assert (waiting.status, waiting.attempt) == (Status.PENDING, 0)
            workplace.let_time_pass()
        workplace.place(f"{job_id}-small", small)
        assert workplace.deliver(f"{job_id}-small").status is Status.COMPLETED
        assert workplace.delivered(f"{job_id}-small") == small.delivered
        workplace.change(park_hours=1e-9)
        ended = workplace.attempt(large)
        assert (ended.status, workplace.delivered(job_id)) == (Status.FAILED, None)
        assert "PARK_HOURS" in ended.message
        assert str(work_dir) in ended.message
        assert [path.name for path in work_dir.iterdir() if path.name != download_cache.FOLDER] == ["filler"]
