"""Does the service slow down as its history grows? Submit, status and active on a ledger with many finished jobs, against an
empty one, measured in turns in the same run through the real adapters.

    python benchmarks/growth.py --rows 1000000 --engine sqlite --engine postgresql --out growth.json

Without `--url`, the servers of the tests are started. Prints a table, the query plans, and exits 1 above `--limit`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event, insert, text

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("src", "tests", "tests/fakes")]

from databases import Databases
from ledger_twin import MemoryJobQueue, MemoryStatusBoard
from ncr_upload.adapters.sql.cleaning import SqlCleaning
from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.adapters.sql.history import SqlHistory
from ncr_upload.adapters.sql.parking import SqlDuties, SqlParking
from ncr_upload.adapters.sql.recovery import SqlRecovery
from ncr_upload.adapters.sql.submissions import SqlSubmissions
from ncr_upload.adapters.sql.tables import batches, events, jobs
from ncr_upload.adapters.sql.workers import SqlWorkerReports
from ncr_upload.application.recovery import ReleaseLimits, SweepPorts, sweep
from ncr_upload.application.views import view_of
from ncr_upload.domain.jobs import NewJob, Task
from ncr_upload.entrypoints.api.models import ActiveJobs
from ncr_upload.migrations.apply import upgrade

CHUNK = 5_000
LIVE = 100
"""As many as one page of `GET /jobs/active` shows, so that it shows as many of any ledger."""

IN_BATCH = 500
DAY = 86_400.0
ENGINES = ("sqlite", "postgresql", "mariadb")


def vacuum(engine: Engine) -> None:
    """What PostgreSQL's autovacuum does by itself within a minute: until then it takes the tables for empty, and reads all of
    them for each query."""
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM (ANALYZE)"))


class FullQueue(MemoryJobQueue):
    """Has a message for each of the `waiting` jobs."""

    waiting = LIVE

    def depth(self, *, first: bool = False) -> int:
        return 0 if first else self.waiting


class Ledger:
    """One ledger under measurement, with a few live jobs in it."""

    def __init__(self, url: str) -> None:
        self.engine = open_engine(url, pool_size=2, statement_seconds=3600)
        upgrade(self.engine)
        self.submissions = SqlSubmissions(self.engine, max_attempts=5)
        self.history, self.queue = SqlHistory(self.engine), FullQueue()
        self.sweep_ports = SweepPorts(
            recovery=SqlRecovery(self.engine),
            cleaning=SqlCleaning(self.engine),
            parking=SqlParking(self.engine),
            duties=SqlDuties(self.engine),
            submissions=self.submissions,
            queue=self.queue,
            board=MemoryStatusBoard(),
            reports=SqlWorkerReports(self.engine),
        )
        self.task_ids: list[str] = []

    def fill(self, rows: int) -> None:
        """Finished jobs of the last 80 days, every other in a batch, two events each, by bulk inserts."""
        now = time.time()
        for start in range(0, rows, CHUNK):
            numbers = range(start, min(rows, start + CHUNK))
            finished = [_finished_job(number, now - 80 * DAY * (1 - number / rows)) for number in numbers]
            with self.engine.begin() as connection:
                made = {job["batch_id"]: job["created_at"] for job in finished if job["batch_id"]}
                connection.execute(insert(jobs), finished)
                if made:
                    values = [{"batch_id": name, "created_at": at, "total_jobs": IN_BATCH} for name, at in made.items()]
                    connection.execute(insert(batches), values)
                connection.execute(insert(events), [line for job in finished for line in _events_of(job)])

    def settle(self) -> None:
        """A few live jobs, as there always are."""
        for number in range(LIVE):
            self.submit(f"live-{number}")

    def rest(self) -> None:
        """Once it is filled."""
        vacuum(self.engine)
        self.engine.dispose()

    def submit(self, job_id: str | None = None) -> str:
        job = NewJob(job_id or f"job-{uuid.uuid4()}", "ann", "spring")
        (task,) = self.submissions.accept([job], batch_id=None, release=1)
        assert isinstance(task, Task)
        self.task_ids.append(task.task_id)
        return task.task_id

    def status(self) -> None:
        assert self.submissions.task(self.task_ids[0]) is not None

    def active(self) -> None:
        """The answer as the API gives it."""
        page = self.submissions.active(username=None, campaign=None, status=None, limit=100, cursor=None)
        views = [view_of(task) for task in page.tasks]
        answer = {"active_jobs": views, "count": len(views), "total": page.total, "cursor": page.cursor}
        assert views
        ActiveJobs.model_validate(answer).model_dump_json()

    def sweep(self) -> None:
        """What beat does every few seconds. Whatever waits has been rung for."""
        sweep(self.sweep_ports, ReleaseLimits(batch_size=5, report_seconds=30))
        self.history.prune(90 * DAY, 200)

    def withdraw(self) -> None:
        """Take back what `submit` measured, so that the number of live jobs stays the same."""
        for task_id in self.task_ids[LIVE:]:
            self.submissions.cancel(task_id)
        del self.task_ids[LIVE:]


def _finished_job(number: int, at: float) -> dict[str, Any]:
    blank = dict.fromkeys(column.name for column in jobs.columns if column.name not in ("id", "live_job_id"))
    return blank | {
        "task_id": str(uuid.uuid4()),
        "job_id": f"old-{number % 200_000}",
        "batch_id": f"batch-{number // IN_BATCH}" if number // IN_BATCH % 2 else None,
        "username": f"user-{number % 50}",
        "campaign": f"campaign-{number % 20}",
        "status": "failed" if number % 20 == 0 else "completed",
        "stage": "done",
        "message": "delivered",
        "attempt": 1,
        "max_attempts": 5,
        "fence": 1,
        "cancel_requested": 0,
        "created_at": at - 60,
        "updated_at": at,
        "started_at": at - 50,
        "finished_at": at,
        "sku": f"SKU{number}",
        "verdict": "Valid",
        "file_count": 36,
        "byte_count": 268_000_000,
    }


def _events_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    line = {"task_id": job["task_id"], "attempt": 1, "stage": "done", "actor": "worker", "message": "as the pipeline writes it"}
    return [line | {"at": job["created_at"], "kind": "accepted"}, line | {"at": job["finished_at"], "kind": "completed"}]


def measure(empty: Ledger, full: Ledger, calls: int) -> dict[str, dict[str, float]]:
    """Medians in milliseconds. The two ledgers take turns, so that what else the machine does meets both alike."""
    found: dict[str, dict[str, float]] = {}
    for name in ("submit", "status", "active", "sweep"):
        times: dict[str, list[float]] = {"empty": [], "full": []}
        for turn in range(calls + 5):
            for which, ledger in (("empty", empty), ("full", full)) if turn % 2 else (("full", full), ("empty", empty)):
                seconds = timed(getattr(ledger, name))
                if turn >= 5:
                    times[which].append(seconds)
        for ledger in (empty, full):
            ledger.withdraw()
        medians = {which: statistics.median(measured) * 1000 for which, measured in times.items()}
        p95 = {f"{which}_p95": statistics.quantiles(measured, n=20)[-1] * 1000 for which, measured in times.items()}
        found[name] = {**medians, **p95, "ratio": medians["full"] / medians["empty"]}
    return found


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def explain(ledger: Ledger) -> dict[str, list[str]]:
    """The plan of every SELECT that the calls send."""
    with _recorded(ledger.engine) as sent:
        ledger.status()
        ledger.active()
        ledger.sweep()
    prefix = "EXPLAIN QUERY PLAN " if ledger.engine.dialect.name == "sqlite" else "EXPLAIN "
    plans: dict[str, list[str]] = {}
    with ledger.engine.connect() as connection:
        for statement, parameters in sent:
            if statement.lstrip().startswith("SELECT") and " FROM ncr_" in statement.replace("\n", " "):
                rows = connection.exec_driver_sql(prefix + statement, parameters).all()
                plans[" ".join(statement.split())] = [
                    str(row[-1]) if len(row) < 5 else ", ".join(str(part) for part in row) for row in rows
                ]
    return plans


@contextmanager
def _recorded(engine: Engine) -> Iterator[list[tuple[str, Any]]]:
    sent: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        sent.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", note)


def run(kind: str, rows: int, calls: int, folder: Path, databases: Databases) -> dict[str, Any]:
    places = {which: folder / which for which in ("empty", "full")}
    for place in places.values():
        place.mkdir(parents=True)
    empty, full = (Ledger(databases.create(kind, place)) for place in places.values())
    began = time.monotonic()
    full.fill(rows)
    filled_seconds = time.monotonic() - began
    for ledger in (empty, full):
        ledger.settle()
        ledger.rest()
    return {
        "engine": kind,
        "rows": rows,
        "calls": calls,
        "filled_seconds": round(filled_seconds, 1),
        "milliseconds": measure(empty, full, calls),
        "plans": explain(full),
    }


def tell(result: dict[str, Any]) -> None:
    print(f"\n{result['engine']}, {result['rows']:,} finished jobs, median of {result['calls']} calls")
    for name, told in result["milliseconds"].items():
        print(f"  {name:8} {told['empty']:8.2f} ms empty  {told['full']:8.2f} ms full   × {told['ratio']:.2f}")
    for statement, plan in result["plans"].items():
        print(f"  {statement[:60]} … {statement.partition(' FROM ')[2][:140]}")
        for line in plan:
            print(f"      {line}")


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rows", type=int, default=100_000)
    asked.add_argument("--calls", type=int, default=200)
    asked.add_argument("--engine", action="append", choices=ENGINES)
    asked.add_argument("--limit", type=float, default=1.3, help="largest ratio allowed for submit, status and active")
    asked.add_argument("--out", type=Path)
    options = asked.parse_args()
    databases = Databases(durable=True)
    results = []
    try:
        with tempfile.TemporaryDirectory(prefix="ncr-growth-") as folder:
            for kind in options.engine or ENGINES[:2]:
                results.append(run(kind, options.rows, options.calls, Path(folder) / kind, databases))
                tell(results[-1])
                if options.out:
                    options.out.write_text(json.dumps(results, indent=2))
    finally:
        databases.close()
    ratios = [result["milliseconds"][name]["ratio"] for result in results for name in ("submit", "status", "active")]
    print(f"\nlargest ratio: {max(ratios):.2f} (allowed: {options.limit})")
    return int(max(ratios) > options.limit)


if __name__ == "__main__":
    raise SystemExit(main())
