"""The service's own programs as processes, each started and ended by the test, on outside parts that the test can hold up."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from ncr_upload.entrypoints.embedded.product import Product, make_product
from ncr_upload.entrypoints.embedded.samples import place_product
from ncr_upload.entrypoints.settings import Settings
from patience import PROMISED_SECONDS, allowed, until
from running_stack import ENDED, NCR
from servers import S3Server, SftpServer, free_port, start_asyncssh, start_s3
from studio_rows import open_database

START_SECONDS = 90
QUICK = {
    "LEASE_SECONDS": "3",
    "LEASE_RENEW_SECONDS": "0.5",
    "SWEEP_SECONDS": "0.5",
    "RETRY_BASE_SECONDS": "0.2",
    "RETRY_MAX_SECONDS": "1",
    "CELERY_WORKER_CONCURRENCY": "2",
    "VALIDATOR_TIMEOUT_SECONDS": "60",
    "SFTP_TIMEOUT_SECONDS": "10",
    "MAX_MEMORY_USAGE_PERCENT": "99.9",
    "LOG_LEVEL": "INFO",
    "NCR_TESTING": "1",
}


@dataclass
class Judge:
    """A validator that passes everything, once `open` is set; `waiting` is how many packages it holds."""

    url: str
    open: threading.Event = field(default_factory=threading.Event)
    waiting: int = 0

    def hold(self) -> None:
        self.open.clear()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A worker that is killed hangs up."""


@contextmanager
def start_judge() -> Iterator[Judge]:
    judge = Judge("")
    judge.open.set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            while size := int(self.rfile.readline() or b"0", 16):
                self.rfile.read(size + 2)
            self.rfile.readline()
            judge.waiting += 1
            try:
                judge.open.wait()
            finally:
                judge.waiting -= 1
            body = b'{"data": [{"result": "Valid"}]}'
            with suppress(OSError):
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    server = _QuietServer(("127.0.0.1", 0), Handler)
    judge.url = f"http://127.0.0.1:{server.server_port}/validate"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        judge.open.set()
        server.shutdown()
        server.server_close()


@dataclass
class Program:
    """One running program of the service, in a process group of its own."""

    process: subprocess.Popen[bytes]
    output: Path
    database: Engine

    def log(self) -> str:
        return self.output.read_text(errors="replace")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def signal(self, number: signal.Signals) -> None:
        """To the main process alone."""
        self.process.send_signal(number)

    def signal_all(self, number: signal.Signals) -> None:
        """To the whole group, as a terminal or systemd does."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal_all(signal.SIGKILL)
        self.process.wait()

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """The whole group stands still, at a moment when it does not keep the whole database from the others."""
        self.signal_all(signal.SIGSTOP)
        try:
            until(self._lets_others_write, 60)
            yield
        finally:
            self.signal_all(signal.SIGCONT)

    def _lets_others_write(self) -> bool:
        try:
            with self.database.begin():
                return True
        except OperationalError:  # SQLite's one lock is held: let go on for a moment
            self.signal_all(signal.SIGCONT)
            time.sleep(0.1)
            self.signal_all(signal.SIGSTOP)
            return False

    def wait(self, seconds: float) -> int:
        return self.process.wait(seconds)


@dataclass
class Outside:
    """What is not ours, shared by the tests of a module."""

    s3: S3Server
    sftp: SftpServer
    judge: Judge
    product: Product


@contextmanager
def start_outside(folder: Path) -> Iterator[Outside]:
    with ExitStack() as servers:
        s3 = servers.enter_context(start_s3(folder / "s3"))
        sftp = servers.enter_context(start_asyncssh(folder / "sftp"))
        judge = servers.enter_context(start_judge())
        yield Outside(s3, sftp, judge, make_product("studio/SKU-9", "SKU-9", seed=9))


@dataclass
class Installation:
    """One database, one Redis, and programs that use them. `engine` goes to the database directly."""

    folder: Path
    outside: Outside
    engine: Engine
    settings: dict[str, str]
    _started: int = 0

    @contextmanager
    def run(self, name: str, **changes: str) -> Iterator[Program]:
        """`ncr NAME`, with these settings changed; returns once it is ready, and kills it in the end."""
        self._started += 1
        output = self.folder / f"{name}-{self._started}.log"
        environment = _plain_environment() | self.settings | changes
        with output.open("wb") as out:
            process = subprocess.Popen(
                [*NCR, name], cwd=self.folder, env=environment, stdout=out, stderr=out, start_new_session=True
            )
        program = Program(process, output, self.engine)
        try:
            try:
                until(lambda: self._is_ready(name, program, environment["API_PORT"]), START_SECONDS)
            except AssertionError as late:
                raise AssertionError(f"{name} did not get ready: {program.log()[-3000:]}") from late
            yield program
        finally:
            program.signal_all(signal.SIGCONT)
            program.kill()

    def _is_ready(self, name: str, program: Program, api_port: str) -> bool:
        assert program.process.poll() is None, program.log()
        match name:
            case "api":
                with suppress(httpx.HTTPError):
                    return httpx.get(f"http://127.0.0.1:{api_port}/livez", trust_env=False, timeout=5).status_code == 200
                return False
            case "worker":
                return " ready." in program.log()
            case _:
                return True

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.settings['API_PORT']}", timeout=30, trust_env=False)

    def ask(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """The API's answer, which came within the time it promises."""
        with self.client() as client:
            began = time.monotonic()
            answer = client.request(method, path, **arguments)
        took = time.monotonic() - began
        assert took < allowed(PROMISED_SECONDS), f"{method} {path} took {took:.1f} s"
        return answer

    def place(self, job_id: str) -> None:
        """The product in storage and in the studio's tables, awaiting delivery as this job."""
        s3 = self.outside.s3
        bucket: Any = {
            "endpoint": s3.endpoint,
            "access_key": s3.access_key,
            "secret_key": s3.secret_key,
            "bucket": s3.bucket,
        }
        place_product(bucket, self.engine, job_id, self.outside.product, campaign="tests")

    def submit(self, job_id: str) -> str:
        """Its task id. The answer came in time."""
        self.place(job_id)
        answer = self.ask("POST", "/process-job", json=job(job_id))
        assert answer.status_code == 202, answer.text
        return str(answer.json()["task_id"])

    def row(self, task_id: str) -> dict[str, Any]:
        """The task as the ledger has it."""
        with self.engine.connect() as connection:
            found = connection.execute(text("SELECT * FROM ncr_jobs WHERE task_id = :t"), {"t": task_id}).mappings().one()
        return dict(found)

    def wait_for(self, task_id: str, *, seconds: float = 60, **columns: object) -> None:
        until(lambda: all(self.row(task_id)[name] == value for name, value in columns.items()), seconds)

    def history(self, task_id: str) -> list[str]:
        with self.engine.connect() as connection:
            query = text("SELECT kind, message FROM ncr_events WHERE task_id = :t ORDER BY id")
            return [f"{row.kind}: {row.message}" for row in connection.execute(query, {"t": task_id})]

    def count(self, query: str, **arguments: object) -> int:
        with self.engine.connect() as connection:
            return int(connection.execute(text(query), arguments).scalar_one())

    def assert_delivered_once(self, job_id: str, task_id: str, seconds: float = 60) -> None:
        """Ended, published whole, recorded once, nothing left behind."""
        self.assert_published_once(job_id, task_id, seconds)
        until(lambda: self.leftovers() == [], seconds)

    def assert_published_once(self, job_id: str, task_id: str, seconds: float = 60) -> None:
        """Ended, published whole, recorded once."""
        until(lambda: self.row(task_id)["status"] in ENDED, seconds)
        assert self.row(task_id)["status"] == "completed", self.history(task_id)
        folder = self.outside.sftp.folder / job_id
        arrived = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert arrived == self.outside.product.delivered
        assert self.count("SELECT upload_count FROM job_details WHERE job_id = :j", j=job_id) == 1
        assert self.count("SELECT COUNT(*) FROM ncr_events WHERE task_id = :t AND kind = 'completed'", t=task_id) == 1
        assert self.count("SELECT COUNT(*) FROM ncr_jobs WHERE job_id = :j", j=job_id) == 1

    def leftovers(self) -> list[str]:
        """Staging folders and workspaces of ended tasks, which should not be there."""
        with self.engine.connect() as connection:
            query = text("SELECT task_id FROM ncr_jobs WHERE live_job_id IS NULL")
            ended = tuple(connection.execute(query).scalars())
        places = [self.outside.sftp.folder / ".ncr-staging", Path(self.settings["WORK_DIR"])]
        found = [path.name for place in places if place.exists() for path in place.iterdir()]
        return [name for name in found if name.startswith(ended)]


def job(job_id: str) -> dict[str, str]:
    return {"job_id": job_id, "username": "tester", "campaign": "tests"}


@contextmanager
def install(
    folder: Path, outside: Outside, database: str, redis_port: int, settings: Mapping[str, str] | None = None
) -> Iterator[Installation]:
    """`database`: the URL of an empty one."""
    folder.mkdir(exist_ok=True)
    engine = open_database(database)
    login = outside.sftp.login
    values = QUICK | {
        "API_HOST": "127.0.0.1",
        "API_PORT": str(free_port()),
        "DATABASE_URL": database,
        "REDIS_HOST": "127.0.0.1",
        "REDIS_PORT": str(redis_port),
        "WASABI_ENDPOINT": outside.s3.endpoint,
        "WASABI_ACCESS_KEY": outside.s3.access_key,
        "WASABI_SECRET_KEY": outside.s3.secret_key,
        "BUCKET_NAME": outside.s3.bucket,
        "SFTP_HOST": login.host,
        "SFTP_PORT": str(login.port),
        "SFTP_USERNAME": login.username,
        "SFTP_PASSWORD": login.password or "",
        "SFTP_HOST_KEY": login.host_key or "",
        "SFTP_BASE_DIR": outside.sftp.base_dir,
        "VALIDATOR_API_URL": outside.judge.url,
        "VALIDATOR_API_KEY": "any",
        "WORK_DIR": str(folder / "work"),
        "NCR_CRASH_AT": f"@{folder / 'crash'}",
    }
    outside.judge.open.set()
    try:
        yield Installation(folder, outside, engine, values | dict(settings or {}))
    finally:
        outside.judge.open.set()
        engine.dispose()


def _plain_environment() -> dict[str, str]:
    """This process's environment without settings of the service."""
    kept = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
    return kept | {"PYTHONUNBUFFERED": "1", "NO_PROXY": "127.0.0.1,localhost"}
