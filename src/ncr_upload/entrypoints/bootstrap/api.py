"""The API. The libraries that only `/health?deep=true` needs are loaded when it is first asked."""

from __future__ import annotations

import os
import threading
from contextlib import suppress

from fastapi import FastAPI
from sqlalchemy import Engine

from ncr_upload.adapters import celery_queue
from ncr_upload.adapters.host import MachineHost
from ncr_upload.adapters.sql.metrics import SqlMetrics
from ncr_upload.adapters.sql.parking import SqlParking
from ncr_upload.adapters.sql.recovery import SqlRecovery
from ncr_upload.adapters.sql.statistics import SqlStatistics
from ncr_upload.adapters.sql.submissions import SqlSubmissions
from ncr_upload.adapters.sql.workers import SqlWorkerReports
from ncr_upload.application.api_ports import ApiPorts, Probe
from ncr_upload.application.lanes import Lanes
from ncr_upload.application.metrics import MetricsRecorder
from ncr_upload.application.parking import require_open
from ncr_upload.domain.errors import Deferred
from ncr_upload.entrypoints.api.app import create_app
from ncr_upload.entrypoints.bootstrap.records import (
    check_database,
    check_tables,
    make_board,
    make_celery,
    make_engine,
    make_queue,
    wait_for_tables,
)
from ncr_upload.entrypoints.crash import crash_points
from ncr_upload.entrypoints.logs import set_up_logs
from ncr_upload.entrypoints.settings import Settings, load_settings

CANCELS_FLUSH_SECONDS = 0.5
"""The API counts only the jobs that are cancelled before a worker has them. They are few, so their counts are stored soon."""


def make_api() -> FastAPI:
    """The API, for uvicorn. It starts, and says what is wrong, even while its database is away."""
    settings = load_settings()
    set_up_logs(settings)
    engine = make_engine(settings, pool_size=12)
    metrics = SqlMetrics(engine)
    recorder = MetricsRecorder(metrics, CANCELS_FLUSH_SECONDS)
    ports = ApiPorts(
        ledger=SqlSubmissions(engine, max_attempts=settings.max_attempts, on_ended=recorder.job_ended),
        recovery=SqlRecovery(engine),
        board=make_board(settings),
        queue=make_queue(settings, make_celery(settings)),
        host=MachineHost(),
        queue_name=celery_queue.QUEUE,
        check_database=lambda: check_database(engine),
        deep_probes={"tables": lambda: check_tables(engine, settings)} | _make_probes(settings, engine),
        reports=SqlWorkerReports(engine),
        statistics=SqlStatistics(engine),
        metrics=metrics,
        lanes=Lanes(submit_threads=1 if engine.dialect.name == "sqlite" else 4),
    )
    threading.Thread(target=wait_for_tables, args=(settings,), name="tables", daemon=True).start()
    return create_app(ports, settings, crash_points(os.environ))


def _make_probes(settings: Settings, engine: Engine) -> dict[str, Probe]:
    """The outside parts that are set; the API itself needs none of them."""
    found: dict[str, Probe] = {}
    if settings.wasabi_endpoint and settings.bucket_name:
        found["s3"] = lambda: _load_probe("s3", settings)()
    if settings.sftp_host:
        found["sftp"] = lambda: _probe_destination(settings, engine)
    if settings.validator_api_url:
        found["validator"] = lambda: _load_probe("validator", settings)()
    return found


def _load_probe(part: str, settings: Settings) -> Probe:
    from ncr_upload.entrypoints import probes
    from ncr_upload.entrypoints.bootstrap import deliveries

    match part:
        case "s3":
            return probes.probe_store(deliveries.make_store(settings))
        case _:
            return probes.probe_validator(settings.validator_api_url or "")


def _probe_destination(settings: Settings, engine: Engine) -> None:
    """A parked destination is not asked: its record says more. One whose connections workers are using needs no probe."""
    from ncr_upload.entrypoints import probes
    from ncr_upload.entrypoints.bootstrap import deliveries

    dropoff = deliveries.make_dropoff(settings, engine, wait_seconds=0)
    require_open(SqlParking(engine), dropoff.destination)
    with suppress(Deferred):
        probes.probe_dropoff(dropoff)()
