"""Workspaces: one an attempt, taken over by the task's next attempt, gone when the task has ended."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ledger_twin import MemoryHost
from ncr_upload.application.download_cache import DownloadCache
from ncr_upload.application.ports import Fetched, ObjectInfo
from ncr_upload.application.workspace import JOURNAL, Workspace, remove_oldest, remove_workspaces, sweep_workspaces
from ncr_upload.domain.jobs import TERMINAL, Status

HOLD = """
import sys, time
from pathlib import Path
from ncr_upload.application.workspace import Workspace
with Workspace(Path(sys.argv[1]), sys.argv[2], 1) as workspace:
    workspace.place("key").write_text("x")
    print("held", flush=True)
    time.sleep(60)
"""
KEY, CONTENT, ETAG = "artists/a.glb", b"glTF and so on", "e" * 32
WANTED = ObjectInfo(KEY, len(CONTENT), ETAG)
FETCHED = Fetched(len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), zlib.crc32(CONTENT), ETAG)


@pytest.fixture
def task_id() -> str:
    return str(uuid.uuid4())


def download(work_dir: Path, task_id: str, fence: int = 1) -> None:
    """An attempt that fetched one object and then failed."""
    with Workspace(work_dir, task_id, fence) as workspace:
        workspace.place(KEY).write_bytes(CONTENT)
        workspace.note(KEY, FETCHED)


def found(work_dir: Path, task_id: str, wanted: ObjectInfo = WANTED, fence: int = 2) -> Fetched | None:
    """What the next attempt finds of it."""
    with Workspace(work_dir, task_id, fence) as workspace:
        workspace.clear_all_but([wanted])
        kept = workspace.find(wanted)
        assert kept is None or workspace.place(wanted.key).read_bytes() == CONTENT
        return kept


def sweep(work_dir: Path, statuses: Mapping[str, Status]) -> list[str]:
    def find_statuses(task_ids: Sequence[str]) -> Mapping[str, Status]:
        return {task_id: statuses[task_id] for task_id in task_ids if task_id in statuses}

    return sweep_workspaces(work_dir, find_statuses, cache_in(work_dir))


def cache_in(work_dir: Path) -> DownloadCache:
    return DownloadCache(work_dir, 0, MemoryHost())


def hold(work_dir: Path, task_id: str) -> subprocess.Popen[str]:
    """A worker process with a workspace."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(work_dir), task_id], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


# --- what an attempt finds ----------------------------------------------------------------------------------------


def test_a_workspace_begins_empty_and_is_private(tmp_path: Path, task_id: str) -> None:
    with Workspace(tmp_path / "made", task_id, 3) as workspace:
        assert list(workspace.path.iterdir()) == []
        assert workspace.path.stat().st_mode & 0o077 == 0


def test_what_an_attempt_downloaded_is_there_for_the_next_one_and_in_one_place_only(tmp_path: Path, task_id: str) -> None:
    download(tmp_path, task_id)
    assert found(tmp_path, task_id, fence=5) == FETCHED
    assert [path.name for path in tmp_path.iterdir()] == [f"{task_id}-5"]


def test_another_tasks_workspace_is_not_taken_over(tmp_path: Path, task_id: str) -> None:
    download(tmp_path, str(uuid.uuid4()))
    assert found(tmp_path, task_id) is None


def test_an_older_attempt_takes_nothing_from_a_newer_one(tmp_path: Path, task_id: str) -> None:
    download(tmp_path, task_id, fence=9)
    assert found(tmp_path, task_id, fence=2) is None
    assert (tmp_path / f"{task_id}-9").exists()


def test_of_several_older_workspaces_the_newest_is_taken_over_and_the_others_go(tmp_path: Path, task_id: str) -> None:
    (tmp_path / f"{task_id}-1").mkdir()
    (tmp_path / f"{task_id}-10").mkdir()
    (tmp_path / f"{task_id}-10" / "mark").touch()
    with Workspace(tmp_path, task_id, 11) as workspace:
        assert [path.name for path in workspace.path.iterdir()] == ["mark"]
    assert [path.name for path in tmp_path.iterdir()] == [f"{task_id}-11"]


@pytest.mark.parametrize(
    "wanted",
    [replace(WANTED, etag="f" * 32), replace(WANTED, size=len(CONTENT) + 1), replace(WANTED, key="artists/b.glb")],
)
def test_an_object_that_is_not_the_one_that_was_fetched_is_not_kept(tmp_path: Path, task_id: str, wanted: ObjectInfo) -> None:
    download(tmp_path, task_id)
    assert found(tmp_path, task_id, wanted) is None
    assert list((tmp_path / f"{task_id}-2").iterdir()) == []


def test_without_an_etag_nothing_is_kept(tmp_path: Path, task_id: str) -> None:
    with Workspace(tmp_path, task_id, 1) as workspace:
        workspace.place(KEY).write_bytes(CONTENT)
        workspace.note(KEY, replace(FETCHED, etag=""))
    assert found(tmp_path, task_id, replace(WANTED, etag="")) is None


@pytest.mark.parametrize("damage", ["bytes", "cut", "line cut", "no journal", "other json", "no text", "crc32"])
def test_a_damaged_file_or_journal_is_not_kept(tmp_path: Path, task_id: str, damage: str) -> None:
    download(tmp_path, task_id)
    with Workspace(tmp_path, task_id, 1) as workspace:
        file, journal = workspace.place(KEY), workspace.path / JOURNAL
    match damage:
        case "bytes":
            file.write_bytes(CONTENT[::-1])
        case "cut":
            file.write_bytes(CONTENT[:-1])
        case "line cut":
            journal.write_bytes(journal.read_bytes()[:-2])
        case "no journal":
            journal.unlink()
        case "other json":
            journal.write_text('[]\n{}\n[["a"], 1, 2, 3, 4, 5]\n["a"]\n7')
        case "no text":
            journal.write_bytes(b"\xff\0" * 100)
        case "crc32":
            journal.write_text(journal.read_text().replace(str(FETCHED.crc32), "1"))
    assert found(tmp_path, task_id) is None


def test_a_line_that_was_cut_spoils_no_other(tmp_path: Path, task_id: str) -> None:
    """By a kill, or by a full disk that had room again for the next one."""
    other = replace(WANTED, key="artists/b.glb")
    download(tmp_path, task_id)
    journal = tmp_path / f"{task_id}-1" / JOURNAL
    journal.write_bytes(journal.read_bytes() + journal.read_bytes()[:-9])
    with Workspace(tmp_path, task_id, 2) as workspace:
        workspace.place(other.key).write_bytes(CONTENT)
        workspace.note(other.key, FETCHED)
    with Workspace(tmp_path, task_id, 3) as workspace:
        assert workspace.clear_all_but([WANTED, other]) == {WANTED.key, other.key}
        assert [workspace.find(each) for each in (WANTED, other)] == [FETCHED, FETCHED]


def test_of_two_lines_the_newer_one_counts(tmp_path: Path, task_id: str) -> None:
    download(tmp_path, task_id)
    newer = replace(WANTED, size=3, etag="f" * 32)
    fetched = Fetched(3, hashlib.sha256(b"new").hexdigest(), zlib.crc32(b"new"), newer.etag)
    with Workspace(tmp_path, task_id, 2) as workspace:
        workspace.place(KEY).write_bytes(b"new")
        workspace.note(KEY, fetched)
        assert workspace.find(newer) == fetched
    with Workspace(tmp_path, task_id, 3) as workspace:
        assert workspace.clear_all_but([newer]) == {KEY}
        assert workspace.find(newer) == fetched
        workspace.forget(KEY)
        assert workspace.find(newer) is None


def test_a_file_put_in_place_by_an_attempt_that_was_killed_before_its_line_is_held_against_the_older_one(
    tmp_path: Path, task_id: str
) -> None:
    download(tmp_path, task_id)
    with Workspace(tmp_path, task_id, 2) as workspace:
        workspace.place(KEY).write_bytes(CONTENT[::-1])
    assert found(tmp_path, task_id, fence=3) is None


def test_what_an_older_release_left_goes(tmp_path: Path, task_id: str) -> None:
    """It wrote a record beside each file."""
    (tmp_path / f"{task_id}-1").mkdir()
    with Workspace(tmp_path, task_id, 2) as workspace:
        workspace.place(KEY).write_bytes(CONTENT)
        workspace.place(KEY).with_suffix(".json").write_text("{}")
        assert workspace.clear_all_but([WANTED]) == set()
        assert list(workspace.path.iterdir()) == []


def test_partial_files_and_objects_that_are_no_longer_wanted_go(tmp_path: Path, task_id: str) -> None:
    download(tmp_path, task_id)
    (tmp_path / f"{task_id}-1" / ".0123.part").touch()
    with Workspace(tmp_path, task_id, 2) as workspace:
        assert workspace.clear_all_but([]) == set()
        assert list(workspace.path.iterdir()) == []


def test_a_workspace_in_use_is_not_taken_over(tmp_path: Path, task_id: str) -> None:
    """A worker that was thought dead still writes there."""
    worker = hold(tmp_path, task_id)
    try:
        with Workspace(tmp_path, task_id, 2) as workspace:
            assert list(workspace.path.iterdir()) == []
        assert len(list((tmp_path / f"{task_id}-1").iterdir())) == 1
    finally:
        kill(worker)


# --- what goes ----------------------------------------------------------------------------------------------------


def test_an_ended_tasks_workspaces_go_and_no_other(tmp_path: Path, task_id: str) -> None:
    other = str(uuid.uuid4())
    for each in (task_id, other):
        download(tmp_path, each)
    remove_workspaces(tmp_path, task_id, cache_in(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [f"{other}-1"]


@pytest.mark.parametrize("status", Status)
def test_the_workspace_of_a_killed_worker_is_swept_once_its_task_has_ended(
    tmp_path: Path, task_id: str, status: Status
) -> None:
    kill(hold(tmp_path, task_id))
    swept = sweep(tmp_path, {task_id: status})
    assert swept == ([f"{task_id}-1"] if status in TERMINAL else [])
    assert (tmp_path / f"{task_id}-1").exists() is (status not in TERMINAL)


def test_a_workspace_in_use_is_not_swept_whoever_uses_it(tmp_path: Path, task_id: str) -> None:
    worker = hold(tmp_path, task_id)
    try:
        assert sweep(tmp_path, {task_id: Status.COMPLETED}) == []
        assert len(list((tmp_path / f"{task_id}-1").iterdir())) == 1
    finally:
        kill(worker)


def test_a_strangers_workspace_is_swept_when_it_is_old(tmp_path: Path, task_id: str) -> None:
    download(tmp_path, task_id)
    assert sweep(tmp_path, {}) == []
    os.utime(tmp_path / f"{task_id}-1", times=(time.time() - 4000,) * 2)
    assert sweep(tmp_path, {}) == [f"{task_id}-1"]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_without_a_folder_is_swept(tmp_path: Path, task_id: str) -> None:
    (tmp_path / f"{task_id}-1.lock").touch()
    sweep(tmp_path, {task_id: Status.PENDING})
    assert list(tmp_path.iterdir()) == []


def test_for_want_of_disk_idle_workspaces_of_other_tasks_go_the_oldest_first(tmp_path: Path, task_id: str) -> None:
    others = [str(uuid.uuid4()) for _ in range(3)]
    for age, each in enumerate([task_id, *others]):
        download(tmp_path, each)
        os.utime(tmp_path / f"{each}-1", times=(time.time() - 1000 + age,) * 2)
    worker = hold(tmp_path, busy := str(uuid.uuid4()))
    try:
        going = remove_oldest(tmp_path, but_of=task_id)
        assert next(going) == f"{others[0]}-1"
        assert not (tmp_path / f"{others[0]}-1").exists()
        assert (tmp_path / f"{others[1]}-1").exists()
        assert list(going) == [f"{other}-1" for other in others[1:]]
    finally:
        kill(worker)
    assert {path.name.removesuffix(".lock") for path in tmp_path.iterdir()} == {f"{task_id}-1", f"{busy}-1"}


def test_what_is_no_workspace_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "somebody").mkdir()
    assert sweep(tmp_path, {}) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "somebody"]
    assert sweep(tmp_path / "missing", {}) == []


def test_sweeps_and_new_workspaces_do_not_disturb_each_other(tmp_path: Path) -> None:
    sweeping = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from ncr_upload.application.workspace import sweep_workspaces\n"
            "from ncr_upload.adapters.host import MachineHost\n"
            "from ncr_upload.application.download_cache import DownloadCache\n"
            "from ncr_upload.domain.jobs import Status\n"
            "work_dir = Path(sys.argv[1])\n"
            "cache = DownloadCache(work_dir, 0, MachineHost())\n"
            "while True: sweep_workspaces(work_dir, lambda ids: dict.fromkeys(ids, Status.COMPLETED), cache)",
            str(tmp_path),
        ],
    )
    try:
        for _ in range(300):
            with Workspace(tmp_path, str(uuid.uuid4()), 1) as workspace:
                workspace.place("key").write_text("x")
                assert workspace.place("key").read_text() == "x"
    finally:
        sweeping.kill()
        sweeping.wait()


def test_what_another_attempt_has_still_to_fetch_is_reserved_until_it_ends(tmp_path: Path) -> None:
    with Workspace(tmp_path, str(uuid.uuid4()), 1) as mine:
        with Workspace(tmp_path, str(uuid.uuid4()), 1) as other:
            assert mine.reserved_by_others() == 0
            other.reserve(1000)
            assert (mine.reserved_by_others(), other.reserved_by_others()) == (1000, 0)
            other.place("a").write_bytes(bytes(400))
            assert mine.reserved_by_others() == 600
            other.place("b").write_bytes(bytes(700))
            assert mine.reserved_by_others() == 0
            other.reserve(50)
            assert mine.reserved_by_others() == 50
        assert mine.reserved_by_others() == 0


def test_a_dead_attempt_reserves_nothing(tmp_path: Path, task_id: str) -> None:
    program = HOLD.replace("print(", "workspace.reserve(1000); print(")
    process = subprocess.Popen([sys.executable, "-c", program, tmp_path, task_id], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with Workspace(tmp_path, str(uuid.uuid4()), 1) as mine:
        assert mine.reserved_by_others() == 1000
        process.kill()
        process.wait()
        assert mine.reserved_by_others() == 0
    process.stdout.close()
