"""The partner's SFTP server in trouble: the previous delivery stays, the new one arrives whole, once, when it can."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import asyncssh
import pytest
from pydantic import SecretStr

from disks import small_disk
from fault_proxy import FaultProxy, fault_proxy
from fault_table import fault
from ncr_upload.domain.jobs import Status, Task
from ncr_upload.entrypoints.embedded.product import Product
from outcomes import assert_delivered_once, assert_told, assert_undelivered, recorded
from servers import SftpServer, start_asyncssh, start_sshd
from workplace import Workplace

DELIVERED_LATER = "tried again, then delivered whole, recorded once"
PARKED = "parked, no attempt spent; delivered once it is mended"


@pytest.fixture
def sftp(workplace: Workplace) -> Iterator[SftpServer]:
    """The server that fails on request; well again afterwards."""
    yield workplace.sftp
    workplace.sftp.fault("")


def try_once(workplace: Workplace, job_id: str, reach: Callable[[str], None] = lambda _: None) -> Task:
    (task,) = workplace.submit(job_id)
    return workplace.attempt(task, reach)


def assert_waits(workplace: Workplace, task: Task, error_class: str, code: str, *cause: str) -> None:
    """Put back for this reason, which its history tells; nothing visible."""
    assert (task.status, task.problem and task.problem.code) == (Status.PENDING, code), task.message
    assert task.attempt == (0 if error_class == "parked" else 1)
    assert_told(workplace, task, error_class, *cause, "attempt 1 of 3", f"next {'probe' if error_class == 'parked' else 'try'}")
    assert workplace.delivered(task.job_id) is None
    assert recorded(workplace)["email"] == 0


def deliver_when_mended(workplace: Workplace, task: Task, product: Product, *, spent: int) -> None:
    workplace.probe()
    workplace.let_time_pass()
    assert_delivered_once(workplace, workplace.attempt(task), product, spent=spent)


# --- connections that break -------------------------------------------------------------------------------------


@fault("SFTP: cut mid-file", injector="SFTP server aborts", invariants="LOPRH", outcome=DELIVERED_LATER)
def test_a_cut_upload_shows_nothing_and_is_finished_later(
    workplace: Workplace, job_id: str, small: Product, sftp: SftpServer
) -> None:
    workplace.place(job_id, small)
    sftp.fault("cut-on-write")
    waiting = try_once(workplace, job_id)
    assert_waits(workplace, waiting, "transient", "sftp_unreachable", "write SKU1/")
    deliver_when_mended(workplace, waiting, small, spent=2)


@pytest.mark.parametrize("after_bytes", [100, 4_000, 60_000, 600_000])
@fault("SFTP: connection reset anywhere", injector="TCP proxy", invariants="LOPRH", outcome=DELIVERED_LATER)
def test_a_connection_that_is_reset_anywhere_harms_nothing(
    workplace: Workplace, job_id: str, small: Product, openssh: SftpServer, after_bytes: int
) -> None:
    workplace.place(job_id, small)
    with proxied(workplace, openssh) as proxy:
        proxy.cut_after(after_bytes)
        waiting = try_once(workplace, job_id)
        assert_waits(workplace, waiting, "transient", "sftp_unreachable", "127.0.0.1")
        proxy.heal()
        deliver_when_mended(workplace, waiting, small, spent=2)


@pytest.mark.parametrize("fault_name", ["hang", "hang-large"])
@fault("SFTP: stall", injector="SFTP server never answers", invariants="LOPRH", outcome=DELIVERED_LATER)
def test_a_stalled_upload_is_given_up_and_finished_later(
    workplace: Workplace, job_id: str, small: Product, sftp: SftpServer, fault_name: str
) -> None:
    workplace.place(job_id, small)
    workplace.change(sftp_timeout_seconds=2)
    sftp.fault(fault_name)
    waiting = try_once(workplace, job_id)
    assert_waits(workplace, waiting, "transient", "sftp_unreachable", "no answer for 2 s")
    sftp.fault("")
    workplace.change(sftp_timeout_seconds=30)
    deliver_when_mended(workplace, waiting, small, spent=2)


@fault("SFTP: frozen", injector="TCP proxy", invariants="LOPRH", outcome=DELIVERED_LATER)
def test_a_frozen_server_is_given_up_and_delivered_to_later(
    workplace: Workplace, job_id: str, small: Product, openssh: SftpServer
) -> None:
    workplace.place(job_id, small)
    with proxied(workplace, openssh) as proxy:
        workplace.change(sftp_timeout_seconds=2)
        waiting = try_once(workplace, job_id, lambda reached: proxy.freeze() if reached == "stage:before" else None)
        assert_waits(workplace, waiting, "transient", "sftp_unreachable")
        proxy.heal()
        workplace.change(sftp_timeout_seconds=30)
        deliver_when_mended(workplace, waiting, small, spent=2)


@fault("SFTP: refused", injector="TCP proxy", invariants="LOPRH", outcome=DELIVERED_LATER)
def test_a_server_that_refuses_connections_is_delivered_to_later(
    workplace: Workplace, job_id: str, small: Product, openssh: SftpServer
) -> None:
    workplace.place(job_id, small)
    with proxied(workplace, openssh) as proxy:
        proxy.refuse()
        waiting = try_once(workplace, job_id)
        assert_waits(workplace, waiting, "transient", "sftp_unreachable", "127.0.0.1")
        assert_undelivered(workplace, waiting)
        proxy.heal()
        deliver_when_mended(workplace, waiting, small, spent=2)


@contextmanager
def proxied(workplace: Workplace, server: SftpServer) -> Iterator[FaultProxy]:
    """The worker reaches this server through a proxy."""
    with fault_proxy((server.login.host, server.login.port)) as proxy:
        workplace.send_to(replace(server, login=server.with_login(port=proxy.port)))
        yield proxy


# --- renames whose answer is lost -------------------------------------------------------------------------------


@pytest.fixture
def delivered_before(workplace: Workplace, job_id: str, product: Product, small: Product) -> dict[str, bytes]:
    """The job has been delivered, and awaits a new delivery: `small` instead of the whole product."""
    workplace.place(job_id, product)
    assert workplace.deliver(job_id).status is Status.COMPLETED
    workplace.list_job(job_id, "SKU1", list(small.files))
    assert product.delivered != small.delivered
    return product.delivered


def assert_replaced_once(workplace: Workplace, task: Task, product: Product) -> None:
    assert task.status is Status.COMPLETED, task.message
    assert workplace.delivered(task.job_id) == product.delivered
    assert recorded(workplace)["email"] == recorded(workplace)["history_log"] == 2
    assert workplace.leftovers() == []


@fault(
    "SFTP: second rename done, answer lost",
    injector="SFTP server aborts",
    invariants="LOPRH",
    outcome="the next attempt finds it published and records it; the validator is not asked again",
)
def test_a_publish_whose_answer_is_lost_is_recorded_not_repeated(
    workplace: Workplace, job_id: str, small: Product, sftp: SftpServer, delivered_before: dict[str, bytes]
) -> None:
    sftp.fault("cut-after-publish")
    waiting = try_once(workplace, job_id)
    assert (waiting.status, waiting.problem and waiting.problem.error_class) == (Status.PENDING, "transient")
    assert workplace.delivered(job_id) == small.delivered
    before = (sftp.folder / job_id).stat().st_ino
    workplace.let_time_pass()
    ended = workplace.attempt(waiting)
    assert_replaced_once(workplace, ended, small)
    assert (sftp.folder / job_id).stat().st_ino == before, "it was published a second time"
    assert sum("the validator answered" in line for line in workplace.history(ended)) == 1


@fault(
    "SFTP: first rename done, answer lost",
    injector="SFTP server aborts",
    invariants="LOPRH",
    outcome="the next attempt puts the previous delivery back at once, then replaces it whole",
)
def test_a_delivery_set_aside_for_nothing_is_back_as_soon_as_the_next_attempt_begins(
    workplace: Workplace, job_id: str, small: Product, sftp: SftpServer, delivered_before: dict[str, bytes]
) -> None:
    sftp.fault("cut-after-aside")
    waiting = try_once(workplace, job_id)
    assert_told(workplace, waiting, "transient", "attempt 1 of 3")
    assert workplace.delivered(job_id) is None
    workplace.let_time_pass()
    seen: list[object] = []
    ended = workplace.attempt(
        waiting, lambda reached: seen.append(workplace.delivered(job_id)) if reached == "lookup:before" else None
    )
    assert seen == [delivered_before]
    assert_replaced_once(workplace, ended, small)


@fault(
    "SFTP: publish refused",
    injector="SFTP server refuses the rename",
    invariants="LOPRH",
    outcome="the previous delivery is back at once; fails when the attempts are spent",
)
def test_a_publish_that_is_always_refused_leaves_the_previous_delivery(
    workplace: Workplace, job_id: str, sftp: SftpServer, delivered_before: dict[str, bytes]
) -> None:
    sftp.fault("refuse-publish")
    (task,) = workplace.submit(job_id)
    for _ in range(10):
        ended = workplace.attempt(task)
        assert workplace.delivered(job_id) == delivered_before
        if ended.status is Status.FAILED:
            break
        workplace.let_time_pass()
    assert (ended.status, ended.problem and ended.problem.code) == (Status.FAILED, "publish_refused"), ended.message
    workplace.sweep(ended)
    assert workplace.leftovers() == []
    assert workplace.delivered(job_id) == delivered_before
    assert recorded(workplace)["email"] == 1


# --- the final name is taken ------------------------------------------------------------------------------------


@fault(
    "SFTP: somebody else's folder at the final name",
    injector="folder made before the publish",
    invariants="OPR",
    outcome="replaced whole; no mixture",
)
def test_a_foreign_folder_at_the_final_name_is_replaced_never_mixed_with(
    workplace: Workplace, job_id: str, small: Product, sftp: SftpServer
) -> None:
    def squat(reached: str) -> None:
        if reached == "publish:before":
            (sftp.folder / job_id / "SKU1").mkdir(parents=True)
            (sftp.folder / job_id / "SKU1" / "foreign.txt").write_text("not ours")

    workplace.place(job_id, small)
    assert_delivered_once(workplace, try_once(workplace, job_id, squat), small, spent=1)


@fault(
    "SFTP: somebody else's folder made between look and rename",
    injector="SFTP server makes the folder",
    invariants="LOPRH",
    outcome=DELIVERED_LATER,
)
def test_a_foreign_folder_made_between_the_look_and_the_rename_is_not_mixed_with(
    workplace: Workplace, job_id: str, small: Product, sftp: SftpServer
) -> None:
    workplace.place(job_id, small)
    sftp.fault("squat")
    waiting = try_once(workplace, job_id)
    assert_told(workplace, waiting, "transient", "rename", "attempt 1 of 3")
    assert workplace.delivered(job_id) == {"foreign.txt": b"not ours"}
    deliver_when_mended(workplace, waiting, small, spent=2)


# --- what an operator must mend ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault_name",
    [
        pytest.param("no-space", marks=fault("SFTP: disk full", injector="SFTP server", invariants="LOPRH", outcome=PARKED)),
        pytest.param("quota", marks=fault("SFTP: quota", injector="SFTP server", invariants="LOPRH", outcome=PARKED)),
    ],
)
def test_a_full_destination_parks_the_job_until_there_is_room(
    workplace: Workplace, job_id: str, small: Product, sftp: SftpServer, fault_name: str
) -> None:
    workplace.place(job_id, small)
    workplace.change(park_hours=1)
    sftp.fault(fault_name)
    waiting = try_once(workplace, job_id)
    assert_waits(workplace, waiting, "parked", "disk_full", "disk or quota is full")
    assert_undelivered(workplace, waiting)
    sftp.fault("")
    deliver_when_mended(workplace, waiting, small, spent=1)


@fault("SFTP: disk full behind OpenSSH", injector="small tmpfs under sshd", invariants="LOPRH", outcome=PARKED)
def test_a_small_disk_behind_openssh_parks_the_job_until_there_is_room(
    workplace: Workplace, job_id: str, small: Product, openssh: SftpServer
) -> None:
    workplace.place(job_id, small)
    workplace.change(park_hours=1)
    disk = openssh.folder / job_id
    disk.mkdir()
    with small_disk(disk, "4m"):
        workplace.send_to(replace(openssh, base_dir=str(disk), folder=disk))
        (disk / "filler").write_bytes(bytes(3_600_000))
        waiting = try_once(workplace, job_id)
        assert_waits(workplace, waiting, "parked", "disk_full", "full")
        assert_undelivered(workplace, waiting)
        (disk / "filler").unlink()
        deliver_when_mended(workplace, waiting, small, spent=1)


@pytest.fixture
def unprivileged(tmp_path: Path) -> Iterator[SftpServer]:
    """OpenSSH with a login that is not root, and a base folder that is not the login's."""
    folder = Path(tempfile.mkdtemp(prefix="ncr-sshd-"))  # pytest's own folders are closed to others
    folder.chmod(0o755)
    with start_sshd(folder, user="nobody" if os.geteuid() == 0 else None) as server:
        server.folder.chmod(0o555)
        yield server
        server.folder.chmod(0o755)
    shutil.rmtree(folder)


@fault("SFTP: permission denied", injector="sshd with a login that may not write", invariants="LOPRH", outcome=PARKED)
def test_a_login_that_may_not_write_parks_the_job_until_it_may(
    workplace: Workplace, job_id: str, small: Product, unprivileged: SftpServer
) -> None:
    workplace.place(job_id, small)
    workplace.change(park_hours=1)
    workplace.send_to(unprivileged)
    waiting = try_once(workplace, job_id)
    assert_waits(workplace, waiting, "parked", "permission_denied", f"{unprivileged.base_dir}/.ncr-staging")
    unprivileged.folder.chmod(0o777)
    deliver_when_mended(workplace, waiting, small, spent=1)


@fault(
    "SFTP: permission denied only to publish",
    injector="sshd with a login that may write to staging only",
    invariants="LOPRH",
    outcome=PARKED,
)
def test_a_login_that_may_stage_but_not_publish_parks_the_job_until_it_may(
    workplace: Workplace, job_id: str, small: Product, unprivileged: SftpServer
) -> None:
    workplace.place(job_id, small)
    workplace.change(park_hours=1)
    workplace.send_to(unprivileged)
    staging = unprivileged.folder / ".ncr-staging"
    unprivileged.folder.chmod(0o755)
    staging.mkdir()
    staging.chmod(0o777)
    unprivileged.folder.chmod(0o555)
    waiting = try_once(workplace, job_id)
    assert_waits(workplace, waiting, "parked", "permission_denied", f"{unprivileged.base_dir}/{job_id}")
    unprivileged.folder.chmod(0o777)
    deliver_when_mended(workplace, waiting, small, spent=1)


def _change_host_key(workplace: Workplace) -> None:
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().strip()
    workplace.change(sftp_host_key=other)


def _change_password(workplace: Workplace) -> None:
    workplace.change(sftp_password=SecretStr("not-the-password"))


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        pytest.param(
            _change_host_key,
            "host_key_mismatch",
            marks=fault("SFTP: host key changed", injector="another pin", invariants="LOPRH", outcome=PARKED),
        ),
        pytest.param(
            _change_password,
            "login_refused",
            marks=fault("SFTP: login refused", injector="wrong password", invariants="LOPRH", outcome=PARKED),
        ),
    ],
)
def test_a_server_that_is_not_to_be_trusted_or_refuses_the_login_parks_the_job(
    workplace: Workplace, job_id: str, small: Product, spoil: Callable[[Workplace], None], code: str
) -> None:
    workplace.place(job_id, small)
    workplace.change(park_hours=1)
    good = workplace.settings
    spoil(workplace)
    waiting = try_once(workplace, job_id)
    assert_waits(workplace, waiting, "parked", code, "127.0.0.1")
    assert_undelivered(workplace, waiting)
    workplace.settings = good
    deliver_when_mended(workplace, waiting, small, spent=1)


@fault(
    "SFTP: parked for ever",
    injector="SFTP server",
    invariants="LPRH",
    outcome="fails after PARK_HOURS; nothing staged is left",
)
def test_a_destination_that_is_never_mended_fails_the_job_in_the_end(
    workplace: Workplace, job_id: str, small: Product, sftp: SftpServer
) -> None:
    workplace.place(job_id, small)
    sftp.fault("no-space")
    ended = workplace.deliver(job_id)
    assert (ended.status, ended.problem and ended.problem.code) == (Status.FAILED, "disk_full")
    assert "PARK_HOURS" in ended.message
    assert_undelivered(workplace, ended)


# --- servers that offer little ----------------------------------------------------------------------------------


@fault(
    "SFTP: no extensions", injector="bare SFTP version 3", invariants="OPR", outcome="delivered, and replaced, by plain renames"
)
def test_a_server_without_extensions_is_delivered_to_and_redelivered(
    workplace: Workplace, job_id: str, product: Product, small: Product, tmp_path: Path
) -> None:
    with start_asyncssh(tmp_path / "plain", extensions=False) as plain:
        workplace.send_to(plain)
        workplace.place(job_id, small)
        assert_delivered_once(workplace, try_once(workplace, job_id), small, spent=1)
        workplace.place(job_id, product)
        assert_replaced_once(workplace, try_once(workplace, job_id), product)


@fault(
    "SFTP: further sessions refused", injector="sshd MaxSessions 1", invariants="OPR", outcome="delivered over the one session"
)
def test_a_server_that_refuses_further_sessions_is_delivered_to(
    workplace: Workplace, job_id: str, small: Product, tmp_path: Path
) -> None:
    with start_sshd(tmp_path / "narrow", max_sessions=1) as narrow:
        workplace.send_to(narrow)
        workplace.place(job_id, small)
        assert_delivered_once(workplace, try_once(workplace, job_id), small, spent=1)
