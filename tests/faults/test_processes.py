"""Whatever is done to our own processes, an accepted job is delivered once and says what happened to it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
from sqlalchemy import text

from fault_table import fault
from installation import Installation, Outside, Program, install, job
from patience import until
from running_stack import ENDED
from servers import free_port
from valkey_server import start_valkey

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, outside: Outside) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("site")
    with (
        start_valkey(folder) as valkey,
        install(folder, outside, f"sqlite:///{folder / 'ncr.db'}", valkey.port) as installed,
    ):
        yield installed


@pytest.fixture(scope="module")
def running(site: Installation) -> Iterator[dict[str, Program]]:
    """The API, beat, and the worker that takes over from those which the tests start and stop."""
    with site.run("api") as api, site.run("beat") as beat, site.run("worker") as successor:
        yield {"api": api, "beat": beat, "successor": successor}


@pytest.fixture
def successor(running: dict[str, Program]) -> Program:
    return running["successor"]


def begin(site: Installation, job_id: str) -> str:
    """A job whose package the validator holds."""
    site.outside.judge.hold()
    task_id = site.submit(job_id)
    until(lambda: site.outside.judge.waiting > 0)
    return task_id


@fault(
    "Worker: SIGTERM, a job runs",
    injector="SIGTERM to its process group",
    invariants="LOH",
    outcome="the job is finished, no other begun, exit 0",
)
def test_a_stopped_worker_finishes_its_job_and_begins_no_other(site: Installation, successor: Program) -> None:
    with successor.asleep(), site.run("worker", CELERY_WORKER_CONCURRENCY="1") as worker:
        task_id = begin(site, "drained")
        next_id = site.submit("after-the-drained")
        worker.signal_all(signal.SIGTERM)
        until(lambda: "worker_drains" in worker.log())
        site.outside.judge.open.set()
        assert worker.wait(60) == 0, worker.log()
        site.assert_delivered_once("drained", task_id)
        assert site.row(task_id)["attempt"] == 1
        assert site.row(next_id)["status"] == "pending"
    site.assert_delivered_once("after-the-drained", next_id)


@fault(
    "Worker: SIGTERM, the job outlasts WORKER_GRACE_SECONDS",
    injector="SIGTERM, validator that holds its answer",
    invariants="LORH",
    outcome="handed over at once, no attempt spent; the next worker delivers",
)
def test_a_job_that_outlasts_the_grace_is_handed_over_unspent(site: Installation, successor: Program) -> None:
    with successor.asleep(), site.run("worker", WORKER_GRACE_SECONDS="1", LEASE_SECONDS="600") as worker:
        task_id = begin(site, "outlasted")
        worker.signal(signal.SIGTERM)
        assert worker.wait(60) == 0, worker.log()
        assert_handed_over(site, task_id)
        site.outside.judge.open.set()
    site.assert_delivered_once("outlasted", task_id)
    assert site.row(task_id)["attempt"] == 1


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(
            stop,
            marks=fault(
                f"Worker: a second {stop.name}",
                injector=f"{stop.name} twice to its process group",
                invariants="LORH",
                outcome="handed over at once, no attempt spent; exit 0",
            ),
        )
        for stop in (signal.SIGTERM, signal.SIGINT)
    ],
)
def test_a_worker_told_twice_hands_its_job_over_at_once(site: Installation, successor: Program, stop: signal.Signals) -> None:
    job_id = f"told-twice-{stop.name}"
    with successor.asleep(), site.run("worker", WORKER_GRACE_SECONDS="600", LEASE_SECONDS="600") as worker:
        task_id = begin(site, job_id)
        worker.signal_all(stop)
        until(lambda: "worker_drains" in worker.log())
        assert site.row(task_id)["worker"] is not None
        worker.signal_all(stop)
        assert worker.wait(60) == 0, worker.log()
        assert_handed_over(site, task_id)
        site.outside.judge.open.set()
    site.assert_delivered_once(job_id, task_id)
    assert site.row(task_id)["attempt"] == 1


def assert_handed_over(site: Installation, task_id: str) -> None:
    row = site.row(task_id)
    assert (row["status"], row["worker"], row["attempt"]) == ("pending", None, 0)
    assert row["claimable_at"] <= row["updated_at"]
    (said,) = [line for line in site.history(task_id) if line.startswith("put_back")]
    assert "the worker was stopped" in said
    assert "attempt 1 of 5, not counted; next try at once" in said


@fault(
    "Worker: killed while it drains",
    injector="SIGTERM, then SIGKILL",
    invariants="LORH",
    outcome="the lease runs out; the next worker delivers as attempt 2",
)
def test_a_worker_killed_while_it_drains_leaves_the_job_to_its_lease(site: Installation, successor: Program) -> None:
    with successor.asleep(), site.run("worker", WORKER_GRACE_SECONDS="600") as worker:
        task_id = begin(site, "killed-draining")
        worker.signal(signal.SIGTERM)
        until(lambda: "worker_drains" in worker.log())
        worker.kill()
        site.outside.judge.open.set()
    site.assert_delivered_once("killed-draining", task_id)
    assert site.row(task_id)["attempt"] == 2


@pytest.mark.parametrize(
    "whom",
    [
        pytest.param(
            "the whole worker",
            marks=fault(
                "Worker: stopped longer than its lease and resumed",
                injector="SIGSTOP, SIGCONT to its process group",
                invariants="LOPRH",
                outcome="another worker delivers; the resumed one publishes and writes nothing",
            ),
        ),
        pytest.param(
            "its child",
            marks=fault(
                "Worker child: stopped longer than its lease and resumed",
                injector="SIGSTOP, SIGCONT to the child",
                invariants="LOPRH",
                outcome="another child delivers; the resumed one publishes and writes nothing",
            ),
        ),
    ],
)
def test_a_worker_that_stood_still_longer_than_its_lease_publishes_nothing(
    site: Installation, successor: Program, whom: str
) -> None:
    job_id = f"stood-still-{whom.rsplit(maxsplit=1)[-1]}"
    with site.run("worker") as stopped:
        with successor.asleep():
            task_id = begin(site, job_id)
        pid = int(site.row(task_id)["worker"].rpartition(":")[2])
        pids = [pid] if whom == "its child" else [stopped.process.pid, *(child.pid for child in stopped.children())]
        for each in pids:
            os.kill(each, signal.SIGSTOP)
        site.outside.judge.open.set()
        site.assert_published_once(job_id, task_id)
        delivered = site.outside.sftp.folder / job_id
        before = {str(path): path.stat().st_mtime_ns for path in delivered.rglob("*")}
        rows, history = site.row(task_id), site.history(task_id)
        for each in pids:
            os.kill(each, signal.SIGCONT)
        until(lambda: "lease_lost" in stopped.log())
        assert {str(path): path.stat().st_mtime_ns for path in delivered.rglob("*")} == before
        assert site.history(task_id) == history
        assert {**site.row(task_id), "staging_due_at": None} == {**rows, "staging_due_at": None}
        site.assert_delivered_once(job_id, task_id)


@fault(
    "Worker: a job kills its process every time",
    injector="SIGKILL of the child that has claimed the job",
    invariants="LRH",
    outcome="fails after its attempts, saying so; the others are delivered",
)
def test_a_job_that_kills_its_worker_every_time_fails_and_the_others_go_on(site: Installation, successor: Program) -> None:
    site.outside.judge.hold()
    poison = site.submit("poison")
    with site.engine.begin() as connection:
        connection.execute(text("UPDATE ncr_jobs SET max_attempts = 3 WHERE task_id = :t"), {"t": poison})
    others: dict[str, str] = {}
    killed: set[int] = set()

    def ended() -> bool:
        row = site.row(poison)
        if row["worker"] is not None and row["claimable_at"] is not None:
            pid = int(row["worker"].rpartition(":")[2])
            if pid not in killed:
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)
                name = f"beside-poison-{len(killed)}"
                others[name] = site.submit(name)
        return row["status"] in ENDED

    until(ended, 90)
    site.outside.judge.open.set()
    assert site.row(poison)["status"] == "failed", site.history(poison)
    assert len(killed) == 3
    assert "in each of 3 attempts" in site.history(poison)[-1]
    for job_id, task_id in others.items():
        site.assert_delivered_once(job_id, task_id)
    assert successor.process.poll() is None
    assert not (site.outside.sftp.folder / "poison").exists()


@fault(
    "API: killed between commit and ring",
    injector="crash point ring:before",
    invariants="LOSH",
    outcome="the sweeper rings; asking again is answered 409 with the task's id",
)
def test_an_api_killed_between_commit_and_ring_has_accepted_the_job(site: Installation, successor: Program) -> None:
    site.place("unrung")
    port, order = free_port(), site.folder / "crash"
    site.outside.judge.hold()
    with site.run("api", API_PORT=str(port)) as api:
        order.write_text("ring:before")
        with suppress(httpx.HTTPError):
            httpx.post(f"http://127.0.0.1:{port}/process-job", json=job("unrung"), trust_env=False, timeout=30)
        assert api.wait(30) == -signal.SIGKILL
        assert not order.exists()
    again = site.ask("POST", "/process-job", json=job("unrung"))
    site.outside.judge.open.set()
    with site.engine.connect() as connection:
        task_id = connection.execute(text("SELECT task_id FROM ncr_jobs WHERE job_id = 'unrung'")).scalar_one()
    site.assert_delivered_once("unrung", task_id)
    assert again.status_code == 409
    assert task_id in again.text


@fault(
    "Worker, beat and API: killed together",
    injector="SIGKILL of every process group",
    invariants="LOPRH",
    outcome="delivered once after they are started again",
)
def test_everything_killed_at_once_delivers_once_when_it_runs_again(site: Installation, running: dict[str, Program]) -> None:
    """The last one here: it ends what the others use."""
    task_ids = {"all-killed": begin(site, "all-killed")}
    task_ids |= {job_id: site.submit(job_id) for job_id in ("all-killed-1", "all-killed-2", "all-killed-3")}
    for program in running.values():
        program.kill()
    site.outside.judge.open.set()
    with site.run("beat"), site.run("worker"):
        for job_id, task_id in task_ids.items():
            site.assert_delivered_once(job_id, task_id)
    assert site.row(task_ids["all-killed"])["attempt"] == 2
