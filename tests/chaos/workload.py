"""What a trial asks of the service, and what it was answered: jobs drawn by seed, submitted as impatient callers do."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import httpx
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from chaos.judge import ENDED, Asked, Expected
from chaos.observer import Observer
from chaos.stack import ChaosStack
from chaos.versions import Version, draw_version
from ncr_upload.entrypoints.embedded.samples import put_objects
from ncr_upload.entrypoints.embedded.studio import Listed, add_job

T = TypeVar("T")
USER, CAMPAIGN = "chaos", "chaos"
ANSWER_SECONDS = 15.0
PATIENCE_SECONDS = 120.0


class NotAnswered(Exception):
    """The API or the database was asked for PATIENCE_SECONDS, long after every fault had healed."""


@dataclass
class Job:
    """One job of a trial: its versions in order and how its caller behaves."""

    asked: Asked
    versions: list[Version]
    begins_after_seconds: float
    in_batch: bool = False
    submits: int = 1
    key: str | None = None
    cancel_after_seconds: float | None = None
    left_out: str | None = None

    @property
    def sku(self) -> str:
        return self.versions[0].sku

    @property
    def job_id(self) -> str:
        return self.asked.job_id


def draw_jobs(numbers: random.Random, name: str, *, scarce: bool) -> list[Job]:
    """3 to 6 jobs of all sorts; 2 to 4 of them make a batch now and then."""
    jobs = [_draw_job(numbers, f"{name}-{position}", scarce) for position in range(numbers.randint(3, 6))]
    if numbers.random() < 0.3:
        for job in jobs[: numbers.randint(2, 4)]:
            job.in_batch, job.submits, job.key = True, 1, None
            job.begins_after_seconds = jobs[0].begins_after_seconds
    return jobs


def _draw_job(numbers: random.Random, job_id: str, scarce: bool) -> Job:
    sort = numbers.choices(
        ("small", "large", "redelivered", "refused", "missing", "cancelled"), weights=(33, 14, 28, 8, 7, 10)
    )[0]
    expected: Expected = {"refused": "refused", "missing": "missing"}.get(sort, "delivered")  # type: ignore[assignment]
    versions = [
        draw_version(numbers, job_id, number, large=sort == "large", broken=sort == "refused")
        for number in range(1, 3 if sort == "redelivered" else 2)
    ]
    job = Job(Asked(job_id, expected, scarce=scarce), versions, numbers.uniform(0, 1.5))
    job.submits = numbers.choices((1, 2, 4), weights=(70, 20, 10))[0]
    job.key = uuid.UUID(int=numbers.getrandbits(128)).hex if numbers.random() < 0.4 else None
    job.cancel_after_seconds = numbers.uniform(0, 3) if sort == "cancelled" else None
    job.left_out = numbers.choice(sorted(versions[0].objects)) if sort == "missing" else None
    return job


@dataclass
class Workload:
    """Runs the jobs of one trial. `slowest_answer_seconds` is of the answers that came."""

    stack: ChaosStack
    observer: Observer
    client: httpx.AsyncClient
    slowest_answer_seconds: float = 0
    answers: dict[str, int] = field(default_factory=dict)

    async def place(self, jobs: Sequence[Job]) -> None:
        """Every version's objects, and each job's first upload in the studio's tables. Before the faults begin."""
        objects = {
            key: content
            for job in jobs
            for version in job.versions
            for key, content in version.objects.items()
            if key != job.left_out
        }
        await patiently(lambda: asyncio.to_thread(put_objects, self.stack.bucket, objects))
        for job in jobs:
            await self._upload(job, job.versions[0])

    async def run(self, jobs: Sequence[Job]) -> None:
        """Returns when each job has ended. Bounded by its caller."""
        alone = [self._run_alone(job) for job in jobs if not job.in_batch]
        batch = [job for job in jobs if job.in_batch]
        await asyncio.gather(*alone, *([self._run_batch(batch)] if batch else []))

    async def _upload(self, job: Job, version: Version) -> None:
        """What the artist does: the job awaits delivery with this version's files."""
        if job.asked.expected == "delivered":
            job.asked.versions.append(version.hashes)
            self.observer.watch(job.job_id, version.sizes)
        elif version.number == 1:
            self.observer.watch(job.job_id, {})
        now = datetime.now(UTC).replace(tzinfo=None, microsecond=0)
        listed = [Listed(key, now) for key in version.objects]
        await patiently(
            lambda: asyncio.to_thread(add_job, self.stack.engine, job.job_id, version.sku, listed, campaign=CAMPAIGN)
        )

    async def _run_alone(self, job: Job, sent: int = 0) -> None:
        await asyncio.sleep(job.begins_after_seconds)
        for version in job.versions[sent:]:
            if version.number > 1:
                if not await self._was_delivered(job):
                    return
                await self._upload(job, version)
                job.key = None
            first, *_ = await asyncio.gather(*(self._submit(job) for _ in range(job.submits)))
            if job.cancel_after_seconds is not None and first is not None:
                await asyncio.sleep(job.cancel_after_seconds)
                await self._cancel(job, first)
            await self._wait_ended(job)

    async def _run_batch(self, jobs: Sequence[Job]) -> None:
        await asyncio.sleep(jobs[0].begins_after_seconds)
        body = [_body(job) for job in jobs]
        answer = await self._post("/process-batch", body, uuid.uuid4().hex)
        for each in answer.json().get("jobs", []):
            for job in jobs:
                if job.job_id == each["job_id"]:
                    job.asked.accepted.add(each["task_id"])
        await asyncio.gather(*(self._go_on(job) for job in jobs))

    async def _go_on(self, job: Job) -> None:
        """After its first version went with the batch."""
        await self._wait_ended(job)
        job.begins_after_seconds = 0
        job.cancel_after_seconds = None
        await self._run_alone(job, sent=1)

    async def _submit(self, job: Job) -> str | None:
        answer = await self._post("/process-job", _body(job), job.key)
        found = answer.json()
        if answer.status_code == 202:
            job.asked.accepted.add(found["task_id"])
        return found.get("task_id")

    async def _cancel(self, job: Job, task_id: str) -> None:
        job.asked.cancelled.add(task_id)
        answer = await self._post(f"/jobs/{task_id}/cancel", None, None)
        if answer.status_code == 202:
            job.asked.cancel_confirmed.add(task_id)

    async def _post(self, path: str, body: Any, key: str | None) -> httpx.Response:
        """Asked again until there is an answer that is none of 5xx."""

        async def ask() -> httpx.Response:
            began = time.monotonic()
            headers = {"Idempotency-Key": key} if key else {}
            answer = await self.client.post(path, json=body, headers=headers)
            self.slowest_answer_seconds = max(self.slowest_answer_seconds, time.monotonic() - began)
            name = str(answer.status_code)
            self.answers[name] = self.answers.get(name, 0) + 1
            if answer.status_code >= 500:
                raise httpx.HTTPStatusError(f"{path}: {answer.text}", request=answer.request, response=answer)
            return answer

        return await patiently(ask)

    async def _was_delivered(self, job: Job) -> bool:
        return any(task["status"] == "completed" for task in await self.tasks(job))

    async def _wait_ended(self, job: Job) -> None:
        while not _have_ended(await self.tasks(job)):  # noqa: ASYNC110 - it is another process that ends them
            await asyncio.sleep(0.15)

    async def tasks(self, job: Job) -> list[dict[str, Any]]:
        """The job's rows in the ledger, past every proxy."""
        query = text("SELECT * FROM ncr_jobs WHERE job_id = :job_id ORDER BY id").bindparams(job_id=job.job_id)
        return await patiently(lambda: asyncio.to_thread(self._read, query))

    def _read(self, query: Any) -> list[dict[str, Any]]:
        with self.stack.engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]


def _have_ended(tasks: Sequence[dict[str, Any]]) -> bool:
    return bool(tasks) and all(task["status"] in ENDED for task in tasks)


def _body(job: Job) -> dict[str, Any]:
    return {"job_id": job.job_id, "username": USER, "campaign": CAMPAIGN}


async def patiently(act: Callable[[], Awaitable[T]]) -> T:
    """Act again until it works: the part may be away just now. Raises `NotAnswered`."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return await act()
        except (httpx.HTTPError, SQLAlchemyError, OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise NotAnswered(f"{type(error).__name__}: {str(error)[:300]}") from error
            await asyncio.sleep(0.2)
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "obstore" or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)
