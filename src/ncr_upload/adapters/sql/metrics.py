"""The counts of all processes: one row each, and one with the totals of those that are gone."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, Engine, and_, delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from ncr_upload.adapters.sql.engine import READ_ONLY, translated_errors, whole_transaction
from ncr_upload.adapters.sql.tables import db_now
from ncr_upload.adapters.sql.tables import metrics as rows
from ncr_upload.application.metrics import Counts, add_counts

TOTALS = "totals"
RUNNING, ENDED, FOLDED = 0, 1, 2
"""States of a row. A folded one counts no more: it tells its process, should that still run, what the totals took."""
FOLDED_AT_ONCE = 200


class SqlMetrics:
    """`MetricsStore` on SQL."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @whole_transaction
    def store(self, process: str, counts: Counts, *, is_new: bool, ended: bool) -> Counts | None:
        """See `MetricsStore.store`."""
        facts = {"state": ENDED if ended else RUNNING, "stored_at": db_now(), "counts": _write(counts)}
        again = update(rows).where(rows.c.process == process, rows.c.state != FOLDED).values(**facts)
        with translated_errors(self._engine), self._engine.begin() as connection:
            if connection.execute(again).rowcount:
                return None
            folded = connection.execute(select(rows.c.counts).where(rows.c.process == process)).scalar()
            if folded is None and is_new:
                connection.execute(insert(rows).values(process=process, **facts))
                return None
        return {} if folded is None else _read(folded)

    @whole_transaction
    def fold(self, idle_seconds: float, keep_seconds: float) -> int:
        """See `MetricsStore.fold`. Whoever holds the row of the totals is the only one that folds."""
        idle = and_(rows.c.state == RUNNING, rows.c.stored_at < db_now() - idle_seconds)
        gone = and_(rows.c.process != TOTALS, or_(rows.c.state == ENDED, idle))
        forgotten = and_(rows.c.state == FOLDED, rows.c.stored_at < db_now() - keep_seconds)
        with translated_errors(self._engine):
            with self._engine.connect().execution_options(**READ_ONLY) as connection:
                if connection.execute(select(rows.c.process).where(or_(gone, forgotten)).limit(1)).first() is None:
                    return 0
            with (
                suppress(IntegrityError),
                self._engine.begin() as connection,
            ):  # another one has just made the row of the totals
                totals = _lock_totals(connection)
                query = select(rows).where(gone).order_by(rows.c.process).limit(FOLDED_AT_ONCE).with_for_update()
                found = connection.execute(query).mappings().all()
                whole = add_counts([totals, *(_read(row["counts"]) for row in found)])
                _set(connection, [TOTALS], counts=_write(whole), stored_at=db_now())
                _set(connection, [row["process"] for row in found if row["state"] == RUNNING], state=FOLDED)
                ended = [row["process"] for row in found if row["state"] == ENDED]
                connection.execute(delete(rows).where(or_(rows.c.process.in_(ended), forgotten)))
                return len(found)
        return 0

    def read(self) -> Counts:
        """See `MetricsStore.read`. One statement, so no row is seen both by itself and in the totals."""
        query = select(rows.c.counts).where(rows.c.state != FOLDED)
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            return add_counts(_read(counts) for counts in connection.execute(query).scalars())


def _lock_totals(connection: Connection) -> Counts:
    query = select(rows.c.counts).where(rows.c.process == TOTALS).with_for_update()
    counts = connection.execute(query).scalar()
    if counts is not None:
        return _read(counts)
    connection.execute(insert(rows).values(process=TOTALS, state=RUNNING, stored_at=db_now(), counts=_write({})))
    return {}


def _set(connection: Connection, processes: list[str], **values: Any) -> None:
    if processes:
        connection.execute(update(rows).where(rows.c.process.in_(processes)).values(**values))


def _write(counts: Counts) -> str:
    return json.dumps(dict(counts), separators=(",", ":"))


def _read(counts: str) -> dict[str, float]:
    found: dict[str, float] = json.loads(counts)
    return found
