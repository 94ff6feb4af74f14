"""Old history goes, a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, Engine, Select, delete, or_, select

from ncr_upload.adapters.sql.engine import READ_ONLY, translated_errors, whole_transaction
from ncr_upload.adapters.sql.rows import read_now
from ncr_upload.adapters.sql.tables import batches, conflicts, events, files, idempotency, jobs


class SqlHistory:
    """`History` on SQL."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @whole_transaction
    def prune(self, keep_seconds: float, limit: int) -> int:
        """See `History.prune`. A batch goes before its jobs, and a key before the tasks it leads to, so that neither is
        ever seen with a part of them."""
        with translated_errors(self._engine):
            with self._engine.connect().execution_options(**READ_ONLY) as connection:
                before = read_now(connection) - keep_seconds
                keys = connection.execute(_old_keys(before).limit(limit)).scalars().all()
                batch_ids = connection.execute(_old_batches(before).limit(limit)).scalars().all()
                task_ids = [] if len(keys) == limit else connection.execute(_old_tasks(before).limit(limit)).scalars().all()
            if not (keys or batch_ids or task_ids):
                return 0
            with self._engine.begin() as connection:
                _forget(connection, keys, batch_ids, task_ids)
        return len(task_ids)


def _forget(connection: Connection, keys: Sequence[str], batch_ids: Sequence[str], task_ids: Sequence[str]) -> None:
    if keys:
        connection.execute(delete(idempotency).where(idempotency.c.idempotency_key.in_(keys)))
    if batch_ids:
        for table in (conflicts, batches):
            connection.execute(delete(table).where(table.c.batch_id.in_(batch_ids)))
    if task_ids:
        for owned in (events, files, jobs):
            connection.execute(delete(owned).where(owned.c.task_id.in_(task_ids)))


def _old_keys(before: float) -> Select[str]:
    return select(idempotency.c.idempotency_key).where(idempotency.c.created_at < before).order_by(idempotency.c.created_at)


def _old_batches(before: float) -> Select[str]:
    """Batches whose every job ended before then."""
    younger = or_(jobs.c.finished_at.is_(None), jobs.c.finished_at >= before)
    kept = select(jobs.c.id).where(jobs.c.batch_id == batches.c.batch_id, younger).exists()
    return select(batches.c.batch_id).where(batches.c.created_at < before, ~kept).order_by(batches.c.created_at)


def _old_tasks(before: float) -> Select[str]:
    """Tasks that ended before then, left nothing at the destination and whose batch, if any, is gone."""
    clean = (jobs.c.staging_due_at + 0).is_(None)  # said so that SQLite does not search by it: nearly all tasks are clean
    in_batch = select(batches.c.batch_id).where(batches.c.batch_id == jobs.c.batch_id).exists()
    return (
        select(jobs.c.task_id)
        .where(jobs.c.finished_at < before, clean, or_(jobs.c.batch_id.is_(None), ~in_batch))
        .order_by(jobs.c.finished_at)
    )
