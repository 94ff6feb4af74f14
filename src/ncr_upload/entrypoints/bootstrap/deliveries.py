"""The worker: everything an attempt touches."""

from __future__ import annotations

from zoneinfo import ZoneInfo

from pydantic import SecretStr
from sqlalchemy import Engine

from ncr_upload.adapters.host import MachineHost
from ncr_upload.adapters.http_validator import HttpValidator
from ncr_upload.adapters.object_store import S3ObjectStore
from ncr_upload.adapters.sftp_dropoff import WAIT_SECONDS, Limits, SftpDropoff, SftpLogin
from ncr_upload.adapters.sql.catalogue import SqlCatalogue
from ncr_upload.adapters.sql.claims import SqlClaims
from ncr_upload.adapters.sql.cleaning import SqlCleaning
from ncr_upload.adapters.sql.own_statements import OwnCatalogue, load_statements
from ncr_upload.adapters.sql.parking import SqlDuties, SqlParking
from ncr_upload.adapters.sql.sharing import SqlSharing
from ncr_upload.adapters.sql.submissions import SqlSubmissions
from ncr_upload.adapters.zip_archive import ZipArchiver
from ncr_upload.application.attempts import WorkerOptions, WorkerPorts
from ncr_upload.application.janitor import JanitorOptions
from ncr_upload.application.metrics import CountedClaims, CountedStore, MemoryMetrics, MetricsRecorder
from ncr_upload.application.parking import ParkingOptions
from ncr_upload.application.pipeline import PipelineOptions, PipelinePorts
from ncr_upload.domain.admission import AdmissionLimits
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.retries import RetryLimits
from ncr_upload.entrypoints.bootstrap.records import PATIENT_SECONDS, make_board, make_engine
from ncr_upload.entrypoints.secrets import make_redactor
from ncr_upload.entrypoints.settings import Settings


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
    if settings.catalogue_sql is not None:
        try:
            load_statements(settings.catalogue_sql)
        except Unavailable as error:
            raise SettingsMissing(str(error)) from error
    if missing:
        raise SettingsMissing(f"not set: {'; '.join(missing)}. Set them in the environment or in .env (see env_sample).")


def make_worker_ports(settings: Settings, recorder: MetricsRecorder | None = None) -> WorkerPorts:
    """For one worker process, after its fork."""
    recorder = recorder or MetricsRecorder(MemoryMetrics())
    engine = make_engine(settings, pool_size=3, wait_seconds=PATIENT_SECONDS)
    pipeline = PipelinePorts(
        claims=CountedClaims(SqlClaims(engine), recorder),
        cleaning=SqlCleaning(engine),
        parking=SqlParking(engine),
        catalogue=make_catalogue(settings, engine),
        store=CountedStore(make_store(settings), recorder),
        archiver=ZipArchiver(),
        validator=make_validator(settings),
        dropoff=make_dropoff(settings, engine),
        host=MachineHost(),
    )
    submissions = SqlSubmissions(engine, max_attempts=settings.max_attempts)
    return WorkerPorts(pipeline, SqlDuties(engine), submissions, make_board(settings))


def make_catalogue(settings: Settings, engine: Engine) -> SqlCatalogue:
    """Raises `Unavailable` when CATALOGUE_SQL cannot be used."""
    zone = ZoneInfo(settings.timezone)
    if settings.catalogue_sql is None:
        return SqlCatalogue(engine, zone)
    return OwnCatalogue(engine, zone, load_statements(settings.catalogue_sql))


def make_worker_options(settings: Settings, name: str) -> WorkerOptions:
    return WorkerOptions(
        name=name,
        lease_seconds=settings.lease_seconds,
        lease_renew_seconds=settings.lease_renew_seconds,
        retry_limits=RetryLimits(settings.max_attempts, settings.retry_base_seconds, settings.retry_max_seconds),
        parking=ParkingOptions(settings.probe_seconds, settings.park_hours * 3600),
        janitor=JanitorOptions(settings.janitor_seconds, settings.staging_keep_hours * 3600, settings.idempotency_hours * 3600),
        pipeline=PipelineOptions(
            work_dir=settings.work_dir,
            file_selection=settings.file_selection,
            layout_collisions=settings.layout_collisions,
            download_concurrency=settings.download_concurrency,
            stage_before_verdict=settings.stage_before_verdict,
            admission=make_limits(settings),
            download_cache_bytes=settings.download_cache_bytes,
        ),
    )


def make_limits(settings: Settings) -> AdmissionLimits:
    return AdmissionLimits(settings.max_memory_usage_percent)


def make_host() -> MachineHost:
    return MachineHost()


def make_store(settings: Settings) -> S3ObjectStore:
    return S3ObjectStore(
        endpoint=settings.wasabi_endpoint or "",
        region=settings.wasabi_region,
        access_key=_open(settings.wasabi_access_key),
        secret_key=_open(settings.wasabi_secret_key),
        bucket=settings.bucket_name or "",
        verify_etag_md5=settings.verify_etag_md5,
        redactor=make_redactor(settings),
        redirect_hosts=settings.s3_redirect_hosts,
    )


def make_validator(settings: Settings) -> HttpValidator:
    return HttpValidator(
        url=settings.validator_api_url or "",
        api_key=_open(settings.validator_api_key),
        key_header=settings.validator_api_key_header,
        timeout_seconds=settings.validator_timeout_seconds,
        redactor=make_redactor(settings),
    )


def make_dropoff(settings: Settings, engine: Engine | None = None, wait_seconds: float = WAIT_SECONDS) -> SftpDropoff:
    """`engine` is opened for the limits of all workers, if any are set and none is given. A session waits so long for one of
    SFTP_MAX_CONNECTIONS."""
    limits = None
    if settings.sftp_max_connections or settings.sftp_max_bytes_per_second:
        sharing = SqlSharing(engine or make_engine(settings, pool_size=1))
        limits = Limits(sharing, settings.sftp_max_connections, settings.sftp_max_bytes_per_second, wait_seconds)
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
        login,
        base_dir=settings.sftp_base_dir,
        connections=settings.sftp_connections,
        channels=settings.sftp_channels,
        timeout_seconds=settings.sftp_timeout_seconds,
        limits=limits,
        fast_transport=settings.sftp_fast_transport == "auto",
    )


def _open(secret: SecretStr | None) -> str:
    return secret.get_secret_value() if secret is not None else ""
