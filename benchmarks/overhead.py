"""Jobs per second through the queue beside bare Celery's no-ops (`bare_celery.py`), in turns on one Valkey, two processes each.

A no-op job is accepted, rung for, claimed, looked up, refused because the studio's row awaits no upload, and ended, all of it
recorded in PostgreSQL. A small job is a whole delivery of one small file, its ledger on SQLite, one process.

    python benchmarks/overhead.py --rounds 5
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parents[1] / "tests")]

from redis import Redis
from sqlalchemy import Engine, text

from databases import Databases
from datasets import TINY
from figures import Figure, compare, say
from growth import vacuum
from ncr_upload.adapters.celery_queue import CeleryQueue, make_app, make_message
from ncr_upload.adapters.sql.submissions import SqlSubmissions
from ncr_upload.domain.jobs import NewJob, Task
from patience import until
from place import Place, open_place, worker_settings
from running_stack import NCR
from studio_rows import open_database
from valkey_server import start_valkey

PEER = "bare Celery's no-ops"
JOBS, SMALL_JOBS, PROCESSES = 2000, 20, 2
_runs = itertools.count(1)
Run = Callable[[int], float]
"""So many jobs: how many a second."""


def measure(place: Place, rounds: int) -> Iterator[Figure]:
    """A round is each of the three, each first in turn."""
    rates: dict[str, list[float]] = {"noop": [], "bare": [], "small": []}
    with running_sides(place) as (run_ours, run_bare, engine):
        small = place.worker(place.loopback, CELERY_WORKER_MAX_TASKS_PER_CHILD="100000")
        runs: dict[str, Callable[[], float]] = {
            "noop": lambda: run_ours(JOBS),
            "bare": lambda: run_bare(JOBS),
            "small": lambda: SMALL_JOBS / sum(small.deliver(TINY).wall_seconds for _ in range(SMALL_JOBS)),
        }
        names = list(runs)
        for run in (run_ours, run_bare):
            run(200)  # for warming up
        vacuum(engine)
        for turn in range(rounds):
            for name in (*names[turn % 3 :], *names[: turn % 3]):
                rates[name].append(runs[name]())
    yield compare("overhead.noop", PEER, rates["noop"], rates["bare"])
    yield compare("overhead.small_job", PEER, rates["small"], rates["bare"])


@contextmanager
def running_sides(place: Place) -> Iterator[tuple[Run, Run, Engine]]:
    """Both workers, and our ledger."""
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="ncr-overhead-")))
        databases = Databases()
        running.callback(databases.close)
        url = databases.create("postgresql", folder)
        engine = open_database(url)
        running.callback(engine.dispose)
        valkey = running.enter_context(start_valkey(folder))
        broker = f"redis://127.0.0.1:{valkey.port}"
        app = make_app(f"{broker}/0", concurrency=1, max_tasks_per_child=1, max_memory_per_child_kb=1)
        settings = worker_settings(place, place.loopback, folder, 0) | {
            "DATABASE_URL": url,
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(valkey.port),
            "CELERY_WORKER_CONCURRENCY": str(PROCESSES),
            "CELERY_WORKER_MAX_TASKS_PER_CHILD": "1000000",
            "BARE_BROKER": f"{broker}/1",
            "PYTHONPATH": os.pathsep.join([*sys.path[:2], str(Path(__file__).parent)]),
        }
        bare = [sys.executable, "-m", "celery", "-A", "bare_celery", "worker", "-c", str(PROCESSES), "-l", "INFO"]
        for name, command in (("ours", [*NCR, "worker"]), ("theirs", bare)):
            running.enter_context(_worker(command, settings, folder, folder / f"{name}.log"))
        queue = CeleryQueue(app, "here")
        yield (lambda jobs: run_noops(engine, queue, jobs)), (lambda jobs: run_bare(f"{broker}/1", jobs)), engine


@contextmanager
def _worker(command: list[str], settings: dict[str, str], folder: Path, log: Path) -> Iterator[None]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | settings, stdout=out, stderr=out)
    try:
        until(lambda: process.poll() is not None or " ready." in log.read_text(), 90)
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        process.wait(60)


def run_noops(engine: Engine, queue: CeleryQueue, jobs: int) -> float:
    """From the ring until the last one is recorded as ended."""
    run = next(_runs)
    names = [f"noop-{run}-{number}" for number in range(jobs)]
    with engine.begin() as connection:
        insert = text("INSERT INTO job_details (job_id, sku_id, status, is_uploaded) VALUES (:job, 'SKU1', 'Active', 0)")
        connection.execute(insert, [{"job": name} for name in names])
    ledger = SqlSubmissions(engine, max_attempts=5)
    tasks = ledger.accept([NewJob(name, "ann", "spring") for name in names], batch_id=None, release=jobs)
    task_ids = [task.task_id for task in tasks if isinstance(task, Task)]  # type: ignore[union-attr]
    began = time.perf_counter()
    queue.ring(task_ids)
    until(lambda: _count(engine, "live_job_id IS NOT NULL") == 0, 300)
    seconds = time.perf_counter() - began
    assert _count(engine, f"job_id LIKE 'noop-{run}-%' AND problem_code = 'not_awaiting_upload'") == jobs
    return jobs / seconds


def _count(engine: Engine, condition: str) -> int:
    with engine.connect() as connection:
        return int(connection.execute(text(f"SELECT COUNT(*) FROM ncr_jobs WHERE {condition}")).scalar_one())


def run_bare(broker: str, jobs: int) -> float:
    """From the first message, sent in bulk, until the last one has been run."""
    done = f"done-{next(_runs)}"
    messages = [make_message("bare_celery.nothing", f"task-{number}", "celery") for number in range(jobs)]
    last = [make_message("bare_celery.tell", done, "celery")]
    with Redis.from_url(broker) as redis:
        began = time.perf_counter()
        redis.lpush("celery", *messages, *last)
        until(lambda: bool(redis.exists(done)), 300)
        return jobs / (time.perf_counter() - began)


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=5)
    options = asked.parse_args()
    with tempfile.TemporaryDirectory(prefix="ncr-bench-") as folder, open_place(Path(folder)) as place:
        for figure in measure(place, options.rounds):
            print(say(figure), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
