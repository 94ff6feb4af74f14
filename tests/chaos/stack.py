"""The real processes of the embedded stack, with OpenSSH's sshd as the destination and a fault proxy before each outside part.

Base folder: state/ (the stack's), sftp/ (the destination: a small tmpfs where this is root), tmp/ (TMPDIR of the service).
"""

from __future__ import annotations

import asyncio
import getpass
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import asyncssh
import psutil
import pytest
from redis import Redis
from sqlalchemy import Engine, make_url, text

from databases import Server, create_database, prepared
from fault_proxy import FaultProxy, fault_proxy
from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.entrypoints.embedded.credentials import load_credentials
from ncr_upload.entrypoints.embedded.endpoints import Bucket, locate_bucket
from ncr_upload.entrypoints.embedded.host_key import load_public_key
from ncr_upload.entrypoints.embedded.parts import PART_NAMES, Part, Site, assemble
from ncr_upload.entrypoints.embedded.probes import greets_with
from ncr_upload.entrypoints.embedded.sockets import LOOPBACK, find_free_port
from ncr_upload.entrypoints.embedded.studio import create_tables
from ncr_upload.entrypoints.embedded.supervisor import Supervisor
from parts import require

DATABASES = ("sqlite", "postgresql", "mariadb", "mysql")
PROXIED = ("redis", "s3", "validator", "sftp")
SERVICE = ("api", "worker", "beat")
DISK_BYTES = 1024**3
UNPRIVILEGED = "nobody"
LEASE_SECONDS = 2.0
DATABASE_STARTS = 5

SETTINGS = {
    "LEASE_SECONDS": str(LEASE_SECONDS),
    "LEASE_RENEW_SECONDS": "0.5",
    "SWEEP_SECONDS": "0.5",
    "RETRY_BASE_SECONDS": "0.5",
    "RETRY_MAX_SECONDS": "2",
    "PROBE_SECONDS": "1",
    "JANITOR_SECONDS": "3",
    "WORKER_GRACE_SECONDS": "4",
    "SFTP_TIMEOUT_SECONDS": "5",
    "VALIDATOR_TIMEOUT_SECONDS": "20",
    "BATCH_SIZE": "2",
    "CELERY_WORKER_CONCURRENCY": "2",
    "MAX_MEMORY_USAGE_PERCENT": "99",
    "NCR_TESTING": "1",
}
"""Recovery within seconds. What is bounded by other clocks stays as it is."""


@dataclass(frozen=True)
class Destination:
    """The folder deliveries land in, the user that owns it, and whether it is a disk of its own that can be made full."""

    root: Path
    user: str
    is_disk: bool

    def fill(self, left_bytes: int) -> None:
        """Leave only so much room."""
        used = _used_bytes(self.root)
        _mount("-o", f"remount,size={used + max(4096, left_bytes)}", str(self.root))

    def empty(self) -> None:
        if self.is_disk:
            _mount("-o", f"remount,size={DISK_BYTES}", str(self.root))


class ChaosStack:
    """A running stack. `engine` and `bucket` reach the real parts, past the proxies."""

    def __init__(self, base: Path, site: Site, destination: Destination, database: str, server: Server | None) -> None:
        self.base = base
        self.site = site
        self.destination = destination
        self.database = database
        self._server = server
        self.proxies: dict[str, FaultProxy] = {}
        self.crash_order = base / "crash"
        self.tmp = base / "tmp"
        self.user_key = base / "user_key"
        self.engine: Engine = open_engine(site.database_url, pool_size=8, wait_seconds=10)
        self.supervisor: Supervisor
        self.remarks: list[str] = []

    @property
    def bucket(self) -> Bucket:
        return locate_bucket(self.site)

    @property
    def work_dir(self) -> Path:
        return self.site.state_dir / "work"

    def process(self, part: str) -> psutil.Process:
        return psutil.Process(self.supervisor.pids()[part])

    def worker_children(self) -> list[psutil.Process]:
        return [child for child in self.process("worker").children(recursive=True) if child.is_running()]

    def busy_children(self) -> list[psutil.Process]:
        """Worker processes that hold a lease, by what the ledger says of them; else any."""
        query = text("SELECT worker FROM ncr_jobs WHERE worker IS NOT NULL AND finished_at IS NULL")
        with self.engine.connect() as connection:
            holders = [str(row.worker) for row in connection.execute(query)]
        children = self.worker_children()
        busy = [child for child in children if any(str(child.pid) in holder.split(":") for holder in holders)]
        return busy or children

    def restart_database(self) -> None:
        assert self._server is not None
        _restart(self._server)

    def redis(self) -> Redis:
        return Redis(port=self.site.ports["redis"], password=self.site.credentials.redis_password, socket_timeout=5)

    @asynccontextmanager
    async def copying_server(self, stops: int, deletes: str, seconds: float) -> AsyncIterator[int]:
        """A second server on the destination's folder that renames folders by copying (`copying_sftp_program`); its port."""
        program = Path(__file__).parents[1] / "copying_sftp_program.py"
        arguments = (str(self.site.host_key_path), str(self.base / "authorized_keys"), self.destination.user)
        serving = await asyncio.create_subprocess_exec(
            *(sys.executable, str(program), *arguments, str(stops), deletes, str(seconds)),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert serving.stdout is not None
            line = await asyncio.wait_for(serving.stdout.readline(), 20)
            yield int(line.decode().rpartition(" ")[2])
        finally:
            with suppress(ProcessLookupError):
                serving.kill()
            await serving.wait()

    def heal(self) -> None:
        """Everything that a fault may have left wrong, made right again."""
        for proxy in self.proxies.values():
            proxy.heal()
        self.crash_order.unlink(missing_ok=True)
        self.destination.empty()
        for folder in (self.destination.root, self.destination.root / ".ncr-staging"):
            if folder.exists():
                folder.chmod(0o755)
        for pid in self.supervisor.pids().values():
            with suppress(psutil.Error):
                for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                    process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def running_stack(database: str, *, max_attempts: int, keep_logs: Callable[[], Path | None]) -> AsyncIterator[ChaosStack]:
    """Starts it all, and ends it all. `keep_logs`, asked at the end, says where the logs go, if they are to be kept."""
    with ExitStack() as cleanup:
        base = cleanup.enter_context(_base_folder())
        site = _make_site(base)
        destination = cleanup.enter_context(_destination(base / "sftp"))
        server = cleanup.enter_context(prepared(database)) if database != "sqlite" else None
        if server is not None:
            url = create_database(server.start())
            site = replace(site, ports={**site.ports, "database": server.port}, database_url=url)
        stack = ChaosStack(base, site, destination, database, server)
        cleanup.callback(stack.engine.dispose)
        for name in [*PROXIED, *(["database"] if server else [])]:
            stack.proxies[name] = cleanup.enter_context(fault_proxy((LOOPBACK, site.ports[name])))
        parts: list[Part] = []
        sshd = _sshd_part(stack)
        settings = _service_settings(stack, max_attempts)
        for part in assemble(site, dict(os.environ) | SETTINGS):
            if part.name in SERVICE:
                part = replace(part, environment=dict(part.environment) | settings)
            parts.append(sshd if part.name == "sftp" else part)
        stack.supervisor = Supervisor(
            parts, run_dir=site.run_dir, log_dir=site.log_dir, on_restart=lambda: None, tell=stack.remarks.append
        )
        try:
            await asyncio.to_thread(create_tables, stack.engine)
            await stack.supervisor.start()
            yield stack
        finally:
            stack.heal()
            await stack.supervisor.stop()
            stack.supervisor.kill()
            if (kept := keep_logs()) is not None:
                shutil.copytree(site.log_dir, kept, dirs_exist_ok=True)


@contextmanager
def _base_folder() -> Iterator[Path]:
    """Anyone may pass through it: the destination's user has to."""
    base = Path(tempfile.mkdtemp(prefix="ncr-chaos-"))
    try:
        base.chmod(0o711)
        yield base
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _make_site(base: Path) -> Site:
    state = base / "state"
    state.mkdir(mode=0o700)
    for name in ("run", "logs", "s3", "work"):
        (state / name).mkdir()
    (base / "tmp").mkdir(mode=0o700)
    taken: set[int] = set()
    ports = {name: find_free_port(taken) for name in PART_NAMES if name not in ("worker", "beat")}
    key = load_public_key(state / "sftp_host_key")
    return Site(state, ports, load_credentials(state), f"sqlite:///{state / 'ncr.db'}", key)


def _service_settings(stack: ChaosStack, max_attempts: int) -> dict[str, str]:
    """The service reaches every outside part through its proxy."""
    ports = {name: proxy.port for name, proxy in stack.proxies.items()}
    url = make_url(stack.site.database_url)
    if "database" in ports:
        url = url.set(port=ports["database"])
    return {
        "REDIS_PORT": str(ports["redis"]),
        "WASABI_ENDPOINT": f"http://{LOOPBACK}:{ports['s3']}",
        "VALIDATOR_API_URL": f"http://{LOOPBACK}:{ports['validator']}/validate",
        "SFTP_PORT": str(ports["sftp"]),
        "SFTP_USERNAME": stack.destination.user,
        "SFTP_PASSWORD": "",
        "SFTP_PRIVATE_KEY": str(stack.user_key),
        "SFTP_BASE_DIR": str(stack.destination.root),
        "DATABASE_URL": url.render_as_string(hide_password=False),
        "MAX_ATTEMPTS": str(max_attempts),
        "NCR_CRASH_AT": f"@{stack.crash_order}",
        "TMPDIR": str(stack.tmp),
    }


# --- the destination ----------------------------------------------------------------------------------------------


@contextmanager
def _destination(root: Path) -> Iterator[Destination]:
    """As root: a tmpfs that belongs to a user without privileges, since root is told neither of modes nor of quotas."""
    root.mkdir(mode=0o755)
    user = UNPRIVILEGED if os.geteuid() == 0 else getpass.getuser()
    is_disk = os.geteuid() == 0 and _mount("-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=755", "ncr-chaos", str(root))
    try:
        if os.geteuid() == 0:
            record = pwd.getpwnam(user)
            os.chown(root, record.pw_uid, record.pw_gid)
        yield Destination(root, user, is_disk)
    finally:
        if is_disk:
            subprocess.run(["umount", "-l", str(root)], check=False)


def _mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


def _used_bytes(root: Path) -> int:
    found = os.statvfs(root)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _sshd_part(stack: ChaosStack) -> Part:
    program = require("sshd")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    base, port = stack.base, stack.site.ports["sftp"]
    key = asyncssh.generate_private_key("ssh-ed25519")
    stack.user_key.touch(mode=0o600)
    stack.user_key.write_bytes(key.export_private_key())
    authorized = base / "authorized_keys"
    authorized.write_bytes(key.export_public_key())
    authorized.chmod(0o644)
    config = base / "sshd_config"
    config.write_text(
        f"ListenAddress {LOOPBACK}\nPort {port}\nHostKey {stack.site.host_key_path}\nAuthorizedKeysFile {authorized}\n"
        "PidFile none\nUsePAM no\nStrictModes no\nPasswordAuthentication no\nMaxStartups 200\n"
        "Subsystem sftp internal-sftp\nLogLevel INFO\n"
    )
    command = [program, "-D", "-e", "-f", str(config)]
    unpunished = [*command, "-o", "PerSourcePenalties no"]  # OpenSSH 9.8 and later: many broken logins are what this is about
    if subprocess.run([*unpunished, "-t"], capture_output=True, check=False).returncode == 0:
        command = unpunished
    return Part("sftp", tuple(command), dict(os.environ), greets_with(port, b"SSH-2.0-"))


# --- databases ------------------------------------------------------------------------------------------------------


def _restart(server: Server) -> None:
    """Killed, and started again on the same data. A part that lingers of the killed one may keep the new one away at first."""
    server.kill()
    for attempt in range(DATABASE_STARTS):
        try:
            server.start()
        except (Exception, pytest.fail.Exception):
            if attempt == DATABASE_STARTS - 1:
                raise
            time.sleep(0.5)
        else:
            return
