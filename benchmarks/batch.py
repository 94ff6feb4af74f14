"""What does accepting a batch cost beside one bare bulk insert of the same rows? The ledger's `accept` and a whole
`POST /process-batch` to a running API, against `executemany` of the plain driver (the same rows into the same tables, one
transaction), measured in turns on the same database; every measurement begins with empty tables.

    python benchmarks/batch.py --jobs 10000 --rounds 7 --engine sqlite --engine postgresql --engine mariadb --out batch.json

Exits 1 when a ratio of medians is above `--limit`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Engine, Table, text

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parents[1] / "tests")]

from databases import Databases
from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.adapters.sql.submissions import SqlSubmissions
from ncr_upload.adapters.sql.tables import batches, events, jobs
from ncr_upload.domain.jobs import NewJob, Task
from ncr_upload.migrations.apply import upgrade
from patience import until
from running_stack import NCR
from servers import free_port
from valkey_server import start_valkey

ENGINES = ("sqlite", "postgresql", "mariadb")
TABLES = (batches, jobs, events)


class Ways:
    """The three ways to get a batch into one database."""

    def __init__(self, engine: Engine, client: httpx.Client, count: int) -> None:
        self.engine, self.client, self.count = engine, client, count
        self.submissions = SqlSubmissions(engine, max_attempts=5)
        self.body = json.dumps([{"job_id": f"job-{n}", "username": "ann", "campaign": "spring"} for n in range(count)])
        self.new_jobs = [NewJob(f"job-{n}", "ann", "spring") for n in range(count)]
        self.accept()
        self.bulk = [self._bulk_of(table) for table in TABLES]
        self.empty()

    def _bulk_of(self, table: Table) -> tuple[str, list[Any]]:
        """The statement and the parameters that write what is in the table now, in its own columns; none that is NULL."""
        names = [column.name for column in table.columns if column.name not in ("id", "live_job_id")]
        with self.engine.connect() as connection:
            rows = connection.execute(table.select().order_by(*table.primary_key)).mappings().all()
        used = [name for name in names if any(row[name] is not None for row in rows)]
        mark = "?" if self.engine.dialect.name == "sqlite" else "%s"
        statement = f"INSERT INTO {table.name} ({', '.join(used)}) VALUES ({', '.join([mark] * len(used))})"
        return statement, [tuple(row[name] for name in used) for row in rows]

    def bare(self) -> None:
        connection = self.engine.raw_connection()
        try:
            cursor = connection.cursor()
            if self.engine.dialect.name == "sqlite":
                cursor.execute("BEGIN IMMEDIATE")  # this connection is in autocommit mode: one transaction, as promised
            for statement, rows in self.bulk:
                cursor.executemany(statement, rows)
            connection.commit()
        finally:
            connection.close()

    def accept(self) -> None:
        tasks = self.submissions.accept(self.new_jobs, batch_id=str(uuid.uuid4()), release=5)
        assert all(isinstance(task, Task) for task in tasks)  # type: ignore[union-attr]

    def post(self) -> None:
        answer = self.client.post("/process-batch", content=self.body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 202, answer.text[:500]
        assert answer.json()["total_jobs"] == self.count

    def empty(self) -> None:
        with self.engine.begin() as connection:
            for table in TABLES:
                verb = "DELETE FROM" if self.engine.dialect.name == "sqlite" else "TRUNCATE TABLE"
                connection.execute(text(f"{verb} {table.name}"))

    def check(self) -> None:
        with self.engine.connect() as connection:
            for table in (jobs, events):
                count = connection.execute(text(f"SELECT COUNT(*) FROM {table.name}")).scalar_one()
                assert count == self.count, f"{table.name} has {count} rows"

    def time(self, way: Callable[[], None]) -> float:
        self.empty()
        began = time.perf_counter()
        way()
        seconds = time.perf_counter() - began
        self.check()
        return seconds


@contextmanager
def running_api(folder: Path, url: str, redis_port: int) -> Iterator[httpx.Client]:
    port = free_port()
    environment = os.environ | {
        "API_HOST": "127.0.0.1",
        "API_PORT": str(port),
        "DATABASE_URL": url,
        "REDIS_HOST": "127.0.0.1",
        "REDIS_PORT": str(redis_port),
        "MAX_MEMORY_USAGE_PERCENT": "99.9",
        "LOG_LEVEL": "WARNING",
        "PYTHONPATH": os.pathsep.join(sys.path[:2]),
        "NO_PROXY": "127.0.0.1,localhost",
    }
    with (folder / "api.log").open("wb") as out:
        process = subprocess.Popen([*NCR, "api"], cwd=folder, env=environment, stdout=out, stderr=out)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False) as client:
            until(lambda: _is_up(client), 90)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def _is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/livez").status_code == 200
    except httpx.HTTPError:
        return False


def measure(ways: Ways, rounds: int) -> dict[str, Any]:
    """Seconds. The ways take turns, each first in turn, so that what else the machine does meets all alike."""
    names = ("bare", "accept", "post")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in (*names[turn % 3 :], *names[: turn % 3]):
            took = ways.time(getattr(ways, name))
            if turn:  # the first is for warming up
                seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": seconds,
        "medians": medians,
        "ratios": {name: medians[name] / medians["bare"] for name in ("accept", "post")},
    }


def run(kind: str, options: argparse.Namespace, folder: Path, databases: Databases) -> dict[str, Any]:
    folder.mkdir()
    url = databases.create(kind, folder)
    engine = open_engine(url, pool_size=2, statement_seconds=3600)
    upgrade(engine)
    with ExitStack() as running:
        valkey = running.enter_context(start_valkey(folder))
        client = running.enter_context(running_api(folder, url, valkey.port))
        ways = Ways(engine, client, options.jobs)
        found = measure(ways, options.rounds)
    engine.dispose()
    return {"engine": kind, "jobs": options.jobs, "rounds": options.rounds, "load": os.getloadavg()[0], **found}


def tell(result: dict[str, Any]) -> None:
    medians, ratios = result["medians"], result["ratios"]
    print(
        f"{result['engine']:11} bare {medians['bare']:.3f} s   accept {medians['accept']:.3f} s × {ratios['accept']:.2f}   "
        f"POST {medians['post']:.3f} s × {ratios['post']:.2f}   (load {result['load']:.1f})",
        flush=True,
    )


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--jobs", type=int, default=10_000)
    asked.add_argument("--rounds", type=int, default=7)
    asked.add_argument("--engine", action="append", choices=ENGINES)
    asked.add_argument("--limit", type=float, default=1.5, help="largest ratio allowed")
    asked.add_argument("--out", type=Path)
    options = asked.parse_args()
    databases, results = Databases(), []
    try:
        with tempfile.TemporaryDirectory(prefix="ncr-batch-") as folder:
            for kind in options.engine or ENGINES:
                results.append(run(kind, options, Path(folder) / kind, databases))
                tell(results[-1])
                if options.out:
                    options.out.write_text(json.dumps(results, indent=2))
    finally:
        databases.close()
    return int(max(ratio for result in results for ratio in result["ratios"].values()) > options.limit)


if __name__ == "__main__":
    raise SystemExit(main())
