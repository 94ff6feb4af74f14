"""Builds the programs from the settings: the only place that chooses adapters."""

from __future__ import annotations

import threading
import time
from zoneinfo import ZoneInfo

import structlog
from celery import Celery
from fastapi import FastAPI
from pydantic import SecretStr
from sqlalchemy import Engine, select

from ncr_upload.adapters import celery_queue
from ncr_upload.adapters.host import MachineHost
from ncr_upload.adapters.http_validator import HttpValidator
from ncr_upload.adapters.object_store import S3ObjectStore
from ncr_upload.adapters.redis_status import RedisStatusBoard
from ncr_upload.adapters.sftp_dropoff import SftpDropoff, SftpLogin
from ncr_upload.adapters.sql.catalogue import SqlCatalogue
from ncr_upload.adapters.sql.claims import SqlClaims
from ncr_upload.adapters.sql.engine import open_engine, translated_errors
from ncr_upload.adapters.sql.recovery import SqlRecovery
from ncr_upload.adapters.sql.submissions import SqlSubmissions
from ncr_upload.adapters.zip_archive import ZipArchiver
from ncr_upload.application.api_ports import ApiPorts, Probe
from ncr_upload.application.attempts import WorkerOptions, WorkerPorts
from ncr_upload.application.lanes import Lanes
from ncr_upload.application.pipeline import PipelineOptions, PipelinePorts
from ncr_upload.application.recovery import SweepPorts
from ncr_upload.domain.admission import AdmissionLimits
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.retries import RetryLimits
from ncr_upload.entrypoints import probes
from ncr_upload.entrypoints.api.app import create_app
from ncr_upload.entrypoints.logs import set_up_logs
from ncr_upload.entrypoints.settings import Settings, load_settings
from ncr_upload.migrations.apply import upgrade

log = structlog.get_logger("ncr.bootstrap")
DATABASE_WAIT_SECONDS = 3.0


class SettingsMissing(Exception):
    """Settings a program cannot do without; the message names them."""


def require_worker_settings(settings: Settings) -> None:
    """Raises `SettingsMissing` naming every setting a worker lacks."""
    missing = [
        name.upper()
        for name in ("wasabi_endpoint", "wasabi_access_key", "wasabi_secret_key", "bucket_name", "sftp_host", "sftp_username")
        if getattr(settings, name) is None
    ]
    if settings.sftp_host_key is None and settings.sftp_known_hosts is None:
        missing.append("SFTP_HOST_KEY or SFTP_KNOWN_HOSTS")
    if settings.sftp_password is None and settings.sftp_private_key is None and not settings.sftp_agent:
        missing.append("SFTP_PASSWORD, SFTP_PRIVATE_KEY or SFTP_AGENT")
    if settings.validator_api_url is not None and settings.validator_api_key is None:
        missing.append("VALIDATOR_API_KEY")
    if missing:
        raise SettingsMissing(f"not set: {'; '.join(missing)}. Set them in the environment or in .env (see env_sample).")


def make_engine(settings: Settings, *, pool_size: int = 5) -> Engine:
    """Connections of this process: call it after a fork, never before."""
    return open_engine(settings.resolved_database_url(), pool_size=pool_size)


def upgrade_database(settings: Settings) -> tuple[str | None, str]:
    """Bring the service's own tables to this release: the revisions before and after. Raises `Unavailable`."""
    engine = make_engine(settings, pool_size=1)
    try:
        with translated_errors(engine):
            return upgrade(engine)
    finally:
        engine.dispose()


def check_database(engine: Engine) -> None:
    """Raises `Unavailable` when the database does not answer."""
    with translated_errors(engine), engine.connect() as connection:
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


def make_store(settings: Settings) -> S3ObjectStore:
    return S3ObjectStore(
        endpoint=settings.wasabi_endpoint or "",
        region=settings.wasabi_region,
        access_key=_open(settings.wasabi_access_key),
        secret_key=_open(settings.wasabi_secret_key),
        bucket=settings.bucket_name or "",
        verify_etag_md5=settings.verify_etag_md5,
    )


def make_validator(settings: Settings) -> HttpValidator:
    return HttpValidator(
        url=settings.validator_api_url or "",
        api_key=_open(settings.validator_api_key),
        key_header=settings.validator_api_key_header,
        timeout_seconds=settings.validator_timeout_seconds,
    )


def make_dropoff(settings: Settings) -> SftpDropoff:
    login = SftpLogin(
        host=settings.sftp_host or "",
        port=settings.sftp_port,
        username=settings.sftp_username or "",
        password=_open(settings.sftp_password) or None,
        private_key=settings.sftp_private_key,
        passphrase=_open(settings.sftp_private_key_passphrase) or None,
        agent=settings.sftp_agent,
        host_key=settings.sftp_host_key,
        known_hosts=settings.sftp_known_hosts,
    )
    return SftpDropoff(
        login, base_dir=settings.sftp_base_dir, channels=settings.sftp_channels, timeout_seconds=settings.sftp_timeout_seconds
    )


def make_worker_ports(settings: Settings) -> WorkerPorts:
    """For one worker process, after its fork."""
    engine = make_engine(settings, pool_size=2)
    pipeline = PipelinePorts(
        claims=SqlClaims(engine),
        catalogue=SqlCatalogue(engine, ZoneInfo(settings.timezone)),
        store=make_store(settings),
        archiver=ZipArchiver(),
        validator=make_validator(settings),
        dropoff=make_dropoff(settings),
        host=MachineHost(),
    )
    submissions = SqlSubmissions(engine, max_attempts=settings.max_attempts)
    return WorkerPorts(pipeline, submissions, make_board(settings))


def make_worker_options(settings: Settings, name: str) -> WorkerOptions:
    return WorkerOptions(
        name=name,
        lease_seconds=settings.lease_seconds,
        lease_renew_seconds=settings.lease_renew_seconds,
        retry_limits=RetryLimits(settings.max_attempts, settings.retry_base_seconds, settings.retry_max_seconds),
        park_seconds=settings.park_hours * 3600,
        pipeline=PipelineOptions(
            work_dir=settings.work_dir,
            file_selection=settings.file_selection,
            layout_collisions=settings.layout_collisions,
            download_concurrency=settings.download_concurrency,
            admission=AdmissionLimits(settings.max_memory_usage_percent),
        ),
    )


def make_sweep_ports(settings: Settings, app: Celery) -> SweepPorts:
    engine = make_engine(settings, pool_size=2)
    return SweepPorts(
        recovery=SqlRecovery(engine),
        submissions=SqlSubmissions(engine, max_attempts=settings.max_attempts),
        queue=make_queue(settings, app),
        board=make_board(settings),
    )


def make_api() -> FastAPI:
    """The API, for uvicorn. It starts, and says what is wrong, even while its database is away."""
    settings = load_settings()
    set_up_logs(settings)
    engine = make_engine(settings, pool_size=8)
    ports = ApiPorts(
        ledger=SqlSubmissions(engine, max_attempts=settings.max_attempts),
        board=make_board(settings),
        queue=make_queue(settings, make_celery(settings)),
        host=MachineHost(),
        queue_name=celery_queue.QUEUE,
        check_database=lambda: check_database(engine),
        deep_probes=_make_probes(settings),
        lanes=Lanes(submit_threads=1 if engine.dialect.name == "sqlite" else 4),
    )
    if settings.migrate_on_start:
        threading.Thread(target=wait_for_tables, args=(settings,), name="upgrade", daemon=True).start()
    return create_app(ports, settings)


def _make_probes(settings: Settings) -> dict[str, Probe]:
    """The outside parts that are set; the API itself needs none of them."""
    found: dict[str, Probe] = {}
    if settings.wasabi_endpoint and settings.bucket_name:
        found["s3"] = probes.probe_store(make_store(settings))
    if settings.sftp_host:
        found["sftp"] = probes.probe_dropoff(make_dropoff(settings))
    if settings.validator_api_url:
        found["validator"] = probes.probe_validator(settings.validator_api_url)
    return found


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


def _open(secret: SecretStr | None) -> str:
    return secret.get_secret_value() if secret is not None else ""


def _redis_place(settings: Settings) -> str:
    return f"{settings.redis_host}:{settings.redis_port}"
