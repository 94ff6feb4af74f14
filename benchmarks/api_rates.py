"""Requests per second of `POST /process-job` and `GET /job-status` beside a bare FastAPI and Redis (`bare_api.py`), in turns:
the same uvicorn settings, one process each, the same Valkey, the same load. Ours writes a job to PostgreSQL before it answers.

    python benchmarks/api_rates.py --rounds 7
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parents[1] / "tests")]

import httpx
from sqlalchemy import Engine

from databases import Databases
from figures import Figure, compare, say
from growth import vacuum
from http_load import Load, get, post, send
from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.migrations.apply import upgrade
from patience import until
from running_stack import NCR
from servers import free_port
from valkey_server import start_valkey

PEER = "a bare FastAPI and Redis"
SUBMITS, STATUSES, CONNECTIONS = 2000, 6000, 32
_jobs = itertools.count(1)


def measure(_place: Any, rounds: int) -> Iterator[Figure]:
    """A round is both sides, each first in turn."""
    with running_apis() as (ports, engine):
        submits: dict[str, list[Load]] = {"ours": [], "theirs": []}
        statuses: dict[str, list[Load]] = {"ours": [], "theirs": []}
        for turn in range(rounds + 1):
            sides = sorted(ports, reverse=bool(turn % 2))
            submitted = {side: submit(ports[side]) for side in sides}
            asked = {side: ask(ports[side], submitted[side]) for side in sides}
            if turn:
                for side in sides:
                    submits[side].append(submitted[side])
                    statuses[side].append(asked[side])
            else:  # for warming up
                vacuum(engine)
    yield compare("submit.rate", PEER, *([load.rate for load in submits[side]] for side in ("ours", "theirs")))
    yield compare("submit.p99", PEER, *([load.p99_ms for load in submits[side]] for side in ("ours", "theirs")))
    yield compare("status.rate", PEER, *([load.rate for load in statuses[side]] for side in ("ours", "theirs")))


def submit(port: int) -> Load:
    jobs = [{"job_id": f"job-{next(_jobs)}", "username": "ann", "campaign": "spring", "row_id": 7} for _ in range(SUBMITS)]
    return send(port, [post("/process-job", job) for job in jobs], 202, connections=CONNECTIONS)


def ask(port: int, submitted: Load) -> Load:
    """The statuses of the tasks that were made, all of them waiting."""
    task_ids = [json.loads(body)["task_id"] for body in submitted.bodies]
    assert len(set(task_ids)) == SUBMITS
    asked = [get(f"/job-status/{task_id}") for task_id in itertools.islice(itertools.cycle(task_ids), STATUSES)]
    return send(port, asked, 200, connections=CONNECTIONS)


@contextmanager
def running_apis(kind: str = "postgresql") -> Iterator[tuple[dict[str, int], Engine]]:
    """The port of each side, and our database."""
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="ncr-rates-")))
        databases = Databases(durable=True)
        running.callback(databases.close)
        url = databases.create(kind, folder)
        engine = open_engine(url)
        running.callback(engine.dispose)
        upgrade(engine)
        valkey = running.enter_context(start_valkey(folder))
        ours, theirs = free_port(), free_port()
        settings = {
            "API_HOST": "127.0.0.1",
            "API_PORT": str(ours),
            "DATABASE_URL": url,
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(valkey.port),
            "MAX_MEMORY_USAGE_PERCENT": "99.9",
            "LOG_LEVEL": os.environ.get("BENCH_LOG_LEVEL", "INFO"),
            "PYTHONPATH": os.pathsep.join(sys.path[:2]),
        }
        bare = [sys.executable, str(Path(__file__).with_name("bare_api.py")), str(theirs)]
        for name, command in (("ours", [*NCR, "api"]), ("theirs", bare)):
            running.enter_context(_program(command, settings, folder, folder / f"{name}.log"))
        until(lambda: _answers(ours, "/livez") and _answers(theirs, "/docs"), 90)
        yield {"ours": ours, "theirs": theirs}, engine


@contextmanager
def _program(command: list[str], settings: dict[str, str], folder: Path, log: Path) -> Iterator[None]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | settings, stdout=out, stderr=out)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def _answers(port: int, path: str) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=7)
    options = asked.parse_args()
    for figure in measure(None, options.rounds):
        print(say(figure), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
