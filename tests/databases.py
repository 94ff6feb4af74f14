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
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from parts import find, require
from servers import free_port

READY_SECONDS = 60
SERVERS = ("postgresql", "mariadb", "mysql")


class Databases:
    """Fresh databases on servers that are started when first asked for, and ended together. Only where `durable` does
    PostgreSQL wait for the disk before it says that a transaction is committed."""

    def __init__(self, *, durable: bool = False) -> None:
        self._durable = durable
        self._running = ExitStack()
        self._urls: dict[str, str] = {}

    def create(self, kind: str, folder: Path) -> str:
        """The URL of an empty database: 'sqlite' in `folder`, or on a server."""
        if kind == "sqlite":
            return f"sqlite:///{folder / 'test.db'}"
        if kind not in self._urls:
            self._urls[kind] = self._running.enter_context(started(kind, durable=self._durable))
        return create_database(self._urls[kind])

    def close(self) -> None:
        self._running.close()


def create_database(server_url: str) -> str:
    """The URL of a new database on the server."""
    url, name = make_url(server_url), f"t{uuid.uuid4().hex[:12]}"
    with _admin(server_url) as engine, engine.connect() as connection:
        more = " CHARACTER SET utf8mb4" if url.get_backend_name() == "mysql" else ""
        connection.execute(text(f"CREATE DATABASE {name}{more}"))
    return url.set(database=name).render_as_string(hide_password=False)


@dataclass
class Server:
    """A database server with a data folder and a port of its own, which outlive a restart."""

    folder: Path
    user: str | None
    port: int = field(default_factory=free_port)
    more: list[str] = field(default_factory=list)
    """Further options of its program."""
    login: str = ""
    durable: bool = False
    process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        raise NotImplementedError

    def start(self) -> str:
        """Returns the URL once it answers."""
        raise NotImplementedError

    def kill(self) -> None:
        """As a crash or a power cut does. PostgreSQL's own processes end with their first."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.send_signal(signal.SIGINT if isinstance(self, Postgresql) else signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()

    def _run(self, command: Sequence[str], user: str | None, url: str) -> str:
        log = self.folder / "log"
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command, user=user, group=user, extra_groups=[] if user else None, cwd="/", stdout=out, stderr=out
            )
        _wait(url, self.process, lambda: log.read_text(errors="replace")[-1000:])
        return url


class Postgresql(Server):
    """It refuses to run as root: then it runs as the user its package made. `login` is 'test' or 'test:password'."""

    def prepare(self) -> None:
        user, _, password = (self.login or "test").partition(":")
        secret = self.folder / "password"
        secret.write_text(password)
        secret.chmod(0o644)
        guard = ["-A", "scram-sha-256", f"--pwfile={secret}"] if password else ["-A", "trust"]
        _run([require("initdb"), "-D", str(self.folder / "data"), "-U", user, *guard, "--no-sync"], self.user)

    def start(self) -> str:
        data = self.folder / "data"
        command = [require("postgres"), "-D", str(data), "-p", str(self.port), "-c", "listen_addresses=127.0.0.1"]
        command += ["-c", f"fsync={'on' if self.durable else 'off'}", "-c", "unix_socket_directories=", *self.more]
        return self._run(command, self.user, f"postgresql+psycopg://{self.login or 'test'}@127.0.0.1:{self.port}/postgres")


class Mariadb(Server):
    """Its only login is root, without a password."""

    def prepare(self) -> None:
        as_user = [f"--user={self.user}"] if self.user else []
        install = [require("mariadb-install-db"), "--no-defaults", f"--datadir={self.folder / 'data'}", *as_user]
        _run([*install, "--auth-root-authentication-method=normal", "--skip-test-db"], None)

    def start(self) -> str:
        as_user = [f"--user={self.user}"] if self.user else []
        command = [require("mariadbd"), "--no-defaults", f"--datadir={self.folder / 'data'}", f"--port={self.port}"]
        command += ["--bind-address=127.0.0.1", *as_user, f"--socket={self.folder / 'socket'}", "--skip-networking=0"]
        return self._run([*command, *self.more], None, f"mysql+pymysql://root@127.0.0.1:{self.port}/mysql")


class Mysql(Server):
    """MySQL itself, as `scripts/mysql.sh` unpacks it. Its only login is root, without a password."""

    def prepare(self) -> None:
        program = find("ncr-mysqld")
        if program is None:  # not an error in CI: it comes from Debian's unstable suite, which may be without it for a while
            pytest.skip("MySQL is not here (make servers fetches it, on Debian)")
        shutil.copytree(Path(program).with_name("empty"), self.folder / "data")

    def start(self) -> str:
        as_user = [f"--user={self.user}"] if self.user else []
        command = [require("ncr-mysqld"), f"--datadir={self.folder / 'data'}", f"--port={self.port}", *as_user]
        command += ["--bind-address=127.0.0.1", f"--socket={self.folder / 'socket'}", "--mysqlx=OFF", "--skip-log-bin"]
        command += ["--innodb-flush-method=nosync", "--innodb-doublewrite=OFF", "--innodb-redo-log-capacity=8M"]
        if not any(option.startswith("--ssl-") for option in self.more):
            command.append("--tls-version=")  # it would make itself a certificate, and no proxy could read along
        return self._run([*command, *self.more], None, f"mysql+pymysql://root@127.0.0.1:{self.port}/mysql")


KINDS: dict[str, tuple[type[Server], str]] = {
    "postgresql": (Postgresql, "postgres"),
    "mariadb": (Mariadb, "mysql"),
    "mysql": (Mysql, "root"),
}


@contextmanager
def prepared(kind: str, login: str = "", *, durable: bool = False) -> Iterator[Server]:
    """A server that is ready to be started; stopped and removed in the end."""
    make, owner = KINDS[kind]
    with _folder_of(owner) as (folder, user):
        server = make(folder, user, login=login, durable=durable)
        server.prepare()
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def started(kind: str, *, durable: bool = False) -> Iterator[str]:
    with prepared(kind, durable=durable) as server:
        yield server.start()


@contextmanager
def pooled(url: str) -> Iterator[str]:
    """The URL of PgBouncer, pooling sessions, before the PostgreSQL database of this URL."""
    real, port = make_url(url), free_port()
    with _folder_of("postgres") as (folder, user):
        (folder / "users").write_text(f'"{real.username}" ""\n')
        (folder / "ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={real.port}\n[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port={port}\n"
            f"unix_socket_dir=\nauth_type=trust\nauth_file={folder / 'users'}\npool_mode=session\n"
        )
        log = folder / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [require("pgbouncer"), str(folder / "ini")],
                user=user,
                group=user,
                extra_groups=[] if user else None,
                cwd="/",
                stdout=out,
                stderr=out,
            )
        try:
            before = real.set(port=port).render_as_string(hide_password=False)
            _wait(before, process, lambda: log.read_text(errors="replace")[-1000:])
            yield before
        finally:
            process.terminate()
            process.wait()


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
