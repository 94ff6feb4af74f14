"""The background programs: worker, beat and Flower."""

from __future__ import annotations

import time

import structlog

from ncr_upload.domain.errors import Unavailable
from ncr_upload.entrypoints import bootstrap
from ncr_upload.entrypoints.logs import set_up_logs
from ncr_upload.entrypoints.settings import Settings

log = structlog.get_logger("ncr.programs")
DATABASE_WAIT_SECONDS = 3.0


def run_worker(settings: Settings, concurrency: int | None) -> None:
    """Until told to stop: SIGTERM finishes the running jobs first."""
    set_up_logs(settings)
    _wait_for_tables(settings)
    from ncr_upload.entrypoints.worker import app

    arguments = ["worker", "--pool=prefork", f"--loglevel={settings.log_level}", "--events", "--without-gossip", "--without-mingle"]
    app.worker_main([*arguments, f"--concurrency={concurrency}"] if concurrency else arguments)


def run_beat(settings: Settings) -> None:
    """Until told to stop."""
    set_up_logs(settings)
    _wait_for_tables(settings)
    from ncr_upload.entrypoints.worker import SweepScheduler, app

    app.Beat(scheduler_cls=SweepScheduler, loglevel=settings.log_level, quiet=True).run()


def run_flower(settings: Settings) -> None:
    """Until told to stop."""
    set_up_logs(settings)
    app = bootstrap.make_celery(settings)
    address = settings.flower_host or ("0.0.0.0" if settings.flower_basic_auth else "127.0.0.1")  # noqa: S104
    arguments = ["flower", f"--address={address}", f"--port={settings.flower_port}"]
    if settings.flower_basic_auth is not None:
        arguments.append(f"--basic-auth={settings.flower_basic_auth.get_secret_value()}")
    log.info("flower_starts", address=address, port=settings.flower_port)
    app.start(arguments)


def _wait_for_tables(settings: Settings) -> None:
    """Nothing can be done without the ledger: wait for its database, saying so."""
    while settings.migrate_on_start:
        try:
            before, after = bootstrap.upgrade_database(settings)
        except Unavailable as error:
            log.warning("waiting_for_database", reason=error.message, next_step=error.next_step)
            time.sleep(DATABASE_WAIT_SECONDS)
        else:
            if before != after:
                log.info("database_upgraded", before=before, after=after)
            return
