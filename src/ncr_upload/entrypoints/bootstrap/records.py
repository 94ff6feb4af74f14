"""What every program needs: the database, Redis, the queue; and the sweeper, which needs nothing else."""

from __future__ import annotations

import time

import structlog
from celery import Celery
from sqlalchemy import Engine, select

from ncr_upload.adapters import celery_queue
from ncr_upload.adapters.redis_status import RedisStatusBoard
from ncr_upload.adapters.sql.cleaning import SqlCleaning
from ncr_upload.adapters.sql.engine import READ_ONLY, WAIT_SECONDS, open_engine, translated_errors
from ncr_upload.adapters.sql.recovery import SqlRecovery
from ncr_upload.adapters.sql.submissions import SqlSubmissions
from ncr_upload.application.recovery import SweepPorts
from ncr_upload.domain.errors import Unavailable
from ncr_upload.entrypoints.settings import Settings
from ncr_upload.migrations.apply import upgrade

log = structlog.get_logger("ncr.bootstrap")
DATABASE_WAIT_SECONDS = 3.0
PATIENT_SECONDS = 8.0
"""How long background programs wait for a lock: nobody waits for their answer, and a lease outlasts it."""


def make_engine(settings: Settings, *, pool_size: int = 5, wait_seconds: float = WAIT_SECONDS) -> Engine:
    """Connections of this process: call it after a fork, never before."""
    return open_engine(settings.resolved_database_url(), pool_size=pool_size, wait_seconds=wait_seconds)


def upgrade_database(settings: Settings) -> tuple[str | None, str]:
    """Bring the service's own tables to this release: the revisions before and after. Raises `Unavailable`."""
    engine = make_engine(settings, pool_size=1)
    try:
        with translated_errors(engine):
            return upgrade(engine)
    finally:
        engine.dispose()


def wait_for_tables(settings: Settings) -> None:
    """Bring the service's own tables to this release, waiting for the database and saying so as long as it is away."""
    while settings.migrate_on_start:
        try:
            before, after = upgrade_database(settings)
        except Unavailable as error:
            log.warning("waiting_for_database", reason=error.message, next_step=error.next_step)
            time.sleep(DATABASE_WAIT_SECONDS)
        else:
            if before != after:
                log.info("database_upgraded", before=before, after=after)
            return


def check_database(engine: Engine) -> None:
    """Raises `Unavailable` when the database does not answer."""
    with translated_errors(engine), engine.connect().execution_options(**READ_ONLY) as connection:
        connection.execute(select(1))


def make_celery(settings: Settings) -> Celery:
    """The Celery application of whoever rings or answers the doorbell."""
    return celery_queue.make_app(
        settings.redis_url(),
        concurrency=settings.celery_worker_concurrency,
        max_tasks_per_child=settings.celery_worker_max_tasks_per_child,
        max_memory_per_child_kb=settings.celery_worker_max_memory_per_child,
    )


def make_queue(settings: Settings, app: Celery) -> celery_queue.CeleryQueue:
    return celery_queue.CeleryQueue(app, _redis_place(settings))


def make_board(settings: Settings) -> RedisStatusBoard:
    return RedisStatusBoard(settings.redis_url(), _redis_place(settings), final_seconds=settings.job_expire_hours * 3600)


def make_sweep_ports(settings: Settings, app: Celery) -> SweepPorts:
    engine = make_engine(settings, pool_size=2, wait_seconds=PATIENT_SECONDS)
    return SweepPorts(
        recovery=SqlRecovery(engine),
        cleaning=SqlCleaning(engine),
        submissions=SqlSubmissions(engine, max_attempts=settings.max_attempts),
        queue=make_queue(settings, app),
        board=make_board(settings),
    )


def _redis_place(settings: Settings) -> str:
    return f"{settings.redis_host}:{settings.redis_port}"
