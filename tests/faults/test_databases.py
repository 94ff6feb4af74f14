"""A database that is restarted or locked under the running programs: nothing twice, nothing lost, answers in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from sqlalchemy import text

from databases import SERVERS, Server, create_database, prepared
from fault_table import fault
from installation import Installation, Outside, Program, install, job
from patience import until
from valkey_server import start_valkey

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]


@dataclass
class SqlSite:
    site: Installation
    server: Server
    worker: Program


@pytest.fixture(scope="module", params=SERVERS)
def sql(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, outside: Outside) -> Iterator[SqlSite]:
    folder = tmp_path_factory.mktemp("site")
    with (
        start_valkey(folder) as valkey,
        prepared(request.param) as server,
        install(folder, outside, create_database(server.start()), valkey.port) as site,
        site.run("api"),
        site.run("beat"),
        site.run("worker") as worker,
    ):
        yield SqlSite(site, server, worker)


@fault(
    "Worker: database connections over a fork",
    injector="prefork pool on a real server",
    invariants="OR",
    outcome="the main process holds none; no two children share one",
)
def test_each_child_of_a_worker_has_connections_of_its_own(sql: SqlSite) -> None:
    site = sql.site
    site.outside.judge.hold()
    task_ids = {f"fork-{number}": site.submit(f"fork-{number}") for number in range(2)}
    until(lambda: site.outside.judge.waiting == 2)
    held: dict[int, set[int]] = {}
    for task_id in task_ids.values():
        child = int(site.row(task_id)["worker"].rpartition(":")[2])
        held[child] = database_sockets(child, sql.server.port)
    site.outside.judge.open.set()
    assert len(held) == 2
    assert all(held.values())
    first, second = held.values()
    assert not first & second
    # The main process looks at the ledger now and then, and closes the connection each time.
    until(lambda: database_sockets(sql.worker.process.pid, sql.server.port) == set())
    for job_id, task_id in task_ids.items():
        site.assert_delivered_once(job_id, task_id)


def database_sockets(pid: int, port: int) -> set[int]:
    """The inodes of its sockets that are connected to the port."""
    local = {each.fd for each in psutil.Process(pid).net_connections("tcp") if each.raddr and each.raddr.port == port}
    return {Path(f"/proc/{pid}/fd/{fd}").stat().st_ino for fd in local}


@fault(
    "SQL: restarted under API, worker and beat",
    injector="SIGKILL of the server, started again",
    invariants="LOSA",
    outcome="503 with Retry-After meanwhile; running and waiting jobs are delivered once",
)
def test_a_restart_of_the_database_loses_and_doubles_nothing(sql: SqlSite) -> None:
    site = sql.site
    site.outside.judge.hold()
    task_ids = {"restarted": site.submit("restarted")}
    until(lambda: site.outside.judge.waiting > 0)
    with sql.worker.asleep():
        task_ids["restarted-waiting"] = site.submit("restarted-waiting")
    site.place("restarted-refused")
    sql.server.kill()
    try:
        refused = site.ask("POST", "/process-job", json=job("restarted-refused"))
        assert (refused.status_code, refused.headers["content-type"]) == (503, "application/problem+json"), refused.text
        assert int(refused.headers["retry-after"]) > 0
        assert site.ask("GET", "/health").status_code == 503
        assert site.ask("GET", "/livez").status_code == 200
        site.outside.judge.open.set()
        time.sleep(1)  # the validator's answer arrives while nothing can be written down
    finally:
        sql.server.start()
    accepted = site.ask("POST", "/process-job", json=job("restarted-refused"))
    assert accepted.status_code == 202, accepted.text
    task_ids["restarted-refused"] = accepted.json()["task_id"]
    for job_id, task_id in task_ids.items():
        site.assert_delivered_once(job_id, task_id)


@fault(
    "SQL: the job's row locked",
    injector="SELECT … FOR UPDATE held for seconds",
    invariants="LOA",
    outcome="who needs it is answered 503 in time; the job goes on afterwards",
)
def test_a_row_lock_held_for_seconds_delays_one_job_and_nobody_else(sql: SqlSite) -> None:
    site = sql.site
    site.outside.judge.hold()
    locked = site.submit("locked")
    until(lambda: site.outside.judge.waiting > 0)
    with site.engine.begin() as connection:
        connection.execute(text("SELECT * FROM ncr_jobs WHERE task_id = :t FOR UPDATE"), {"t": locked})
        site.outside.judge.open.set()
        refused = site.ask("POST", f"/jobs/{locked}/cancel")
        assert (refused.status_code, refused.headers["content-type"]) == (503, "application/problem+json"), refused.text
        assert int(refused.headers["retry-after"]) > 0
        time.sleep(2 * float(site.settings["LEASE_SECONDS"]))  # it runs out, and the sweeper rings for the locked job
        free = site.submit("beside-locked")
        site.assert_published_once("beside-locked", free)
    site.assert_delivered_once("locked", locked)


@fault(
    "SQLite: write lock held",
    injector="BEGIN IMMEDIATE held for seconds",
    invariants="LOA",
    outcome="submits are answered 503 in time, reading goes on; the jobs are delivered afterwards",
)
def test_a_write_lock_on_sqlite_held_for_seconds_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, outside: Outside
) -> None:
    folder = tmp_path_factory.mktemp("sqlite")
    with (
        start_valkey(folder) as valkey,
        install(folder, outside, f"sqlite:///{folder / 'ncr.db'}", valkey.port) as site,
        site.run("api"),
        site.run("beat"),
        site.run("worker"),
    ):
        outside.judge.hold()
        running = site.submit("lite-running")
        until(lambda: outside.judge.waiting > 0)
        site.place("lite-refused")
        with site.engine.connect() as connection:
            connection.execute(text("SELECT 1"))  # every transaction begins IMMEDIATE
            outside.judge.open.set()
            began = time.monotonic()
            refused = site.ask("POST", "/process-job", json=job("lite-refused"))
            assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (503, True), refused.text
            assert site.ask("GET", f"/job-status/{running}").status_code == 200
            time.sleep(max(0.0, 6 - (time.monotonic() - began)))  # longer than the lease
        accepted = site.ask("POST", "/process-job", json=job("lite-refused"))
        assert accepted.status_code == 202
        site.assert_delivered_once("lite-running", running)
        site.assert_delivered_once("lite-refused", accepted.json()["task_id"])
