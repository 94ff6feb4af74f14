"""What is delivered from and to, on real servers, and a warm worker between them.

Storage is rclone's S3 server behind HAProxy, the destination OpenSSH's sshd, the validator a sink that reads everything
(`sink.py`). A worker is `ncr worker` with one child and the product's own settings; its ledger is SQLite on the disk, so that
all it costs is the child's.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import boto3
import psutil
from botocore.config import Config
from sqlalchemy import Engine, text

from datasets import BUCKET, DATA_SETS, TINY, DataSet, place_data
from fault_proxy import fault_proxy
from ncr_upload.adapters.sql.submissions import SqlSubmissions
from ncr_upload.application.download_cache import FOLDER
from ncr_upload.domain.jobs import NewJob, Task
from ncr_upload.entrypoints.bootstrap.records import make_celery, make_queue
from ncr_upload.entrypoints.embedded.studio import Listed, add_job
from ncr_upload.entrypoints.settings import Settings
from parts import require
from patience import until
from running_stack import ENDED, NCR
from servers import S3Server, SftpServer, free_port, run_server, start_s3, start_sshd
from studio_rows import open_database
from valkey_server import ValkeyServer, start_valkey

HERE = Path(__file__).parent
MB = 1_000_000
ROUND_TRIP_MS = 40
CONNECTION_RATE, ALL_RATE = 20 * MB, 60 * MB
KEEP_HASHES = ("--dir-cache-time", "24h", "--vfs-fast-fingerprint")
"""So that the server knows an object's ETag without reading it each time, as stores do."""
MANY_FILES = 100
_uses = itertools.count(1)


@dataclass(frozen=True)
class Cost:
    """Of one run: wall time, and CPU time (user and system) of the process that does the work."""

    wall_seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Route:
    """Where the parts are met: directly or through proxies that emulate a WAN."""

    name: str
    s3_endpoint: str
    sftp_port: int
    validator_url: str


@dataclass
class Place:
    """Everything but the workers. `folder` is for this run only."""

    folder: Path
    s3: S3Server
    sftp: SftpServer
    valkey: ValkeyServer
    loopback: Route
    running: ExitStack
    workers: dict[tuple[str, ...], WarmWorker] = field(default_factory=dict)
    wans: dict[str, Route] = field(default_factory=dict)
    _starting: threading.RLock = field(default_factory=threading.RLock)

    def wan(self, name: str) -> Route:
        """The same parts, each behind 40 ms and its bandwidth. By each name there is one that nobody else uses."""
        with self._starting:
            if name not in self.wans:
                self.wans[name] = self._lay_wan(name)
            return self.wans[name]

    def _lay_wan(self, name: str) -> Route:
        s3_port, sink_port = (
            int(url.rpartition(":")[2].partition("/")[0]) for url in (self.s3.endpoint, self.loopback.validator_url)
        )
        ports = [
            self._delayed(s3_port, CONNECTION_RATE),
            self._delayed(self.sftp.login.port, CONNECTION_RATE),
            self._delayed(sink_port, None),
        ]
        return Route(name, f"http://127.0.0.1:{ports[0]}", ports[1], f"http://127.0.0.1:{ports[2]}/validate")

    def _delayed(self, port: int, connection_rate: int | None) -> int:
        proxy = self.running.enter_context(fault_proxy(("127.0.0.1", port), own_process=True))
        proxy.delay(ROUND_TRIP_MS)
        proxy.throttle(connection_rate, ALL_RATE)
        return proxy.port

    def worker(self, route: Route, **settings: str) -> WarmWorker:
        """A warm one, started when first asked for."""
        key = (route.name, *(f"{name}={value}" for name, value in sorted(settings.items())))
        with self._starting:
            if key not in self.workers:
                self.workers[key] = self.running.enter_context(warm_worker(self, route, len(self.workers), settings))
            return self.workers[key]

    def clear(self, name: str) -> None:
        """Remove what was delivered as `name`, before anything else is measured."""
        self.remove(self.sftp.folder / name)

    def remove(self, path: Path) -> None:
        """A folder of many files is only put aside: for minutes after they are removed, ext4 steps over the inode of each when
        it makes a file, which none pays for whose deliveries stay."""
        if sum(1 for _ in path.rglob("*")) < MANY_FILES:
            shutil.rmtree(path)
        else:
            path.rename(self.folder / f"aside-{next(_uses)}")

    def check(self, name: str, data: DataSet) -> None:
        """All of it arrived, by the number and sizes of the files. Raises `AssertionError`."""
        sizes = sorted(path.stat().st_size for path in (self.sftp.folder / name).rglob("*") if path.is_file())
        assert sizes == sorted(size for _, size in data.files), f"{name} did not arrive whole"


@contextmanager
def open_place(folder: Path) -> Iterator[Place]:
    with ExitStack() as running:
        store = running.enter_context(start_s3(place_data(), BUCKET, *KEEP_HASHES))
        s3 = replace(store, endpoint=running.enter_context(partial_answers(folder, store.endpoint)))
        sftp = running.enter_context(start_sshd(folder / "sftp"))
        sink = running.enter_context(run_server([sys.executable, str(HERE / "sink.py")], r"listening on (?P<found>\d+)"))
        valkey = running.enter_context(start_valkey(folder))
        loopback = Route("loopback", s3.endpoint, sftp.login.port, f"http://127.0.0.1:{sink}/validate")
        yield Place(folder, s3, sftp, valkey, loopback, running)


PROXY = """
defaults
    mode http
    option splice-auto
    timeout connect 5s
    timeout client 5m
    timeout server 5m
listen s3
    bind 127.0.0.1:{port}
    http-response set-status 206 if {{ res.hdr(content-range) -m found }}
    server store {store}
"""


@contextmanager
def partial_answers(folder: Path, endpoint: str) -> Iterator[str]:
    """HAProxy in front of the store, which answers 200 to a request for a part where S3 answers 206. All go through it."""
    port, config = free_port(), folder / "haproxy.cfg"
    config.write_text(PROXY.format(port=port, store=endpoint.partition("://")[2]))
    process = subprocess.Popen([require("haproxy"), "-q", "-db", "-f", str(config)])
    try:
        until(lambda: process.poll() is not None or _listens(port), 20)
        assert process.poll() is None, "HAProxy did not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def know_hashes(place: Place, *data_sets: DataSet) -> None:
    """Have the S3 server compute the ETags now."""
    client = s3_client(place, place.loopback)
    for data in data_sets or DATA_SETS:
        for key in data.keys:
            client.head_object(Bucket=place.s3.bucket, Key=key)


def s3_client(place: Place, route: Route) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=route.s3_endpoint,
        region_name="us-east-1",
        aws_access_key_id=place.s3.access_key,
        aws_secret_access_key=place.s3.secret_key,
        config=Config(s3={"addressing_style": "path"}, signature_version="s3v4", read_timeout=120),
    )


# --- our side ---------------------------------------------------------------------------------------------------


@dataclass
class WarmWorker:
    """`ncr worker` with one child that has delivered before."""

    place: Place
    settings: Settings
    engine: Engine
    process: psutil.Process
    log: Path

    def __post_init__(self) -> None:
        self.submissions = SqlSubmissions(self.engine, max_attempts=1)
        self.queue = make_queue(self.settings, make_celery(self.settings))
        self.last: Task | None = None

    def child(self) -> psutil.Process:
        """The process that does the jobs."""
        (child,) = [each for each in self.process.children() if "spawn" not in " ".join(each.cmdline())]
        return child

    def deliver(self, data: DataSet, *, job_id: str | None = None, keep: bool = False, cached: bool = False) -> Cost:
        """Wall time from the ring until the job is recorded as completed; CPU of the child until all is cleaned up. What was
        delivered is removed unless it is to be kept. Nothing is in the worker's cache of downloads unless it is to be."""
        if not cached:
            self.empty_cache()
        name = job_id or f"{data.name}-{next(_uses)}"
        task = self.submit(name, data)
        child = self.child()
        used, began = _cpu_of(child), time.time()
        self.queue.ring([task.task_id])
        until(lambda: self._column(task, "status") in ENDED, 600)
        until(lambda: self._column(task, "staging_due_at") is None and not self._workspaces(), 60)
        cost = Cost(float(self._column(task, "finished_at")) - began, _cpu_of(child) - used)
        assert self._column(task, "status") == "completed", self.history(task)
        self.place.check(name, data)
        self.last = task
        if not keep:
            self.place.clear(name)
        return cost

    def empty_cache(self) -> None:
        if (cache := self.settings.work_dir / FOLDER).exists():
            self.place.remove(cache)

    def _workspaces(self) -> list[Path]:
        return [path for path in self.settings.work_dir.iterdir() if path.name != FOLDER]

    def stages(self) -> str:
        """How many seconds each stage of the last job took."""
        assert self.last is not None
        events = self.submissions.history(self.last.task_id)
        times: dict[str, float] = {}
        for event, following in itertools.pairwise(events):
            times[event.stage] = times.get(event.stage, 0) + following.at - event.at
        return ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in times.items())

    def submit(self, job_id: str, data: DataSet) -> Task:
        add_job(self.engine, job_id, data.sku, [Listed(key, datetime(2026, 11, 1, 10)) for key in data.keys])  # noqa: DTZ001
        (task,) = self.submissions.accept([NewJob(job_id, "bench", "bench")], batch_id=None, release=1)
        assert isinstance(task, Task)
        return task

    def history(self, task: Task) -> list[str]:
        return [f"{event.at:.3f} {event.stage}: {event.message}" for event in self.submissions.history(task.task_id)]

    def _column(self, task: Task, name: str) -> Any:
        with self.engine.connect().execution_options(ncr_read_only=True) as connection:
            return connection.execute(text(f"SELECT {name} FROM ncr_jobs WHERE task_id = :t"), {"t": task.task_id}).scalar_one()


@contextmanager
def warm_worker(place: Place, route: Route, number: int, more: dict[str, str]) -> Iterator[WarmWorker]:
    """Started, and warmed up by two small jobs; ended, by its own pid, on exit."""
    folder = place.folder / f"worker-{number}"
    (folder / "work").mkdir(parents=True)
    environment = worker_settings(place, route, folder, number) | more
    settings = Settings(_env_file=None, **{name.lower(): value for name, value in environment.items()})  # type: ignore[arg-type]
    engine = open_database(folder / "ncr.db")
    log = folder / "worker.log"
    with log.open("wb") as out:
        process = subprocess.Popen([*NCR, "worker"], cwd=folder, env=_plain_environment() | environment, stdout=out, stderr=out)
    try:
        until(lambda: process.poll() is not None or " ready." in log.read_text(), 60)
        assert process.poll() is None, log.read_text()
        worker = WarmWorker(place, settings, engine, psutil.Process(process.pid), log)
        for _ in range(2):
            worker.deliver(TINY)
        yield worker
    finally:
        process.terminate()
        process.wait(40)
        engine.dispose()


def worker_settings(place: Place, route: Route, folder: Path, number: int) -> dict[str, str]:
    """Where everything is. All that is not here is as the product sets it, but for the limit at which a child is replaced."""
    login = place.sftp.login
    return {
        "DATABASE_URL": f"sqlite:///{folder / 'ncr.db'}",
        "REDIS_HOST": "127.0.0.1",
        "REDIS_PORT": str(place.valkey.port),
        "REDIS_DB": str(number),
        "WASABI_ENDPOINT": route.s3_endpoint,
        "WASABI_ACCESS_KEY": place.s3.access_key,
        "WASABI_SECRET_KEY": place.s3.secret_key,
        "BUCKET_NAME": place.s3.bucket,
        "SFTP_HOST": "127.0.0.1",
        "SFTP_PORT": str(route.sftp_port),
        "SFTP_USERNAME": login.username,
        "SFTP_PRIVATE_KEY": str(login.private_key),
        "SFTP_HOST_KEY": login.host_key or "",
        "SFTP_BASE_DIR": place.sftp.base_dir,
        "VALIDATOR_API_URL": route.validator_url,
        "VALIDATOR_API_KEY": "any",
        "WORK_DIR": str(folder / "work"),
        "CELERY_WORKER_CONCURRENCY": "1",
        "CELERY_WORKER_MAX_MEMORY_PER_CHILD": "4000000",
        "MAX_MEMORY_USAGE_PERCENT": "99.9",
        "MAX_ATTEMPTS": "1",
    }


def _plain_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
    return kept | {"PYTHONUNBUFFERED": "1", "NO_PROXY": "127.0.0.1,localhost"}


def _cpu_of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def peak_bytes(process: psutil.Process) -> int:
    """The largest resident size that the process ever had (VmHWM)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
