"""SFTP_MAX_CONNECTIONS and SFTP_MAX_BYTES_PER_SECOND hold for all processes together, counted before a real sshd."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from fault_proxy import FaultProxy, fault_proxy
from ncr_upload.adapters.sftp_dropoff import Limits, SftpDropoff, allowance
from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.adapters.sql.sharing import SqlSharing
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import Status
from ncr_upload.entrypoints.bootstrap import deliveries
from ncr_upload.entrypoints.bootstrap.deliveries import make_dropoff
from ncr_upload.entrypoints.embedded.product import Product
from ncr_upload.migrations.apply import upgrade
from patience import allowed
from servers import SftpServer, start_sshd
from workplace import Workplace

MEGABYTE = 1024 * 1024
UPLOADER = """
import asyncio, json, sys
from pathlib import Path
from ncr_upload.adapters.sftp_dropoff import Limits, SftpDropoff, SftpLogin
from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.adapters.sql.sharing import SqlSharing
from ncr_upload.adapters.sftp_dropoff import Limits, SftpDropoff, allowance
from packages_on_disk import arriving, write_package

asked = json.loads(sys.argv[1])
login = SftpLogin("127.0.0.1", asked["port"], asked["user"], private_key=Path(asked["key"]), host_key=asked["host_key"])
limits = Limits(SqlSharing(open_engine(asked["database"])), asked["connections"], asked["bytes_per_second"], 80)
dropoff = SftpDropoff(login, asked["base"], limits=limits)
files = write_package(Path(asked["folder"]), {f"S/{n}.bin": bytes([n]) * asked["size"] for n in range(asked["files"])})

async def deliver(task):
    async with dropoff.session() as session:
        await session.adopt(task, 1)
        await session.stage(task, 1, arriving(files), lambda _: None)
        await session.discard(task)

for job in range(asked["jobs"]):
    asyncio.run(deliver(f"{asked['name']}-{job}"))
"""


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[SftpServer]:
    with start_sshd(tmp_path / "sshd") as server:
        yield server


@pytest.fixture
def proxy(sshd: SftpServer) -> Iterator[FaultProxy]:
    with fault_proxy(("127.0.0.1", sshd.login.port), own_process=True) as running:
        running.delay(20)
        yield running


@pytest.fixture
def database(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    upgrade(open_engine(url))
    return url


Running = list[subprocess.Popen[bytes]]


@contextmanager
def uploaders(count: int, folder: Path, sshd: SftpServer, proxy: FaultProxy, **asked: object) -> Iterator[Running]:
    facts = {
        "port": proxy.port,
        "user": sshd.login.username,
        "key": str(sshd.login.private_key),
        "host_key": sshd.login.host_key,
        "base": sshd.base_dir,
        **asked,
    }
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    own = [json.dumps(facts | {"name": f"task{number}", "folder": str(folder / f"files{number}")}) for number in range(count)]
    running = [subprocess.Popen([sys.executable, "-c", UPLOADER, each], env=environment) for each in own]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_no_more_connections_are_open_than_may_be_whatever_is_killed(
    tmp_path: Path, sshd: SftpServer, proxy: FaultProxy, database: str
) -> None:
    """Four processes that would each open four. One of them is killed: what it held is not used by others before its time. One
    that is closed is counted by the proxy until both ends have heard of it, so what counts is the least of five looks."""
    limit = 3
    asked = {"database": database, "connections": limit, "bytes_per_second": 0, "files": 12, "size": MEGABYTE, "jobs": 2}
    seen: list[int] = []
    with uploaders(4, tmp_path, sshd, proxy, **asked) as running:
        deadline = time.monotonic() + 90
        while any(process.poll() is None for process in running):
            assert time.monotonic() < deadline
            seen.append(proxy.count()["connections"])
            if len(seen) > 50 and max(seen) >= limit and running[0].returncode is None:
                running[0].send_signal(signal.SIGKILL)
            time.sleep(0.02)
        assert [process.returncode for process in running[1:]] == [0, 0, 0]
    lasting = [min(looks) for looks in zip(*(seen[number:] for number in range(5)), strict=False)]
    assert max(lasting) <= limit <= max(seen)


def test_all_processes_together_keep_to_the_rate(tmp_path: Path, sshd: SftpServer, proxy: FaultProxy, database: str) -> None:
    rate = 4_000_000
    asked = {"database": database, "connections": 0, "bytes_per_second": rate, "files": 10, "size": MEGABYTE, "jobs": 1}
    samples: list[tuple[float, int]] = []
    with uploaders(3, tmp_path, sshd, proxy, **asked) as running:
        deadline = time.monotonic() + 90
        while any(process.poll() is None for process in running):
            assert time.monotonic() < deadline
            samples.append((time.monotonic(), proxy.count()["up"]))
            time.sleep(0.05)
        assert [process.returncode for process in running] == [0, 0, 0]
    total = samples[-1][1]
    began = next(at for at, count in samples if count > 0.05 * total)
    ended = next(at for at, count in samples if count >= 0.95 * total)
    measured = 0.9 * total / (ended - began)
    assert 0.7 * rate / allowed(1) < measured <= 1.1 * rate
    assert total > 3 * 10 * MEGABYTE


def test_a_job_that_finds_no_connection_waits_without_spending_an_attempt(
    workplace: Workplace, product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "make_dropoff", partial(make_dropoff, wait_seconds=0.5))
    workplace.change(sftp_max_connections=1, park_hours=1)
    destination = make_dropoff(workplace.settings, workplace.engine).destination
    sharing = SqlSharing(workplace.engine)
    assert sharing.take_connection(destination, "another worker", 1, 0, 60) == 0
    workplace.place("waits", product)
    (task,) = workplace.submit("waits")
    waiting = workplace.attempt(task)
    assert waiting.status is not Status.FAILED
    assert waiting.problem is not None
    assert (waiting.problem.code, waiting.problem.error_class) == ("connections_in_use", "deferred")
    assert "SFTP_MAX_CONNECTIONS" in waiting.problem.next_step
    assert any("all 1 connections" in line for line in workplace.history(waiting))
    sharing.release_connections("another worker")
    workplace.let_time_pass()
    done = workplace.attempt(task)
    assert (done.status, done.attempt) == (Status.COMPLETED, 1)
    assert sharing.take_connection(destination, "next", 1, 0, 60) == 0, "given back when the session ended"


def test_a_package_that_was_judged_waits_for_a_connection_as_long_as_it_took(
    workplace: Workplace, product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have to be zipped and judged again."""
    monkeypatch.setattr(deliveries, "make_dropoff", partial(make_dropoff, wait_seconds=0))
    workplace.change(sftp_max_connections=1)
    destination = make_dropoff(workplace.settings, workplace.engine).destination
    sharing = SqlSharing(workplace.engine)
    assert sharing.take_connection(destination, "another worker", 1, 0, 60) == 0
    workplace.place("judged", product)
    (task,) = workplace.submit("judged")

    def judged(point: str) -> None:
        if point == "validate:before":
            time.sleep(1)  # so long the validator takes, at least
        if point == "validate:after":
            threading.Timer(0.5, sharing.release_connections, ["another worker"]).start()

    done = workplace.attempt(task, judged)
    assert (done.status, done.attempt) == (Status.COMPLETED, 1), done.message


class Withdrawn:
    """A ledger that gives one connection and then knows nothing of it."""

    def take_connection(self, *_: object) -> int:
        return 0

    def renew_connections(self, *_: object) -> bool:
        return False

    def release_connections(self, *_: object) -> None: ...

    def book_bytes(self, *_: object) -> float:
        return 0


@pytest.mark.anyio
async def test_a_session_that_lost_its_lease_closes_its_connections(sshd: SftpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "RENEW_SECONDS", 0.2)
    async with SftpDropoff(sshd.login, sshd.base_dir, limits=Limits(Withdrawn(), 1)).session() as session:
        await session.adopt("task", 1)
        await asyncio.sleep(0.5)
        with pytest.raises(Unavailable):
            await session.probe()
