"""Every setting of the service, read from the environment and from `.env`.

No secret has a default. `env_sample` is made from this class by `make docs`, descriptions included, and a test compares.
"""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from ncr_upload.domain.redirects import parse_allowed_host
from ncr_upload.domain.text import QUOTE, bound_line


class Anonymous(StrEnum):
    """Who may call the API without a key."""

    LOOPBACK = "loopback"
    ALL = "all"
    NONE = "none"


ESCAPES = "with %40 for an @, %2F for a /, %3F for a ?, %23 for a # and %25 for a %"
Port = Annotated[int, Field(ge=1, le=65535)]


class Settings(BaseSettings):
    """Settings by the names of their environment variables, in lower case."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore", hide_input_in_errors=True)

    # API
    api_host: str = "0.0.0.0"  # noqa: S104 - reachable from outside by design; see api_anonymous
    api_port: Port = 8001
    api_key: SecretStr | None = Field(
        None,
        description=(
            "Callers send it as the header X-API-Key. Without one, only callers on this machine are served (see API_ANONYMOUS)."
        ),
    )
    api_anonymous: Anonymous = Field(
        Anonymous.LOOPBACK,
        description="Who needs no key: loopback (callers on this machine), all, or none.",
    )
    api_reload: bool = Field(
        False,
        description="Restart when the code changes. `python main.py` always does; `ncr api` only with this.",
    )
    api_drain_seconds: float = Field(
        0,
        ge=0,
        description=(
            "After SIGTERM: how long the API goes on serving while /readyz already says 503, so that a load "
            "balancer can turn away."
        ),
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Web pages allowed to call the API from a browser, comma separated; none by default.",
    )

    # Redis
    redis_host: str = "localhost"
    redis_port: Port = 6380
    redis_db: int = 0
    redis_password: SecretStr | None = None
    redis_tls: bool = False

    # Database
    database_url: SecretStr | None = Field(
        None,
        description="Either one URL (mysql+pymysql://…, postgresql+psycopg://…, sqlite:///path) …",
    )
    db_type: Literal["sqlite", "mysql", "postgresql"] = Field(
        "sqlite",
        description=(
            "… or its parts. DB_TYPE is sqlite, mysql or postgresql; for sqlite DB_NAME is a file (default var/ncr.db)."
        ),
    )
    db_host: str = "localhost"
    db_port: Port | None = None
    db_name: str | None = None
    db_user: str | None = None
    db_password: SecretStr | None = None
    db_ssl_mode: Literal["disable", "prefer", "require", "verify-ca", "verify-full"] | None = Field(
        None,
        description=(
            "Encryption of the connection: disable, prefer, require (encrypted, but to whoever answers), "
            "verify-ca, or verify-full (the server's certificate must come from DB_SSL_CA and name DB_HOST). "
            "Unset: what the driver does and DATABASE_URL's query says."
        ),
    )
    db_ssl_ca: Path | None = Field(
        None,
        description=(
            "PEM files: the authority of the server's certificate, and this client's own certificate where the "
            "server asks for one."
        ),
    )
    db_ssl_cert: Path | None = Field(
        None, description="PEM file with this client's certificate, where the server asks for one."
    )
    db_ssl_key: Path | None = None
    catalogue_sql: Path | None = Field(
        None,
        description=(
            "A studio with other tables than the usual ones: a file with its own look-ups and recordings "
            "(docs/catalogue_sql.md)."
        ),
    )
    migrate_on_start: bool = Field(
        True,
        description="Bring the ncr_* tables up to date when a process starts (`ncr db upgrade` does it by hand).",
    )

    # Object storage
    wasabi_endpoint: str | None = None
    wasabi_region: str = "us-east-1"
    wasabi_access_key: SecretStr | None = None
    wasabi_secret_key: SecretStr | None = None
    bucket_name: str | None = None
    download_concurrency: int = Field(4, ge=1, le=64, description="Objects one job fetches at once.")
    verify_etag_md5: bool = Field(
        True,
        description=("Hold each download against its ETag where that is an MD5. Turn off for buckets encrypted with SSE-KMS."),
    )
    s3_redirect_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Further hosts that the storage may redirect to: host, host:port or *.host, comma separated."
    )

    # Validator
    validator_api_url: str | None = Field(None, description="Unset: each worker starts the bundled validator beside itself.")
    validator_api_key: SecretStr | None = None
    validator_api_key_header: str = "X-API-Key"
    validator_timeout_seconds: float = Field(300, gt=0)

    # Destination
    sftp_host: str | None = None
    sftp_port: Port = 22
    sftp_username: str | None = None
    sftp_password: SecretStr | None = Field(None, description="One of password, private key (a file) or agent.")
    sftp_private_key: Path | None = Field(None, description="File with the private key.")
    sftp_private_key_passphrase: SecretStr | None = None
    sftp_agent: bool = Field(False, description="Use the keys of the running ssh-agent.")
    sftp_host_key: str | None = Field(
        None,
        description=(
            "The server's public key, as `ssh-keyscan HOST` prints it after the name; several separated by "
            "commas. Or a known_hosts file. Nothing is sent to a server whose key is not pinned."
        ),
    )
    sftp_known_hosts: Path | None = Field(None, description="An OpenSSH known_hosts file, instead of SFTP_HOST_KEY.")
    sftp_base_dir: str = Field("/", description="Deliveries land at SFTP_BASE_DIR/{job_id}/{sku}/…")
    sftp_connections: int = Field(
        4,
        ge=1,
        le=16,
        description=(
            "SSH connections one job opens at most: several only to a server that takes 4 ms or more to answer, "
            "one for every 8 MB that wait. Files of 32 MB and more are sent through all of them at once."
        ),
    )
    sftp_channels: int = Field(
        4,
        ge=1,
        le=16,
        description="Channels in each connection; up to 64 files are open at once in each.",
    )
    sftp_max_connections: int = Field(
        0,
        ge=0,
        description=(
            "Limits for all workers on all hosts together, for one server, login and folder; 0 is none. A job "
            "that finds no connection free waits and spends no attempt; one job leaves one connection to the "
            "others."
        ),
    )
    sftp_max_bytes_per_second: int = Field(0, ge=0, description="To one destination, of all workers together; 0 is no limit.")
    sftp_timeout_seconds: float = Field(30, gt=0)
    sftp_fast_transport: Literal["auto", "off"] = Field(
        "auto",
        description=("auto: half the CPU time of an upload where asyncssh and the cipher are as tested (AES-GCM); off: never"),
    )

    stage_before_verdict: bool = Field(
        False,
        description=(
            "Upload while files arrive and the validator judges them, into a hidden folder that goes again on a "
            '"no": quicker (a large file over a WAN in half the time), but the partner\'s disk and line carry '
            "packages that are never delivered."
        ),
    )

    # Jobs
    work_dir: Path = Field(Path("var/work"), description="Where jobs keep their files while they run; removed afterwards.")
    download_cache_bytes: int = Field(
        5_000_000_000,
        ge=0,
        description=(
            "How many bytes of finished downloads stay there afterwards, so that a job that is delivered again "
            "fetches only what changed. They make way for whatever needs the disk, and never take more of it than"
            " they leave free. 0 keeps none: where WORK_DIR is in memory (tmpfs), or the artists' files must not "
            "stay on this host."
        ),
    )
    file_selection: Literal["latest_date", "latest_per_path", "all"] = Field(
        "latest_date",
        description="Which of a job's files: latest_date (those of the newest calendar date), latest_per_path, or all.",
    )
    layout_collisions: Literal["refuse", "newest"] = Field(
        "refuse",
        description="Two files for one place in the package: refuse the job, or let the newest win.",
    )
    timezone: str = Field("America/New_York", description="The studio's zone: its tables hold local times.")
    max_attempts: int = Field(
        5,
        ge=1,
        le=50,
        description="Attempts before a job fails; the wait between them doubles from base to max.",
    )
    retry_base_seconds: float = Field(5, gt=0)
    retry_max_seconds: float = Field(300, gt=0)
    park_hours: float = Field(
        24,
        gt=0,
        description=(
            "How long a job waits for a destination that needs an operator, or for room on the worker, before it fails."
        ),
    )
    probe_seconds: float = Field(
        30,
        gt=0,
        description="How often such a destination is asked, by one worker, whether it works again.",
    )
    janitor_seconds: float = Field(
        600,
        gt=0,
        description=(
            "How often one worker looks for what killed ones left behind, there and in the ledger. Staging "
            "folders of tasks that this installation does not know go when nothing in them has changed for so "
            "long: another one may deliver there too."
        ),
    )
    staging_keep_hours: float = Field(
        24, gt=0, description="Age from which staging of tasks that this ledger does not know is removed at the destination."
    )
    idempotency_hours: float = Field(168, gt=0, description="How long an Idempotency-Key is remembered.")
    lease_seconds: float = Field(
        20,
        gt=0,
        description=(
            "A worker that is not heard of for this long has lost its job to the next one; it says it is alive "
            "every so often, which is at most half of it."
        ),
    )
    lease_renew_seconds: float = Field(5, gt=0)
    sweep_seconds: float = Field(3, gt=0)
    worker_grace_seconds: float = Field(
        25,
        ge=0,
        description=(
            "How long a worker that is told to stop (SIGTERM) lets its running jobs finish before it hands them "
            "over to the next worker. Whoever stops it should wait about 15 s longer before SIGKILL "
            "(stop_grace_period, terminationGracePeriodSeconds)."
        ),
    )
    job_expire_hours: float = Field(
        24,
        gt=0,
        description="How long Redis keeps the status of an ended job. SQL keeps it anyway.",
    )

    history_days: float = Field(
        90,
        gt=0,
        description="How long SQL keeps ended jobs with their history; older ones go, 500 every 10 s.",
    )

    # Memory and batches
    max_memory_usage_percent: float = Field(
        80,
        gt=0,
        le=100,
        description="New jobs are refused above this (percent of the container's memory; may be fractional).",
    )
    memory_check_interval: float = Field(
        30,
        gt=0,
        description=(
            "Seconds between two looks at memory and disk, by the API and by each worker; batches go slower where"
            " a worker is short."
        ),
    )
    celery_worker_concurrency: int = Field(4, ge=1)
    celery_worker_max_memory_per_child: int = Field(
        200_000,
        ge=1,
        description="KB of memory held now (not at its peak) after which a worker process is replaced, between two jobs.",
    )
    celery_worker_max_tasks_per_child: int = Field(1000, ge=1)
    batch_size: int = Field(5, ge=1, description="Jobs of one batch in flight at most.")
    batch_timeout: float = Field(
        300,
        gt=0,
        description="Seconds without any job of a batch starting or ending before it is reported stalled.",
    )

    # Flower
    flower_host: str | None = Field(
        None,
        description="Default: 127.0.0.1; every address once FLOWER_BASIC_AUTH (user:password) is set.",
    )
    flower_port: Port = 5555
    flower_basic_auth: SecretStr | None = Field(None, description="user:password")

    # Logs
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["json", "text"] = Field("json", description="json or text")

    @field_validator("cors_origins", "s3_redirect_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("s3_redirect_hosts")
    @classmethod
    def _are_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            parse_allowed_host(entry)
        return value

    @field_validator("db_ssl_ca", "db_ssl_cert", "db_ssl_key")
    @classmethod
    def _readable_pem(cls, path: Path | None) -> Path | None:
        """Better refused here than at each connection."""
        if path is None:
            return None
        try:
            content = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not PEM'}") from error
        if "-----BEGIN " not in content:
            raise ValueError(f"{path} holds nothing in PEM form (-----BEGIN …)")
        return path.absolute()

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError(f"no time zone is called '{value}'; use a name such as America/New_York") from error
        return value

    @field_validator("database_url")
    @classmethod
    def _is_url(cls, value: SecretStr | None) -> SecretStr | None:
        """Refused here without a word of it: what the driver says of a URL it cannot read may show the password."""
        if value is None:
            return None
        example = "mysql+pymysql://user:password@host:3306/name"
        try:
            url = make_url(value.get_secret_value())
        except (ArgumentError, ValueError):
            raise ValueError(f"is no URL of a database; write it as {example}, {ESCAPES} in the password") from None
        if url.get_backend_name() != "sqlite" and "@" in f"{url.host}{url.database}":
            raise ValueError(f"has more than one '@' before its host; write it as {example}, {ESCAPES} in the password")
        return value

    @field_validator("lease_renew_seconds")
    @classmethod
    def _renewed_in_time(cls, value: float, info: ValidationInfo) -> float:
        """A worker that says too late that it is alive loses every longer job to the next one, which loses it too."""
        lease_seconds = info.data.get("lease_seconds")
        if lease_seconds is not None and value > lease_seconds / 2:
            raise ValueError(f"must be at most half of LEASE_SECONDS, {lease_seconds / 2:g}")
        return value

    def resolved_database_url(self) -> str:
        """The SQLAlchemy URL, password included: never log it."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        if self.db_type == "sqlite":
            return f"sqlite:///{self.db_name or 'var/ncr.db'}"
        driver, port = {"mysql": ("mysql+pymysql", 3306), "postgresql": ("postgresql+psycopg", 5432)}[self.db_type]
        password = quote(self.db_password.get_secret_value(), safe="") if self.db_password else ""
        login = f"{quote(self.db_user, safe='')}{':' + password if password else ''}@" if self.db_user else ""
        return f"{driver}://{login}{self.db_host}:{self.db_port or port}/{self.db_name or ''}"

    def redis_url(self) -> str:
        """The Redis URL, password included: never log it."""
        password = f":{quote(self.redis_password.get_secret_value(), safe='')}@" if self.redis_password else ""
        return f"{'rediss' if self.redis_tls else 'redis'}://{password}{self.redis_host}:{self.redis_port}/{self.redis_db}"


class SettingsInvalid(Exception):
    """Settings that cannot be used; the message names each, and never shows a value that may be secret."""


@lru_cache(maxsize=1)
def load_settings() -> Settings:
    """The settings of this process, read once. Raises `SettingsInvalid`."""
    try:
        return Settings()
    except ValidationError as error:
        lines = [
            f"{item['loc'][0]}".upper() + f": {bound_line(item['msg'].removeprefix('Value error, '), QUOTE)}"
            for item in error.errors()
        ]
        raise SettingsInvalid(f"invalid settings: {'; '.join(lines)}. See env_sample.") from error
