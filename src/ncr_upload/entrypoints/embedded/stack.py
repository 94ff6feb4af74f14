"""The embedded stack: one state folder, seven parts, one list of endpoints."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable, Iterable
from io import TextIOWrapper
from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from ncr_upload.adapters.sql.engine import open_engine, translated_errors
from ncr_upload.entrypoints.embedded.credentials import load_credentials
from ncr_upload.entrypoints.embedded.endpoints import Endpoints, describe, write_endpoints
from ncr_upload.entrypoints.embedded.host_key import load_public_key
from ncr_upload.entrypoints.embedded.parts import PART_NAMES, Site, assemble
from ncr_upload.entrypoints.embedded.sockets import LOOPBACK, find_free_port, is_free
from ncr_upload.entrypoints.embedded.studio import create_tables
from ncr_upload.entrypoints.embedded.supervisor import Supervisor

ENDPOINTS_NAME = "endpoints.json"
SEED_README_REDIS_PORT = 6380

_DRIVERS = {
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
    "postgresql": "postgresql+psycopg",
    "postgres": "postgresql+psycopg",
}


class StackRefused(Exception):
    """The stack cannot be started as asked; the message says why and what to do."""


class StackRunning(StackRefused):
    """Another stack runs in the folder."""

    def __init__(self, state_dir: Path, owner: str) -> None:
        super().__init__(
            f"a stack is already running in {state_dir} (process {owner}); stop it, or choose another folder with --state-dir"
        )
        self.state_dir = state_dir


class Stack:
    """The parts in one state folder, which no second stack can use at the same time.

    `api_port` 0 takes a free one. `redis_port` is taken when it is free, else another. `database` is a SQLAlchemy URL;
    None keeps an SQLite file in the folder. The endpoints are written to every file of `endpoints_files` (besides
    STATE_DIR/endpoints.json) once all parts are ready, rewritten after a restart of a part, and removed at the end.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        api_port: int = 0,
        redis_port: int | None = None,
        database: str | None = None,
        endpoints_files: Iterable[Path] = (),
        environment: dict[str, str] | None = None,
        tell: Callable[[str], None],
    ) -> None:
        self._state_dir = state_dir.resolve()
        self._environment = dict(os.environ) | (environment or {})
        self._files = [self._state_dir / ENDPOINTS_NAME, *(path.absolute() for path in endpoints_files)]
        self._tell = tell
        self._lock = _take_lock(self._state_dir)
        try:
            self.site = _choose_site(self._state_dir, api_port, redis_port, database)
        except BaseException:
            self._lock.close()
            raise
        self._supervisor: Supervisor | None = None

    @property
    def endpoints(self) -> Endpoints:
        """Where everything is now. Only once started."""
        assert self._supervisor is not None
        return describe(self.site, self._supervisor.pids())

    async def start(self, *, prepare: Callable[[Site], None] | None = None) -> None:
        """Returns once every part is ready, the studio's tables exist, and `prepare` has run (in a thread, when object
        storage answers; it may put files and jobs in place). Raises `PartFailed`, `PartMissing`, and `Unavailable` when
        the database does not answer."""
        self._make_folders()
        self._remove_files()
        self._supervisor = Supervisor(
            assemble(self.site, self._environment),
            run_dir=self.site.run_dir,
            log_dir=self.site.log_dir,
            on_restart=self._write_files,
            tell=self._tell,
        )
        starting = asyncio.create_task(self._supervisor.start())
        preparing = asyncio.create_task(self._prepare(self._supervisor, prepare))
        try:
            await asyncio.gather(starting, preparing)
        finally:
            for task in (starting, preparing):
                task.cancel()
            await asyncio.gather(starting, preparing, return_exceptions=True)
        self._write_files()

    async def _prepare(self, supervisor: Supervisor, prepare: Callable[[Site], None] | None) -> None:
        await asyncio.to_thread(self._create_tables)
        if prepare is not None:
            await supervisor.wait_ready("s3")
            await asyncio.to_thread(prepare, self.site)

    def _create_tables(self) -> None:
        engine = open_engine(self.site.database_url, pool_size=1)
        try:
            with translated_errors(engine):
                create_tables(engine)
        finally:
            engine.dispose()

    async def stop(self) -> None:
        """End every part and free the state folder. Safe to call whatever `start` came to."""
        self._remove_files()
        if self._supervisor is not None:
            await self._supervisor.stop()
        self._lock.close()

    def kill(self) -> None:
        """End every part at once."""
        if self._supervisor is not None:
            self._supervisor.kill()

    def _make_folders(self) -> None:
        site = self.site
        for folder in (site.run_dir, site.log_dir, site.sftp_root, site.s3_dir, self._state_dir / "work"):
            folder.mkdir(exist_ok=True)
        for log in site.log_dir.glob("*.log"):
            log.replace(log.with_suffix(".log.1"))

    def _write_files(self) -> None:
        for path in self._files:
            write_endpoints(path, self.endpoints)

    def _remove_files(self) -> None:
        for path in self._files:
            path.unlink(missing_ok=True)


def _take_lock(state_dir: Path) -> TextIOWrapper:
    """The folder's lock, held until the file is closed or the process ends, however it ends."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (state_dir / "lock").open("a+")
    except OSError as error:
        raise StackRefused(
            f"the state folder {state_dir} cannot be used: {error.strerror}; choose another with --state-dir"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise StackRunning(state_dir, owner) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _choose_site(state_dir: Path, api_port: int, redis_port: int | None, database: str | None) -> Site:
    taken: set[int] = set()
    ports: dict[str, int] = {}
    if api_port:
        if not is_free(api_port):
            raise StackRefused(
                f"port {api_port} on {LOOPBACK} is taken; stop what listens there, or choose another with --port"
            )
        ports["api"] = api_port
        taken.add(api_port)
    if redis_port and is_free(redis_port):
        ports["redis"] = redis_port
        taken.add(redis_port)
    for name in PART_NAMES:
        if name not in ports and name not in ("worker", "beat"):
            ports[name] = find_free_port(taken)
    try:
        credentials = load_credentials(state_dir)
    except ValueError as error:
        raise StackRefused(str(error)) from error
    host_key = load_public_key(state_dir / "sftp_host_key")
    return Site(state_dir, ports, credentials, database_url(database, state_dir), host_key)


def database_url(given: str | None, state_dir: Path) -> str:
    """The SQLAlchemy URL, with the driver that is installed where the given one names none."""
    if given is None:
        return f"sqlite:///{state_dir / 'ncr.db'}"
    try:
        url = make_url(given)
    except ArgumentError as error:
        raise StackRefused(
            "--database is no SQLAlchemy URL; for example postgresql+psycopg://user:password@host/name"
        ) from error
    if url.drivername in _DRIVERS:
        url = url.set(drivername=_DRIVERS[url.drivername])
    if url.get_backend_name() == "sqlite" and url.database:
        url = url.set(database=str(Path(url.database).absolute()))
    return url.render_as_string(hide_password=False)
