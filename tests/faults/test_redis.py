"""Redis may be away, silent, full or empty: the API answers in time, and every accepted job is delivered once."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from redis import Redis

from fault_proxy import FaultProxy, fault_proxy
from fault_table import fault
from installation import Installation, Outside, Program, install, job
from ncr_upload.adapters.celery_queue import QUEUE
from patience import until
from valkey_server import ValkeyServer, start_valkey

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

GETS = ("/health", "/celery-stats", "/readyz", "/livez", "/jobs/active", "/memory-stats")


@dataclass
class RedisSite:
    """An installation whose Redis is reached through a proxy."""

    site: Installation
    valkey: ValkeyServer
    proxy: FaultProxy
    worker: Program

    def command(self, *words: str) -> None:
        with Redis.from_url(self.valkey.url) as client:
            client.execute_command(*words)

    def restart(self) -> None:
        self.valkey.kill()
        self.valkey.start_again()

    def restart_empty(self) -> None:
        self.valkey.kill()
        shutil.rmtree(self.site.folder / "appendonlydir")
        self.valkey.start_again()


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory, outside: Outside) -> Iterator[RedisSite]:
    folder = tmp_path_factory.mktemp("site")
    with (
        start_valkey(folder, append_only=True) as valkey,
        fault_proxy(("127.0.0.1", valkey.port)) as proxy,
        install(folder, outside, f"sqlite:///{folder / 'ncr.db'}", proxy.port) as site,
        site.run("api"),
        site.run("beat"),
        site.run("worker") as worker,
    ):
        yield RedisSite(site, valkey, proxy, worker)


@dataclass(frozen=True)
class Away:
    """A fault that lasts: how it begins and how it is healed."""

    begin: Callable[[RedisSite], None]
    heal: Callable[[RedisSite], None]


def lasting(name: str, injector: str, begin: Callable[[RedisSite], None], heal: Callable[[RedisSite], None]) -> object:
    outcome = "every answer in time, jobs accepted; all delivered once it is back"
    mark = fault(f"Redis: {name}", injector=injector, invariants="LOSA", outcome=outcome)
    return pytest.param(Away(begin, heal), id=name.replace(" ", "-"), marks=mark)


@pytest.mark.parametrize(
    "away",
    [
        lasting("frozen", "SIGSTOP", lambda it: it.valkey.freeze(), lambda it: it.valkey.thaw()),
        lasting("refused", "connections refused and reset", lambda it: it.proxy.refuse(), lambda it: it.proxy.heal()),
        lasting("half-open", "connections go silent", lambda it: it.proxy.half_open(), lambda it: it.proxy.heal()),
        lasting(
            "full",
            "maxmemory reached, noeviction",
            lambda it: it.command("CONFIG", "SET", "maxmemory", "1024"),
            lambda it: it.command("CONFIG", "SET", "maxmemory", "0"),
        ),
        lasting(
            "killed", "SIGKILL; started again with its AOF", lambda it: it.valkey.kill(), lambda it: it.valkey.start_again()
        ),
    ],
)
def test_without_redis_every_answer_is_in_time_and_jobs_are_delivered_later(
    redis: RedisSite, away: Away, request: pytest.FixtureRequest
) -> None:
    site, name = redis.site, request.node.callspec.id
    site.outside.judge.hold()
    running = site.submit(f"running-{name}")
    until(lambda: site.outside.judge.waiting > 0)
    site.place(f"during-{name}")
    away.begin(redis)
    try:
        accepted = site.ask("POST", "/process-job", json=job(f"during-{name}"))
        assert accepted.status_code == 202, accepted.text
        task_id = accepted.json()["task_id"]
        again = site.ask("POST", "/process-job", json=job(f"during-{name}"))
        assert (again.status_code, task_id in again.text) == (409, True)
        for path in (*GETS, f"/job-status/{running}", f"/jobs/{task_id}/history"):
            assert site.ask("GET", path).status_code == 200, path
        site.outside.judge.open.set()
        site.assert_published_once(f"running-{name}", running)  # a running job needs no Redis
    finally:
        away.heal(redis)
    site.assert_delivered_once(f"running-{name}", running)
    site.assert_delivered_once(f"during-{name}", task_id)
    until(lambda: site.ask("GET", "/health").json()["status"] == "healthy", 60)
    assert redis.worker.process.poll() is None


@pytest.mark.parametrize(
    "wipe",
    [
        pytest.param(
            lambda it: it.command("FLUSHALL"),
            id="flushall",
            marks=fault(
                "Redis: FLUSHALL", injector="FLUSHALL", invariants="LOS", outcome="every waiting job is rung for again"
            ),
        ),
        pytest.param(
            RedisSite.restart,
            id="restart-with-aof",
            marks=fault("Redis: restart with AOF", injector="SIGKILL", invariants="LOS", outcome="goes on with its messages"),
        ),
        pytest.param(
            RedisSite.restart_empty,
            id="restart-without-aof",
            marks=fault(
                "Redis: restart without AOF",
                injector="SIGKILL, empty afterwards",
                invariants="LOS",
                outcome="every waiting job is rung for again",
            ),
        ),
    ],
)
def test_a_wiped_or_restarted_redis_loses_no_waiting_job(
    redis: RedisSite, wipe: Callable[[RedisSite], None], request: pytest.FixtureRequest
) -> None:
    site, name = redis.site, request.node.callspec.id
    with redis.worker.asleep():
        task_ids = {f"{name}-{number}": site.submit(f"{name}-{number}") for number in range(4)}
        wipe(redis)
    for job_id, task_id in task_ids.items():
        site.assert_delivered_once(job_id, task_id)


@fault(
    "Redis: the reply to a BRPOP cut",
    injector="proxy: request forwarded, connection reset instead of the reply",
    invariants="LOS",
    outcome="the message is lost, the job is rung for again",
)
def test_a_message_lost_with_its_reply_is_rung_again(redis: RedisSite) -> None:
    site = redis.site
    task_ids: dict[str, str] = {}
    for number in range(4):
        lost = redis.proxy.count()["lost"]
        redis.proxy.lose_answer(b"BRPOP")
        time.sleep(1.2)  # the worker asks again every second: now by the request whose answer will be lost
        task_ids[f"cut-{number}"] = site.submit(f"cut-{number}")
        until(lambda lost=lost: redis.proxy.count()["lost"] > lost)  # type: ignore[misc]
    redis.proxy.heal()
    for job_id, task_id in task_ids.items():
        site.assert_delivered_once(job_id, task_id)
    assert QUEUE in site.ask("GET", "/celery-stats").json()["queues"]


@fault(
    "Redis: frozen while a worker is stopped",
    injector="SIGSTOP of Redis, SIGTERM to the worker",
    invariants="LH",
    outcome="the job is handed over in SQL and the worker ends, at most 10 s later",
)
def test_a_worker_can_be_stopped_while_redis_is_frozen(redis: RedisSite) -> None:
    site = redis.site
    with redis.worker.asleep(), site.run("worker", WORKER_GRACE_SECONDS="1", LEASE_SECONDS="600") as stopped:
        site.outside.judge.hold()
        task_id = site.submit("stopped-frozen")
        until(lambda: site.outside.judge.waiting > 0)
        redis.valkey.freeze()
        try:
            stopped.signal_all(signal.SIGTERM)
            assert stopped.wait(60) == 0, stopped.log()
        finally:
            redis.valkey.thaw()
        row = site.row(task_id)
        assert (row["status"], row["worker"], row["attempt"]) == ("pending", None, 0)
        site.outside.judge.open.set()
    site.assert_delivered_once("stopped-frozen", task_id)
