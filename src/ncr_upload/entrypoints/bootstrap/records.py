"""What every program needs: the database, Redis, the queue; and the sweeper, which needs nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

import structlog
from celery import Celery
from sqlalchemy import Engine, select

from ncr_upload.adapters import celery_queue
from ncr_upload.adapters.host import MachineHost
from ncr_upload.adapters.redis_status import RedisStatusBoard
from ncr_upload.adapters.sql.backup import Restored, restore_backup, write_backup
from ncr_upload.adapters.sql.cleaning import SqlCleaning
from ncr_upload.adapters.sql.engine import READ_ONLY, WAIT_SECONDS, Tls, open_engine, translated_errors
from ncr_upload.adapters.sql.history import SqlHistory
from ncr_upload.adapters.sql.metrics import SqlMetrics
from ncr_upload.adapters.sql.own_statements import check_statements, load_statements, tables_in_use
from ncr_upload.adapters.sql.parking import SqlDuties, SqlParking
from ncr_upload.adapters.sql.recovery import SqlRecovery
from ncr_upload.adapters.sql.schema import check_own_tables, check_studio_tables
from ncr_upload.adapters.sql.statistics import SqlStatistics
from ncr_upload.adapters.sql.submissions import SqlSubmissions
from ncr_upload.adapters.sql.workers import SqlWorkerReports
from ncr_upload.application.download_cache import DownloadCache
from ncr_upload.application.metrics import OnEnded, ignore_end
from ncr_upload.application.recovery import ReleaseLimits, SweepPorts
from ncr_upload.application.workspace import sweep_workspaces
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import Status
from ncr_upload.entrypoints.secrets import make_redactor
from ncr_upload.entrypoints.settings import Settings
from ncr_upload.migrations.apply import LOCK_SECONDS, current_revision, downgrade, newest_revision, upgrade

log = structlog.get_logger("ncr.bootstrap")
DATABASE_WAIT_SECONDS = 3.0
MIGRATION_SECONDS = 3600.0
PATIENT_SECONDS = 8.0
"""How long background programs wait for a lock: nobody waits for their answer, and a lease outlasts it."""


def make_engine(settings: Settings, *, pool_size: int = 5, wait_seconds: float = WAIT_SECONDS) -> Engine:
    """Connections of this process: call it after a fork, never before."""
    url = settings.resolved_database_url()
    return open_engine(
        url,
        pool_size=pool_size,
        wait_seconds=wait_seconds,
        tls=_tls(settings),
        redactor=make_redactor(settings),
        zone=settings.timezone,
    )


def _tls(settings: Settings) -> Tls:
    return Tls(settings.db_ssl_mode, settings.db_ssl_ca, settings.db_ssl_cert, settings.db_ssl_key)


@contextmanager
def _migrating(settings: Settings) -> Iterator[Engine]:
    """Waits for another process that migrates, and for an index that takes its time."""
    url = settings.resolved_database_url()
    engine = open_engine(
        url,
        pool_size=2,
        wait_seconds=LOCK_SECONDS,
        statement_seconds=MIGRATION_SECONDS,
        tls=_tls(settings),
        redactor=make_redactor(settings),
    )
    try:
        with translated_errors(engine):
            yield engine
    finally:
        engine.dispose()


def upgrade_database(settings: Settings) -> tuple[str | None, str]:
    """Bring the service's own tables to this release: the revisions before and after. Raises `Unavailable`."""
    with _migrating(settings) as engine:
        return upgrade(engine)


def downgrade_database(settings: Settings, to: str) -> tuple[str | None, str | None]:
    """See `apply.downgrade`. Raises `Unavailable` too."""
    with _migrating(settings) as engine:
        return downgrade(engine, to)


def read_revisions(settings: Settings) -> tuple[str | None, str]:
    """The revision the database is at and the one this release needs. Raises `Unavailable`."""
    with _migrating(settings) as engine:
        return current_revision(engine), newest_revision()


def backup_ledger(settings: Settings, to: IO[bytes]) -> int:
    """See `write_backup`. Raises `Unavailable`."""
    with _migrating(settings) as engine:
        return write_backup(engine, to, current_revision(engine))


def restore_ledger(settings: Settings, source: IO[bytes]) -> Restored:
    """See `restore_backup`. Raises `DeliveryError`."""
    with _migrating(settings) as engine:
        return restore_backup(engine, source, current_revision(engine))


def wait_for_tables(settings: Settings) -> None:
    """Bring the service's own tables to this release (MIGRATE_ON_START), waiting for the database and saying so as long as
    it is away; then tell of tables and columns that are missing."""
    if settings.migrate_on_start:
        _upgrade_when_there(settings)
    tell_missing_tables(settings)


def tell_missing_tables(settings: Settings) -> None:
    """Write what is missing to the log."""
    try:
        check_database_tables(settings)
    except Unavailable as error:
        log.error("tables_not_ready", code=error.code, reason=error.message, next_step=error.next_step)


def check_database_tables(settings: Settings) -> None:
    """See `check_tables`."""
    engine = make_engine(settings, pool_size=1)
    try:
        check_tables(engine, settings)
    finally:
        engine.dispose()


def _upgrade_when_there(settings: Settings) -> None:
    while True:
        try:
            if not _needs_upgrade(settings):
                return
            before, after = upgrade_database(settings)
        except Unavailable as error:
            log.warning("waiting_for_database", reason=error.message, next_step=error.next_step)
            time.sleep(DATABASE_WAIT_SECONDS)
        else:
            if before != after:
                log.info("database_upgraded", before=before, after=after)
            return


def _needs_upgrade(settings: Settings) -> bool:
    """Asked without the migration's patience: a database that is away, or locked, is to be told of soon."""
    engine = make_engine(settings, pool_size=1)
    try:
        with translated_errors(engine):
            revision = current_revision(engine)
    finally:
        engine.dispose()
    return revision is None or revision < newest_revision()


def check_database(engine: Engine) -> None:
    """Raises `Unavailable` when the database does not answer."""
    with translated_errors(engine), engine.connect().execution_options(**READ_ONLY) as connection:
        connection.execute(select(1))


def check_tables(engine: Engine, settings: Settings) -> None:
    """Raises `Unavailable` naming the tables and columns, the service's own or the studio's, that are missing, or what is wrong
    with CATALOGUE_SQL."""
    check_own_tables(engine)
    check_studio(engine, settings)


def check_studio(engine: Engine, settings: Settings) -> None:
    """The studio's part of `check_tables`."""
    if settings.catalogue_sql is None:
        check_studio_tables(engine)
        return
    statements = load_statements(settings.catalogue_sql)
    check_studio_tables(engine, tables_in_use(statements))
    check_statements(engine, settings.catalogue_sql, statements)


def make_celery(settings: Settings) -> Celery:
    """The Celery application of whoever rings or answers the doorbell."""
    return celery_queue.make_app(
        settings.redis_url(),
        concurrency=settings.celery_worker_concurrency,
        max_tasks_per_child=settings.celery_worker_max_tasks_per_child,
        max_memory_per_child_kb=settings.celery_worker_max_memory_per_child,
    )


def make_queue(settings: Settings, app: Celery) -> celery_queue.CeleryQueue:
    return celery_queue.CeleryQueue(app, _redis_place(settings), make_redactor(settings))


def make_board(settings: Settings) -> RedisStatusBoard:
    return RedisStatusBoard(
        settings.redis_url(),
        _redis_place(settings),
        final_seconds=settings.job_expire_hours * 3600,
        redactor=make_redactor(settings),
    )


@contextmanager
def open_reports(settings: Settings) -> Iterator[SqlWorkerReports]:
    """For a word now and then: connects anew, and keeps nothing open."""
    engine = make_engine(settings, pool_size=1)
    try:
        yield SqlWorkerReports(engine)
    finally:
        engine.dispose()


def make_release_limits(settings: Settings) -> ReleaseLimits:
    return ReleaseLimits(settings.batch_size, settings.memory_check_interval)


def make_history(settings: Settings) -> SqlHistory:
    return SqlHistory(make_engine(settings, pool_size=1, wait_seconds=PATIENT_SECONDS))


def make_statistics(settings: Settings) -> SqlStatistics:
    return SqlStatistics(make_engine(settings, pool_size=1, wait_seconds=PATIENT_SECONDS))


def make_metrics(settings: Settings) -> SqlMetrics:
    """Not patient: a process that ends stores its counts, or goes without."""
    return SqlMetrics(make_engine(settings, pool_size=1))


def make_sweep_ports(settings: Settings, app: Celery, on_ended: OnEnded = ignore_end) -> SweepPorts:
    """`on_ended` is told of the jobs that the sweep gives up."""
    engine = make_engine(settings, pool_size=2, wait_seconds=PATIENT_SECONDS)
    return SweepPorts(
        recovery=SqlRecovery(engine, on_ended),
        cleaning=SqlCleaning(engine),
        parking=SqlParking(engine),
        duties=SqlDuties(engine),
        submissions=SqlSubmissions(engine, max_attempts=settings.max_attempts),
        queue=make_queue(settings, app),
        board=make_board(settings),
        reports=SqlWorkerReports(engine),
    )


def sweep_work_dir(settings: Settings) -> list[str]:
    """Remove the workspaces on this host that no task needs any more; their names. Raises `Unavailable`."""

    def find_statuses(task_ids: Sequence[str]) -> dict[str, Status]:
        engine = make_engine(settings, pool_size=1, wait_seconds=PATIENT_SECONDS)
        try:
            return SqlCleaning(engine).find_statuses(task_ids)
        finally:
            engine.dispose()  # no connection is open when the worker forks its next child

    return sweep_workspaces(settings.work_dir, find_statuses, make_cache(settings))


def make_cache(settings: Settings) -> DownloadCache:
    return DownloadCache(settings.work_dir, settings.download_cache_bytes, MachineHost())


def _redis_place(settings: Settings) -> str:
    return f"{settings.redis_host}:{settings.redis_port}"
