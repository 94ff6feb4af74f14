"""A worker's whole surroundings on real servers, without Celery: object storage, validator, SFTP server, database."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Engine, text

from ncr_upload.application import download_cache
from ncr_upload.application.attempts import run_task
from ncr_upload.application.crash_points import pass_by
from ncr_upload.application.duties import run_duty
from ncr_upload.domain.jobs import TERMINAL, NewJob, Task
from ncr_upload.domain.timestamps import parse_timestamp
from ncr_upload.entrypoints.bootstrap import deliveries, records
from ncr_upload.entrypoints.embedded.product import Product
from ncr_upload.entrypoints.embedded.studio import Listed, add_job
from ncr_upload.entrypoints.settings import Settings
from servers import S3Server, SftpServer

ATTEMPT = """
import os, sys
from ncr_upload.application.attempts import run_task
from ncr_upload.entrypoints.bootstrap import deliveries
from ncr_upload.entrypoints.crash import crash_points
from ncr_upload.entrypoints.settings import load_settings
settings = load_settings()
ports, options = deliveries.make_worker_ports(settings), deliveries.make_worker_options(settings, "doomed")
run_task(sys.argv[1], ports, options, crash_points(os.environ))
"""


@dataclass
class Workplace:
    """One worker, its database, and what it talks to. `settings` may be changed before a job runs."""

    s3: S3Server
    sftp: SftpServer
    engine: Engine
    settings: Settings
    ran: list[Task] = field(default_factory=list)

    def put_objects(self, objects: Mapping[str, bytes]) -> None:
        for key, content in objects.items():
            self.s3.put(key, content)

    def place(self, job_id: str, product: Product, *, without: str | None = None) -> None:
        """The product in storage and in the studio's tables, awaiting delivery."""
        self.put_objects({key: content for key, content in product.files.items() if key != without})
        self.list_job(job_id, product.sku, list(product.files))

    def list_job(self, job_id: str, sku: str | None, keys: list[str], *, at: str = "2026-11-01 10:00:00") -> int:
        when = parse_timestamp(at)
        assert when is not None
        return add_job(self.engine, job_id, sku, [Listed(key, when) for key in keys])

    def change(self, **settings: Any) -> None:
        self.settings = self.settings.model_copy(update=settings)

    def send_to(self, sftp: SftpServer) -> None:
        """Deliver to this server from now on."""
        self.sftp, login = sftp, sftp.login
        self.change(
            sftp_host=login.host,
            sftp_port=login.port,
            sftp_username=login.username,
            sftp_password=SecretStr(login.password) if login.password else None,
            sftp_private_key=login.private_key,
            sftp_host_key=login.host_key,
            sftp_base_dir=sftp.base_dir,
        )

    def deliver(self, job_id: str, row_id: int | None = None) -> Task:
        """Submit the job and try it until it has ended."""
        (task,) = self.submit(job_id, row_id)
        for _ in range(20):
            ended = self.attempt(task)
            if ended.status in TERMINAL:
                return ended
            self.let_time_pass()
        raise AssertionError(f"not ended: {ended}")

    def let_time_pass(self) -> None:
        """Waiting tasks are due; leases of workers that are gone have run out."""
        with self.engine.begin() as connection:
            connection.execute(text("UPDATE ncr_jobs SET claimable_at = 1 WHERE claimable_at IS NOT NULL"))

    def submit(self, job_id: str, row_id: int | None = None) -> list[Task]:
        submissions = self.ports().submissions
        return submissions.accept([NewJob(job_id, "ann", "spring", row_id)], batch_id=None, release=1)  # type: ignore[return-value]

    def attempt(self, task: Task, reach: Callable[[str], None] = pass_by) -> Task:
        """One attempt; the task as it is afterwards."""
        ports = self.ports()
        run_task(task.task_id, ports, deliveries.make_worker_options(self.settings, "test-worker"), reach)
        found = ports.submissions.task(task.task_id)
        assert found is not None
        return found

    def start_attempt(self, task: Task, cwd: Path, crash_at: str = "") -> subprocess.Popen[bytes]:
        """One attempt in a process of its own, which may be killed, or kills itself at that crash point."""
        environment = self._environment() | {"NCR_TESTING": "1", "NCR_CRASH_AT": crash_at}
        return subprocess.Popen([sys.executable, "-c", ATTEMPT, task.task_id], env=environment, cwd=cwd)

    def _environment(self) -> dict[str, str]:
        """The settings as a program of its own reads them."""
        values = {}
        for name, value in self.settings.model_dump().items():
            if isinstance(value, SecretStr):
                value = value.get_secret_value()
            if value not in (None, ()):
                values[name.upper()] = str(value)
        return dict(os.environ) | values

    def sweep(self, task: Task) -> None:
        """What the sweeper does, or has a worker do, some seconds after a task has ended."""
        self.sweep_work_dir(self.settings.work_dir)
        with self.engine.begin() as connection:
            connection.execute(text("UPDATE ncr_jobs SET staging_due_at = 1 WHERE staging_due_at IS NOT NULL"))
        self.attempt(task)

    def sweep_work_dir(self, work_dir: Path) -> list[str]:
        """What the main process of a worker with this WORK_DIR does every few seconds."""
        return records.sweep_work_dir(self.settings.model_copy(update={"work_dir": work_dir}))

    def probe(self) -> None:
        """What the sweeper has one worker do when the probe of a parked destination is due."""
        with self.engine.begin() as connection:
            connection.execute(text("UPDATE ncr_parked_destinations SET probe_at = since - 1"))
        options, ports = deliveries.make_worker_options(self.settings, "test-worker"), self.ports()
        run_duty("probe", ports.pipeline, ports.duties, options.parking, options.janitor)

    def ports(self) -> Any:
        return deliveries.make_worker_ports(self.settings)

    def delivered(self, job_id: str) -> dict[str, bytes] | None:
        """What the partner sees of the job: path below the job's folder → content; None if there is no such folder."""
        folder = self.sftp.folder / job_id
        if not folder.exists():
            return None
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def leftovers(self, waiting: Task | None = None) -> list[str]:
        """What should not be there once nothing runs: staging folders and workspaces, not the cache. A waiting task keeps, in
        one workspace, what it has downloaded whole."""
        staging, work_dir = self.sftp.folder / ".ncr-staging", self.settings.work_dir
        found = [path for place in (staging, work_dir) if place.exists() for path in place.iterdir()]
        found = [path for path in found if path != work_dir / download_cache.FOLDER]
        if waiting is None:
            return [path.name for path in found]
        kept = [path for path in found if path.parent == work_dir and path.is_dir() and path.name.startswith(waiting.task_id)]
        partial = [path for folder in kept for path in folder.iterdir() if path.name.endswith(".part")]
        return [path.name for path in [*found, *partial] if path not in kept[:1]]

    def history(self, task: Task) -> list[str]:
        return [f"{event.kind}: {event.message}" for event in self.ports().submissions.history(task.task_id)]

    def studio_rows(self, table: str) -> list[dict[str, Any]]:
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(f"SELECT * FROM {table}")).mappings()]
