"""Real database servers for tests: each with a data folder of its own on a free port of 127.0.0.1."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from parts import require
from servers import free_port

READY_SECONDS = 60
SERVERS = ("postgresql", "mariadb")


class Databases:
    """Fresh databases on servers that are started when first asked for, and ended together."""

    def __init__(self) -> None:
        self._running = ExitStack()
        self._urls: dict[str, str] = {}

    def create(self, kind: str, folder: Path) -> str:
        """The URL of an empty database: 'sqlite' in `folder`, or on a server."""
        if kind == "sqlite":
            return f"sqlite:///{folder / 'test.db'}"
        if kind not in self._urls:
            start = {"postgresql": start_postgresql, "mariadb": start_mariadb}[kind]
            self._urls[kind] = self._running.enter_context(start())
        name = f"t{uuid.uuid4().hex[:12]}"
        with _admin(self._urls[kind]) as engine, engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}{' CHARACTER SET utf8mb4' if kind == 'mariadb' else ''}"))
        return make_url(self._urls[kind]).set(database=name).render_as_string(hide_password=False)

    def close(self) -> None:
        self._running.close()


@contextmanager
def start_postgresql() -> Iterator[str]:
    """PostgreSQL, which refuses to run as root: then as the user its package made."""
    with _folder_of("postgres") as (folder, user):
        data, port = folder / "data", free_port()
        _run([require("initdb"), "-D", str(data), "-U", "test", "-A", "trust", "--no-sync"], user)
        command = [require("postgres"), "-D", str(data), "-p", str(port), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        url = f"postgresql+psycopg://test@127.0.0.1:{port}/postgres"
        with _server([*command, "-c", "unix_socket_directories="], user, folder, url, stop=signal.SIGINT):
            yield url


@contextmanager
def start_mariadb() -> Iterator[str]:
    with _folder_of("mysql") as (folder, user):
        data, port = folder / "data", free_port()
        as_user = [f"--user={user}"] if user else []
        install = [require("mariadb-install-db"), "--no-defaults", f"--datadir={data}", *as_user]
        _run([*install, "--auth-root-authentication-method=normal", "--skip-test-db"], None)
        command = [
            require("mariadbd"),
            "--no-defaults",
            f"--datadir={data}",
            f"--port={port}",
            "--bind-address=127.0.0.1",
            *as_user,
        ]
        url = f"mysql+pymysql://root@127.0.0.1:{port}/mysql"
        with _server(
            [*command, f"--socket={folder / 'socket'}", "--skip-networking=0"], None, folder, url, stop=signal.SIGTERM
        ):
            yield url


@contextmanager
def _folder_of(owner: str) -> Iterator[tuple[Path, str | None]]:
    """A folder the server may use, and the user to run it as (None: the current one)."""
    folder = Path(tempfile.mkdtemp(prefix=f"ncr-{owner}-"))
    user = owner if os.geteuid() == 0 else None
    try:
        if user:
            record = pwd.getpwnam(user)
            os.chown(folder, record.pw_uid, record.pw_gid)
        yield folder, user
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(command: Sequence[str], user: str | None) -> None:
    done = subprocess.run(
        command, user=user, group=user, extra_groups=[] if user else None, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command[0]}: {done.stdout[-500:]} {done.stderr[-500:]}"


@contextmanager
def _server(command: Sequence[str], user: str | None, folder: Path, url: str, *, stop: signal.Signals) -> Iterator[None]:
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, user=user, group=user, extra_groups=[] if user else None, cwd="/", stdout=out, stderr=out
        )
    try:
        _wait(url, process, lambda: log.read_text(errors="replace")[-1000:])
        yield
    finally:
        process.send_signal(stop)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], read_log: Callable[[], str]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    with _admin(url) as engine:
        while True:
            try:
                with engine.connect():
                    return
            except DBAPIError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"{process.args!r} did not get ready: {read_log()}")
                time.sleep(0.1)


@contextmanager
def _admin(url: str) -> Iterator[Engine]:
    engine = create_engine(url, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 2})
    try:
        yield engine
    finally:
        engine.dispose()
