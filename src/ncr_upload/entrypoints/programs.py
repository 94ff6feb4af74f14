"""The background programs: worker, beat and Flower."""

from __future__ import annotations

import os

import structlog

from ncr_upload.entrypoints.bootstrap.records import make_celery, wait_for_tables
from ncr_upload.entrypoints.bundled_validator import BundledValidator
from ncr_upload.entrypoints.logs import set_up_logs
from ncr_upload.entrypoints.settings import Settings, load_settings

log = structlog.get_logger("ncr.programs")


def run_worker(settings: Settings, concurrency: int | None) -> None:
    """Until told to stop: SIGTERM finishes the running jobs first."""
    set_up_logs(settings)
    wait_for_tables(settings)
    if settings.validator_api_url is None:
        os.environ.update(BundledValidator().start())
        load_settings.cache_clear()
    from ncr_upload.entrypoints.worker import app

    arguments = [
        "worker",
        "--pool=prefork",
        f"--loglevel={settings.log_level}",
        "--events",
        "--without-gossip",
        "--without-mingle",
    ]
    app.worker_main([*arguments, f"--concurrency={concurrency}"] if concurrency else arguments)


def run_beat(settings: Settings) -> None:
    """Until told to stop."""
    set_up_logs(settings)
    wait_for_tables(settings)
    from ncr_upload.entrypoints.beat import SweepScheduler, app

    app.Beat(scheduler_cls=SweepScheduler, loglevel=settings.log_level, quiet=True).run()


def run_flower(settings: Settings) -> None:
    """Until told to stop."""
    set_up_logs(settings)
    app = make_celery(settings)
    address = settings.flower_host or ("0.0.0.0" if settings.flower_basic_auth else "127.0.0.1")  # noqa: S104
    arguments = ["flower", f"--address={address}", f"--port={settings.flower_port}"]
    if settings.flower_basic_auth is not None:
        arguments.append(f"--basic-auth={settings.flower_basic_auth.get_secret_value()}")
    log.info("flower_starts", address=address, port=settings.flower_port)
    app.start(arguments)
