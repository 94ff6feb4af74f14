"""A destination that needs an operator: one record, one probe at a time, and every job goes on by itself once it is mended."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import asyncssh
import pytest

from fault_proxy import FaultProxy, fault_proxy
from fault_table import fault
from ncr_upload.domain.jobs import Status
from ncr_upload.entrypoints.embedded.product import Product
from parts import miss
from servers import SftpServer, start_sshd
from workplace import Workplace

OUTCOME = "parked once, probed by one worker, attempts unspent, all delivered once it is mended"


@dataclass
class Partner:
    """The destination behind a proxy that counts the logins, and how its fault is made and mended."""

    proxy: FaultProxy
    break_down: Callable[[], None]
    mend: Callable[[], None]

    @property
    def logins(self) -> int:
        return self.proxy.count()["accepted"]


@contextmanager
def with_fault(workplace: Workplace, name: str) -> Iterator[Partner]:
    """The server that fails on request."""
    sftp = workplace.sftp
    with fault_proxy(("127.0.0.1", sftp.login.port)) as proxy:
        workplace.change(sftp_port=proxy.port)
        try:
            yield Partner(proxy, lambda: sftp.fault(name), lambda: sftp.fault(""))
        finally:
            sftp.fault("")


@contextmanager
def with_another_host_key(workplace: Workplace) -> Iterator[Partner]:
    right = workplace.settings.sftp_host_key
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    with fault_proxy(("127.0.0.1", workplace.sftp.login.port)) as proxy:
        workplace.change(sftp_port=proxy.port)
        yield Partner(proxy, lambda: workplace.change(sftp_host_key=other), lambda: workplace.change(sftp_host_key=right))


@contextmanager
def with_full_disk(workplace: Workplace, folder: Path) -> Iterator[Partner]:
    """OpenSSH on a small disk."""
    with start_sshd(folder / "sshd") as sshd:
        small = sshd.folder / "small"
        small.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(small)], capture_output=True, text=True)
        if mounted.returncode:
            miss(f"no small disk can be mounted here (root can): {mounted.stderr.strip()}")
        try:
            with fault_proxy(("127.0.0.1", sshd.login.port)) as proxy:
                login = replace(sshd.login, port=proxy.port)
                workplace.send_to(SftpServer(login, str(small), small))
                yield Partner(proxy, lambda: fill(small), lambda: (small / "filler").unlink())
        finally:
            subprocess.run(["umount", "-l", str(small)], check=True)


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb") as file:
        try:
            while True:
                file.write(b"f" * 65536)
                file.flush()
        except OSError:
            pass


@pytest.fixture
def partner(request: pytest.FixtureRequest, workplace: Workplace, tmp_path: Path) -> Iterator[Partner]:
    match request.param:
        case "full disk":
            opened = with_full_disk(workplace, tmp_path)
        case "host key":
            opened = with_another_host_key(workplace)
        case name:
            opened = with_fault(workplace, name)
    workplace.change(park_hours=24)
    with opened as found:
        yield found


@pytest.mark.parametrize(
    ("partner", "jobs", "code"),
    [
        pytest.param(
            *("full disk", 20, "disk_full"),
            marks=fault("SFTP: disk full, then room", injector="sshd on a tmpfs", invariants="LOPH", outcome=OUTCOME),
        ),
        pytest.param(
            *("quota", 2, "disk_full"),
            marks=fault("SFTP: quota spent, then raised", injector="sftp_program", invariants="LOPH", outcome=OUTCOME),
        ),
        pytest.param(
            *("denied", 2, "permission_denied"),
            marks=fault("SFTP: permission denied, then granted", injector="sftp_program", invariants="LOPH", outcome=OUTCOME),
        ),
        pytest.param(
            *("host key", 2, "host_key_mismatch"),
            marks=fault("SFTP: host key changed, then back", injector="another pin", invariants="LOPH", outcome=OUTCOME),
        ),
    ],
    indirect=["partner"],
)
def test_while_a_destination_is_parked_only_the_probes_touch_it_and_all_jobs_go_on_once_it_is_mended(
    workplace: Workplace, small: Product, partner: Partner, jobs: int, code: str
) -> None:
    partner.break_down()
    tasks = []
    for number in range(jobs):
        workplace.place(f"{code}-{jobs}-{number}", small)
        tasks += workplace.submit(f"{code}-{jobs}-{number}")
    for task in tasks:
        waiting = workplace.attempt(task)
        assert (waiting.status, waiting.attempt) == (Status.PENDING, 0), waiting.message
        assert waiting.problem is not None
        assert (waiting.problem.code, waiting.problem.error_class) == (code, "parked")
        assert waiting.due_at is not None
        for words in ("is parked since", waiting.problem.message, "next probe at", "attempt 1 of 3, not counted"):
            assert words in waiting.message
    assert partner.logins == 1, "only the first job met the destination"
    assert [any("downloading" in line for line in workplace.history(task)) for task in tasks] == [True] + [False] * (jobs - 1)

    workplace.probe()
    assert partner.logins == 2
    workplace.let_time_pass()
    assert workplace.attempt(tasks[-1]).status is Status.PENDING
    assert partner.logins == 2

    partner.mend()
    workplace.probe()
    assert partner.logins == 3
    for task in tasks:
        assert "works again" in workplace.history(task)[-1]
        ended = workplace.attempt(task)
        assert (ended.status, ended.attempt) == (Status.COMPLETED, 1), ended.message
        assert workplace.delivered(task.job_id) == small.delivered
    assert workplace.leftovers() == []


@pytest.mark.parametrize("partner", ["quota"], indirect=True)
def test_deep_health_tells_a_parked_destination_without_asking_it(
    workplace: Workplace, small: Product, partner: Partner
) -> None:
    from ncr_upload.domain.errors import DestinationParked
    from ncr_upload.entrypoints.bootstrap import api

    check = api._make_probes(workplace.settings, workplace.engine)["sftp"]
    check()
    partner.break_down()
    workplace.place("deep", small)
    workplace.attempt(workplace.submit("deep")[0])
    logins = partner.logins
    with pytest.raises(DestinationParked, match=r"is parked since .* because .* next probe at") as told:
        check()
    assert told.value.code == "disk_full"
    assert "make room" in told.value.next_step
    assert partner.logins == logins
