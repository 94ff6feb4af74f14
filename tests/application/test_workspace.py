"""Workspaces: one an attempt, gone afterwards, and swept only when their worker is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from ncr_upload.application.workspace import Workspace, sweep_workspaces

HOLD = """
import sys, time
from pathlib import Path
from ncr_upload.application.workspace import Workspace
with Workspace(Path(sys.argv[1]), sys.argv[2], 1) as workspace:
    workspace.place(1).write_text("x")
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def task_id() -> str:
    return str(uuid.uuid4())


def hold(work_dir: Path, task_id: str) -> subprocess.Popen[str]:
    """A worker process with a workspace."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(work_dir), task_id], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_workspace_is_private_begins_empty_and_is_gone_afterwards(tmp_path: Path, task_id: str) -> None:
    stale = tmp_path / f"{task_id}-3" / "stale"
    stale.parent.mkdir(parents=True)
    stale.write_text("from before")

    def fail_in_the_middle() -> None:
        with Workspace(tmp_path, task_id, 3) as workspace:
            assert list(workspace.path.iterdir()) == []
            assert workspace.path.stat().st_mode & 0o077 == 0
            workspace.place(7).write_text("x")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_in_the_middle()
    assert list(tmp_path.iterdir()) == []


def test_a_workspace_in_use_is_not_swept_whoever_uses_it(tmp_path: Path, task_id: str) -> None:
    worker = hold(tmp_path, task_id)
    try:
        assert sweep_workspaces(tmp_path) == []
        assert (tmp_path / f"{task_id}-1" / "000001").read_text() == "x"
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.communicate()


def test_the_workspace_of_a_killed_worker_is_swept(tmp_path: Path, task_id: str) -> None:
    worker = hold(tmp_path, task_id)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    assert sweep_workspaces(tmp_path) == [f"{task_id}-1"]
    assert list(tmp_path.iterdir()) == []
    assert sweep_workspaces(tmp_path) == []


def test_what_is_no_workspace_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "somebody").mkdir()
    assert sweep_workspaces(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "somebody"]
    assert sweep_workspaces(tmp_path / "missing") == []


def test_sweeps_and_new_workspaces_do_not_disturb_each_other(tmp_path: Path) -> None:
    sweeping = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from ncr_upload.application.workspace import sweep_workspaces\n"
            "while True: sweep_workspaces(Path(sys.argv[1]))",
            str(tmp_path),
        ],
        env=dict(os.environ),
    )
    try:
        for _ in range(300):
            with Workspace(tmp_path, str(uuid.uuid4()), 1) as workspace:
                workspace.place(1).write_text("x")
                assert workspace.place(1).read_text() == "x"
    finally:
        sweeping.kill()
        sweeping.wait()
