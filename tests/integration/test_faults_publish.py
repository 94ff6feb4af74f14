"""Publishes that break off, go on unheard or are always refused, through a worker: they count, end, and say what is where."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from disks import small_disk
from fault_table import fault
from ncr_upload.adapters.sftp_dropoff import publishing, scratch
from ncr_upload.application.ports import CancelAnswer
from ncr_upload.domain.jobs import TERMINAL, Status, Task
from ncr_upload.entrypoints.embedded.product import Product
from outcomes import assert_told
from servers import SftpServer, start_asyncssh
from workplace import Workplace

SECOND_LATER = 1.0


@pytest.fixture
def copying(workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SftpServer]:
    """A server whose renames of folders copy files, at once or breaking off, on request. Only one probes it."""
    monkeypatch.setattr(publishing, "STILL_SECONDS", 0.1)
    monkeypatch.setattr(scratch, "TRIES", 2)
    with start_asyncssh(tmp_path / "copying") as server:
        workplace.send_to(server)
        yield server
        server.fault("")


@pytest.fixture
def _is_slow(copying: SftpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two looks are further apart than the server's two writes of a file."""
    monkeypatch.setattr(publishing, "STILL_SECONDS", 0.6)


@pytest.fixture
def before(workplace: Workplace, copying: SftpServer, job_id: str, product: Product, small: Product) -> Product:
    """The job has been delivered whole, and awaits a smaller delivery."""
    workplace.place(job_id, product)
    assert workplace.deliver(job_id).status is Status.COMPLETED
    workplace.list_job(job_id, "SKU1", list(small.files))
    return product


def find_kept(workplace: Workplace, job_id: str) -> list[tuple[str, bytes]]:
    """What is under the final name or set aside."""
    folder = workplace.sftp.folder
    places = [folder / job_id, *folder.glob(f".ncr-staging/*/previous/{job_id}")]
    files = [(place, path) for place in places for path in place.rglob("*") if path.is_file()]
    return [(str(path.relative_to(place)), path.read_bytes()) for place, path in files]


def assert_one_is_whole(workplace: Workplace, job_id: str, old: Product, new: Product) -> None:
    kept = find_kept(workplace, job_id)
    assert workplace.delivered(job_id) == new.delivered or all(each in kept for each in old.delivered.items())


def try_until_ended(workplace: Workplace, task: Task, old: Product, new: Product) -> Task:
    for _ in range(8):
        ended = workplace.attempt(task)
        assert_one_is_whole(workplace, task.job_id, old, new)
        if ended.status in TERMINAL:
            return ended
        workplace.let_time_pass()
    raise AssertionError(workplace.history(task))


@pytest.mark.parametrize("stops", [1, 3])
@fault(
    "SFTP: every rename of a folder breaks off, re-delivery",
    injector="SFTP server that copies",
    invariants="LOKRH",
    outcome="ends within MAX_ATTEMPTS; one whole delivery is visible, and the history says which",
)
def test_a_server_that_always_breaks_off_keeps_one_whole_delivery(
    workplace: Workplace, job_id: str, small: Product, copying: SftpServer, before: Product, stops: int
) -> None:
    (task,) = workplace.submit(job_id)
    copying.fault(f"copy all {stops} each 0 ok")
    ended = try_until_ended(workplace, task, before, small)
    for _ in range(3):
        workplace.sweep(ended)
    delivered = small if ended.status is Status.COMPLETED else before
    assert workplace.delivered(job_id) == delivered.delivered, workplace.history(ended)
    assert workplace.leftovers() == []


@pytest.mark.parametrize(("which", "told"), [("publish", "renames of single files"), ("aside", "is back in")])
@fault(
    "SFTP: a rename of a folder breaks off once, through a worker",
    injector="SFTP server that copies",
    invariants="LOKRH",
    outcome="delivered; the history says how it was ended",
)
def test_a_rename_that_broke_off_is_told_in_the_history(
    workplace: Workplace, job_id: str, small: Product, copying: SftpServer, before: Product, which: str, told: str
) -> None:
    (task,) = workplace.submit(job_id)
    copying.fault(f"copy {which} 2 each 0 ok")
    ended = try_until_ended(workplace, task, before, small)
    assert ended.status is Status.COMPLETED
    assert_told(workplace, ended, told)
    assert workplace.delivered(job_id) == small.delivered
    assert workplace.leftovers() == []


@pytest.mark.usefixtures("_is_slow")
@pytest.mark.parametrize("which", ["publish", "aside"])
@fault(
    "SFTP: worker killed while the server copies a folder",
    injector="SIGKILL, SFTP server that copies slowly",
    invariants="LOKRH",
    outcome="the next attempt waits until nothing moves, and goes on from there",
)
def test_a_rename_that_outlives_its_worker_is_waited_for(
    workplace: Workplace, job_id: str, small: Product, copying: SftpServer, before: Product, which: str, tmp_path: Path
) -> None:
    (task,) = workplace.submit(job_id)
    copying.fault(f"copy {which} -1 each 0.4 ok")
    doomed = workplace.start_attempt(task, tmp_path)
    deadline = time.monotonic() + 60
    while copying.control is not None and copying.control.read_text():
        assert time.monotonic() < deadline, workplace.history(task)
        time.sleep(0.02)
    doomed.send_signal(signal.SIGKILL)
    doomed.wait(10)
    assert_one_is_whole(workplace, job_id, before, small)
    workplace.let_time_pass()
    ended = try_until_ended(workplace, task, before, small)
    assert ended.status is Status.COMPLETED
    assert workplace.delivered(job_id) == small.delivered
    assert len(workplace.studio_rows("email")) == 2
    assert workplace.leftovers() == []


@pytest.mark.usefixtures("_is_slow")
@fault(
    "SFTP: a rename slower than the time-out, through a worker",
    injector="SFTP server that copies slowly",
    invariants="LOKRH",
    outcome="waited for in the same attempt, then recorded",
)
def test_a_rename_slower_than_the_time_out_is_recorded_once_it_has_ended(
    workplace: Workplace, job_id: str, small: Product, copying: SftpServer, before: Product
) -> None:
    workplace.change(sftp_timeout_seconds=1)
    (task,) = workplace.submit(job_id)
    copying.fault("copy publish -1 each 0.4 ok")
    ended = try_until_ended(workplace, task, before, small)
    assert (ended.status, ended.attempt) == (Status.COMPLETED, 1), workplace.history(ended)
    assert workplace.leftovers() == []


@fault(
    "SFTP: staging is on another file system",
    injector="tmpfs mounted at .ncr-staging",
    invariants="LOKRH",
    outcome="refused, counted, ends within MAX_ATTEMPTS; the previous delivery stays",
)
def test_a_staging_folder_on_another_file_system_ends_the_job_and_changes_nothing(
    workplace: Workplace, job_id: str, copying: SftpServer, before: Product, small: Product
) -> None:
    inodes = {path: path.stat().st_ino for path in (copying.folder / job_id).rglob("*")}
    with small_disk(copying.folder / ".ncr-staging", "64m"):
        (task,) = workplace.submit(job_id)
        ended = try_until_ended(workplace, task, before, small)
        assert (ended.status, ended.attempt) == (Status.FAILED, workplace.settings.max_attempts), workplace.history(ended)
        assert ended.problem is not None
        assert ended.problem.code == "publish_refused"
        for named in (f"/{job_id}", "/.ncr-staging", "rename", "same file system", "attempt 3 of 3"):
            assert named in ended.message
        assert "may be visible" not in ended.message
        workplace.sweep(ended)
        assert {path: path.stat().st_ino for path in (copying.folder / job_id).rglob("*")} == inodes
        assert workplace.leftovers() == []


@fault(
    "Cancel: after a publish was refused",
    injector="tmpfs mounted at .ncr-staging, cancel",
    invariants="LOKRH",
    outcome="cancelled; nothing had become visible",
)
def test_a_job_whose_publish_was_refused_can_be_cancelled(
    workplace: Workplace, job_id: str, copying: SftpServer, before: Product
) -> None:
    with small_disk(copying.folder / ".ncr-staging", "64m"):
        (task,) = workplace.submit(job_id)
        assert workplace.attempt(task).status is Status.PENDING
        assert workplace.ports().submissions.cancel(task.task_id) is CancelAnswer.CANCELLED
        workplace.sweep(task)
        assert workplace.delivered(job_id) == before.delivered
        assert workplace.leftovers() == []


@fault(
    "SFTP: no file may be written over, and the job's folder is there and empty",
    injector="SFTP server that refuses it",
    invariants="LOPRH",
    outcome="delivered at the first attempt",
)
def test_a_server_that_lets_nobody_write_over_a_file_takes_the_package_into_an_empty_folder(
    workplace: Workplace, job_id: str, small: Product, copying: SftpServer
) -> None:
    (copying.folder / job_id).mkdir()
    copying.fault("no-overwrite")
    workplace.place(job_id, small)
    (task,) = workplace.submit(job_id)
    ended = workplace.attempt(task)
    assert ended.status is Status.COMPLETED, ended.message
    assert workplace.delivered(job_id) == small.delivered
    assert workplace.leftovers() == []


@pytest.mark.parametrize("follows", [True, False])
@fault(
    "SFTP: the job's folder is a link, and the server renames what a link leads to",
    injector="SFTP server that follows links",
    invariants="LOPRH",
    outcome="fails within MAX_ATTEMPTS, naming the link; what it leads to stays. Elsewhere the link makes room for the package",
)
def test_what_a_link_in_the_place_of_the_jobs_folder_leads_to_stays_where_it_is(
    workplace: Workplace, job_id: str, small: Product, copying: SftpServer, follows: bool
) -> None:
    others = copying.folder / f"others-{job_id}"
    others.mkdir()
    (others / "file").write_text("somebody else's")
    link = copying.folder / job_id
    link.symlink_to(others.name)
    copying.fault("follow-links" if follows else "")
    workplace.place(job_id, small)
    ended = workplace.deliver(job_id)
    assert [path.name for path in others.iterdir()] == ["file"]
    if follows:
        assert_told(workplace, ended, "transient", job_id, "symbolic link", "Ask the partner to remove the link")
        assert (ended.status, ended.problem and ended.problem.code) == (Status.FAILED, "job_folder_is_link")
        assert link.is_symlink()
    else:
        assert ended.status is Status.COMPLETED, ended.message
        assert workplace.delivered(job_id) == small.delivered
    workplace.sweep(ended)
    assert workplace.leftovers() == []
