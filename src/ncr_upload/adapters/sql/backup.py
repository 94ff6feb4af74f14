"""The ledger as a file, and back: gzipped lines of JSON, independent of the kind of database.

The first line says the format and the revision, the last how many rows came between, so that a file cut short is known.
The studio's tables are the studio's to save.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any

from sqlalchemy import Column, Connection, Engine, Table, insert, inspect, select

from ncr_upload.adapters.sql.engine import translated_errors
from ncr_upload.adapters.sql.rows import read_now, write_event
from ncr_upload.adapters.sql.tables import (
    batches,
    conflicts,
    connections,
    duties,
    events,
    files,
    idempotency,
    jobs,
    metrics,
    pace,
    parked_destinations,
    workers,
)
from ncr_upload.domain.errors import Rejected
from ncr_upload.domain.jobs import LIVE, Status

FORMAT = "ncr-ledger-1"
FENCE_STEP = 1000
"""Added to the fence of a restored live task: whatever worked on it after the backup has a lower one."""
AT_ONCE = 500
ACTOR = "restore"

KEYED = {jobs: "task_id", batches: "batch_id", idempotency: "idempotency_key"}
"""Saved by this key: a row whose key the ledger still has stays as it is, being the newer."""
CHILDREN = {events: (jobs, "task_id"), files: (jobs, "task_id"), conflicts: (batches, "batch_id")}
"""Come back with their parent."""
LEFT_OUT = frozenset({parked_destinations, duties, workers, connections, pace, metrics})
"""Found out anew; counters begin at 0 again."""


@dataclass(slots=True)
class Restored:
    """What a restore put back. `superseded`: live tasks whose job has a newer live task, put back as cancelled."""

    tasks: int = 0
    live: list[dict[str, Any]] = field(default_factory=list)
    superseded: int = 0
    kept: int = 0
    added: dict[Table, set[str]] = field(default_factory=lambda: {table: set() for table in KEYED})


def write_backup(engine: Engine, to: IO[bytes], revision: str | None) -> int:
    """Write the whole ledger, which is at `revision`, as it is at one moment; how many rows. Raises `Unavailable`."""
    rows = 0
    with translated_errors(engine), _snapshot(engine) as connection, gzip.open(to, "wt", encoding="utf-8") as out:
        head = {"format": FORMAT, "revision": revision, "taken_at": read_now(connection)}
        out.write(json.dumps(head) + "\n")
        for table, columns in _columns_there(connection):
            found = connection.execution_options(stream_results=True, yield_per=AT_ONCE).execute(
                select(*columns).order_by(*table.primary_key.columns)
            )
            for row in found.mappings():
                out.write(json.dumps({"table": table.name, "row": dict(row)}) + "\n")
                rows += 1
        out.write(json.dumps({"rows": rows}) + "\n")
    return rows


def _columns_there(connection: Connection) -> Iterator[tuple[Table, list[Column[Any]]]]:
    """What can be saved, in a database that may be at an older revision, or at none."""
    inspector = inspect(connection)
    for table in (*KEYED, *CHILDREN):
        if inspector.has_table(table.name):
            there = {found["name"] for found in inspector.get_columns(table.name)}
            yield table, [column for column in table.columns if column.computed is None and column.name in there]


def _snapshot(engine: Engine) -> Connection:
    if engine.dialect.name == "sqlite":
        return engine.connect()
    return engine.connect().execution_options(isolation_level="REPEATABLE READ")


def restore_backup(engine: Engine, source: IO[bytes], revision: str | None) -> Restored:
    """Put back, in one transaction, what the ledger, which is at `revision`, has lost. Raises `Rejected` for a file that is
    none or was cut short.

    Tasks that had ended come back as they were. Live ones wait to be claimed: the studio's row tells whether the job still
    awaits upload, so one that was delivered since the backup ends as refused and is not delivered again.
    """
    restored = Restored()
    with translated_errors(engine), engine.begin() as connection:
        now = read_now(connection)
        for name, rows in _chunks(_read(source, revision)):
            _put_back(connection, name, rows, now, restored)
        for row in restored.live:
            facts = {"attempt": row["attempt"], "stage": row["stage"], "kind": "restored", "actor": ACTOR}
            write_event(connection, row["task_id"], **facts, message="put back from a backup of the ledger")
    return restored


def _read(source: IO[bytes], revision: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with gzip.open(source, "rt", encoding="utf-8") as lines:
            head = json.loads(next(lines, "{}"))
            if head.get("format") != FORMAT:
                raise _broken(f"it is no backup of format {FORMAT}")
            if revision is None or (head["revision"] or "") > revision:
                raise _broken(f"it was made at revision {head['revision']}, and the tables are at {revision or 'nothing'}")
            for count, line in enumerate(lines):
                found = json.loads(line)
                if "rows" in found:
                    if found["rows"] != count:
                        raise _broken(f"it holds {count} rows instead of {found['rows']}")
                    return
                yield found["table"], found["row"]
    except (OSError, EOFError, ValueError) as error:
        raise _broken(f"it cannot be read: {type(error).__name__}") from error
    raise _broken("it was cut short")


def _broken(why: str) -> Rejected:
    return Rejected("backup_unusable", f"this backup cannot be restored: {why}", "Take another one; nothing was changed.")


def _chunks(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    rows = iter(rows)
    while chunk := list(islice(rows, AT_ONCE)):
        names = dict.fromkeys(name for name, _ in chunk)
        for name in names:
            yield name, [row for found, row in chunk if found == name]


def _put_back(connection: Connection, name: str, rows: list[dict[str, Any]], now: float, restored: Restored) -> None:
    for table, key in KEYED.items():
        if table.name == name:
            lost = _lost(connection, table, key, rows)
            restored.kept += len(rows) - len(lost) if table is jobs else 0
            restored.added[table].update(row[key] for row in lost)
            if table is jobs:
                _put_back_tasks(connection, lost, now, restored)
            else:
                _insert(connection, table, lost)
    for table, (parent, key) in CHILDREN.items():
        if table.name == name:
            _insert(connection, table, [row for row in rows if row[key] in restored.added[parent]])


def _lost(connection: Connection, table: Table, key: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    there = set(connection.execute(select(table.c[key]).where(table.c[key].in_([row[key] for row in rows]))).scalars())
    return [row for row in rows if row[key] not in there]


def _put_back_tasks(connection: Connection, rows: list[dict[str, Any]], now: float, restored: Restored) -> None:
    running = jobs.c.live_job_id.in_([row["job_id"] for row in rows])
    newer = set(connection.execute(select(jobs.c.live_job_id).where(running)).scalars())
    live = [row for row in rows if row["status"] in LIVE]
    superseded = [row for row in live if row["job_id"] in newer]
    for row in live:
        row |= {"worker": None, "waits_for": None, "fence": row["fence"] + FENCE_STEP, "updated_at": now}
        if row["claimable_at"] is not None:
            row["claimable_at"] = now
    for row in superseded:
        told = "the backup had it in flight, but the job has been submitted again since"
        row |= {"status": Status.CANCELLED.value, "claimable_at": None, "finished_at": now, "message": told}
    _insert(connection, jobs, rows)
    restored.tasks += len(rows)
    restored.live += [row for row in live if row not in superseded]
    restored.superseded += len(superseded)


def _insert(connection: Connection, table: Table, rows: Sequence[dict[str, Any]]) -> None:
    """Under new ids: those of the backup may be taken by now."""
    if rows:
        connection.execute(insert(table), [{name: value for name, value in row.items() if name != "id"} for row in rows])
