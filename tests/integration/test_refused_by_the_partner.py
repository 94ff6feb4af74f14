"""What a partner's server refuses: one job waits alone where its folder is the cause, all wait where the server is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from fault_proxy import fault_proxy
from fault_table import fault
from ncr_upload.domain.jobs import Status
from ncr_upload.entrypoints.bootstrap.doctor import make_checks
from ncr_upload.entrypoints.doctor import Finding, State, examine, render
from ncr_upload.entrypoints.embedded.product import Product
from outcomes import assert_told
from parts import miss
from servers import SftpServer, start_rclone, start_sshd
from workplace import Workplace

PARTNER_UID, NOBODY_UID = 12345, 65534


@pytest.fixture
def refusing(tmp_path: Path, workplace: Workplace) -> Iterator[SftpServer]:
    with start_sshd(tmp_path / "refusing", refusing=True) as server:
        workplace.send_to(server)
        workplace.change(park_hours=24)
        yield server


@pytest.fixture
def shared_drop_folder(workplace: Workplace) -> Iterator[SftpServer]:
    """A sticky drop folder, which several logins may write to."""
    if os.geteuid() != 0:
        miss("only root can make a folder that belongs to somebody else")
    folder = Path(tempfile.mkdtemp(prefix="ncr-sticky-"))
    folder.chmod(0o755)
    with start_sshd(folder, user="nobody") as server:
        server.folder.chmod(0o1777)
        workplace.send_to(server)
        workplace.change(park_hours=24)
        yield server
    shutil.rmtree(folder)


def parked(workplace: Workplace) -> str | None:
    """The code the destination is parked with."""
    with workplace.engine.connect() as connection:
        rows = connection.execute(text("SELECT code FROM ncr_parked_destinations WHERE healed_at IS NULL")).scalars().all()
    return rows[0] if rows else None


def content(folder: Path) -> dict[str, int | None]:
    return {str(path.relative_to(folder)): path.stat().st_size if path.is_file() else None for path in folder.rglob("*")}


def ask_doctor(workplace: Workplace) -> list[Finding]:
    return examine({"sftp": make_checks(workplace.settings)["sftp"]}, 30)


@fault(
    "SFTP: the job's folder is somebody else's",
    injector="sshd, a sticky drop folder of two users",
    invariants="LOPH",
    outcome="the job is tried again, saying whose folder it is; the destination is not parked, other jobs are delivered",
)
def test_a_job_folder_of_somebody_else_delays_no_other_job(
    workplace: Workplace, small: Product, shared_drop_folder: SftpServer
) -> None:
    for job_id in ("theirs", "ours"):
        workplace.place(job_id, small)
    foreign = shared_drop_folder.folder / "theirs"
    foreign.mkdir()
    os.chown(foreign, PARTNER_UID, PARTNER_UID)
    (refused,) = workplace.submit("theirs")
    waiting = workplace.attempt(refused)
    assert (waiting.status, waiting.problem and waiting.problem.code) == (Status.PENDING, "job_folder_denied"), waiting.message
    assert_told(workplace, waiting, "transient", f"uid {PARTNER_UID}", "theirs", "Ask the partner to give", "attempt 1 of 3")
    assert parked(workplace) is None
    other = workplace.deliver("ours")
    assert (other.status, other.attempt) == (Status.COMPLETED, 1), other.message
    assert workplace.delivered("ours") == small.delivered
    assert list(foreign.iterdir()) == []
    os.chown(foreign, NOBODY_UID, NOBODY_UID)
    workplace.let_time_pass()
    ended = workplace.attempt(refused)
    assert ended.status is Status.COMPLETED, ended.message
    assert workplace.delivered("theirs") == small.delivered


@fault(
    "SFTP: rename is refused",
    injector="sftp-server -P rename,posix-rename",
    invariants="LOPRH",
    outcome="parked with a code of its own, and stays so until a folder can be renamed; nothing more is left by each probe",
)
def test_a_server_that_refuses_rename_is_parked_until_it_does_not(
    workplace: Workplace, small: Product, refusing: SftpServer
) -> None:
    refusing.fault("-P rename,posix-rename")
    workplace.place("renamed", small)
    (task,) = workplace.submit("renamed")
    waiting = workplace.attempt(task)
    assert (waiting.status, waiting.attempt) == (Status.PENDING, 0), waiting.message
    assert waiting.problem is not None
    assert waiting.problem.code == parked(workplace) == "rename_refused"
    assert "posix-rename" in waiting.problem.next_step
    left = content(refusing.folder)
    for _ in range(3):
        workplace.probe()
        assert parked(workplace) == "rename_refused"
        assert not any("works again" in line for line in workplace.history(task))
        assert content(refusing.folder) == left
    (finding,) = [finding for finding in ask_doctor(workplace) if finding.state is State.WRONG]
    assert (finding.code, "rename is refused" in finding.told) == ("rename_refused", True)
    assert finding.next_step is not None
    assert "Ask the partner to let the login rename folders" in finding.next_step
    refusing.fault("")
    workplace.probe()
    assert parked(workplace) is None
    ended = workplace.attempt(task)
    assert ended.status is Status.COMPLETED, ended.message
    assert workplace.delivered("renamed") == small.delivered
    assert workplace.leftovers() == []


@fault(
    "SFTP: a parked destination refuses to delete",
    injector="sftp-server -P rename,posix-rename,remove,rmdir",
    invariants="LR",
    outcome="every probe uses the same folder and file again",
)
def test_probes_of_a_destination_that_refuses_to_delete_leave_no_more_each_time(
    workplace: Workplace, small: Product, refusing: SftpServer
) -> None:
    refusing.fault("-P rename,posix-rename,remove,rmdir")
    workplace.place("undeleted", small)
    workplace.attempt(workplace.submit("undeleted")[0])
    left = content(refusing.folder)
    for _ in range(4):
        workplace.probe()
        ask_doctor(workplace)
        assert content(refusing.folder) == left
    assert sum(size or 0 for size in left.values()) < 600_000


@pytest.mark.parametrize(
    ("refused", "state", "named"),
    [
        ("rename,posix-rename", State.WRONG, "rename is refused"),
        ("mkdir", State.WRONG, "mkdir is refused"),
        ("opendir,readdir", State.WRONG, "list is refused"),
        ("remove,rmdir", State.DOUBTFUL, "every job leaves a folder"),
        ("read", State.DOUBTFUL, "begins again from its first byte"),
        ("hardlink", State.DOUBTFUL, "sends every file again"),
        ("setstat,fsetstat", State.DOUBTFUL, "sends the newest files again"),
        ("statvfs", State.DOUBTFUL, "spends the attempts"),
    ],
)
def test_doctor_names_what_the_login_is_refused_and_what_it_costs(
    workplace: Workplace, refusing: SftpServer, refused: str, state: State, named: str
) -> None:
    refusing.fault(f"-P {refused}")
    findings = ask_doctor(workplace)
    (found,) = [finding for finding in findings if finding.state is not State.RIGHT]
    assert (found.state, named in found.told) == (state, True), found
    assert found.next_step is not None
    assert found.next_step.startswith("Ask the partner")
    assert found.next_step in render(findings)
    assert json.loads(json.dumps([each.to_json() for each in findings]))


@fault(
    "SFTP: a file named in Latin-1",
    injector="such a file in the staging folder and in the delivered package",
    invariants="LOPRH",
    outcome="delivered, and delivered again, all the same; told escaped",
)
def test_a_file_named_in_latin_1_hinders_no_job(workplace: Workplace, small: Product, refusing: SftpServer) -> None:
    staging = refusing.folder / ".ncr-staging"
    staging.mkdir()
    foreign = Path(os.fsdecode(b"caf\xe9"))
    (staging / foreign).write_bytes(b"theirs")
    for _ in range(2):
        workplace.place("latin", small)
        ended = workplace.deliver("latin")
        assert ended.status is Status.COMPLETED, ended.message
        assert workplace.delivered("latin") == small.delivered
        "\n".join(workplace.history(ended)).encode()
        (refusing.folder / "latin" / foreign).mkdir()
        (refusing.folder / "latin" / foreign / foreign).write_bytes(b"theirs")
    assert [path.name for path in staging.iterdir()] == [str(foreign)]


@fault(
    "SFTP: rclone 1.60, whose hard links are not there",
    injector="Debian's rclone",
    invariants="LOPR",
    outcome="delivered again in one attempt: everything is sent",
)
def test_a_job_is_delivered_again_to_debians_rclone(workplace: Workplace, small: Product, tmp_path: Path) -> None:
    with start_rclone(tmp_path / "rclone") as server:
        workplace.send_to(server)
        for _ in range(2):
            workplace.place("again", small)
            ended = workplace.deliver("again")
            assert (ended.status, ended.attempt) == (Status.COMPLETED, 1), ended.message
            assert workplace.delivered("again") == small.delivered
        assert workplace.leftovers() == []


@pytest.mark.parametrize("refused", ["read", "remove,rmdir"])
@pytest.mark.parametrize("point", ["publish:between", "publish:after"])
@fault(
    "SFTP: nothing may be read, or removed, and the worker dies while it publishes",
    injector="sftp-server -P, SIGKILL",
    invariants="LOKRH",
    outcome="delivered by the next attempt; the destination is not parked",
)
def test_a_publish_that_broke_off_where_nothing_may_be_read_or_removed_is_ended_all_the_same(
    workplace: Workplace, small: Product, product: Product, refusing: SftpServer, tmp_path: Path, point: str, refused: str
) -> None:
    refusing.fault(f"-P {refused}")
    workplace.place("unread", product)
    assert workplace.deliver("unread").status is Status.COMPLETED
    workplace.place("unread", small)
    (task,) = workplace.submit("unread")
    assert workplace.start_attempt(task, tmp_path, point).wait(120) == -signal.SIGKILL
    workplace.let_time_pass()
    ended = workplace.attempt(task)
    assert (ended.status, parked(workplace)) == (Status.COMPLETED, None), ended.message
    assert workplace.delivered("unread") == small.delivered
    if refused == "read":
        workplace.sweep(ended)
        assert workplace.leftovers() == []


def test_a_login_that_may_not_look_at_its_files_is_told_so_and_not_that_it_may_make_no_folders(
    workplace: Workplace, small: Product, refusing: SftpServer
) -> None:
    refusing.fault("-P lstat")
    finding = next(finding for finding in ask_doctor(workplace) if finding.state is State.WRONG)
    assert ("failed to look at" in finding.told, "lstat" in (finding.next_step or "")) == (True, True), finding
    workplace.place("unseen", small)
    (task,) = workplace.submit("unseen")
    waiting = workplace.attempt(task)
    assert waiting.problem is not None
    assert (waiting.problem.code, "lstat" in waiting.problem.next_step) == ("permission_denied", True), waiting.problem


@fault(
    "SFTP: nothing may be removed, and the connection is cut in the middle of an upload",
    injector="sftp-server -P remove,rmdir, proxy",
    invariants="LOPRH",
    outcome="delivered by the next attempt; the destination is not parked",
)
def test_an_upload_that_was_cut_where_nothing_may_be_removed_goes_on(
    workplace: Workplace, small: Product, refusing: SftpServer
) -> None:
    refusing.fault("-P remove,rmdir")
    workplace.place("kept", small)
    with fault_proxy(("127.0.0.1", refusing.login.port)) as proxy:
        workplace.change(sftp_port=proxy.port)
        proxy.cut_after(600_000)
        (task,) = workplace.submit("kept")
        assert workplace.attempt(task).status is Status.PENDING
        workplace.let_time_pass()
        ended = workplace.attempt(task)
        assert (ended.status, parked(workplace)) == (Status.COMPLETED, None), ended.message
    assert workplace.delivered("kept") == small.delivered
    assert list(refusing.folder.glob(".ncr-staging/*/spare/*"))
