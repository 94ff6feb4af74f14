"""A run: one round per database, each with a stack of its own and as many trials as its share of the time allows."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import text

from chaos.evidence import find_job, find_leftovers, tell_history
from chaos.faults import Fault, deal, list_faults
from chaos.judge import KINDS, Finding, judge_job, judge_leftovers
from chaos.observer import Observer, Watching
from chaos.stack import ChaosStack, running_stack
from chaos.workload import ANSWER_SECONDS, Job, NotAnswered, Workload, draw_jobs, patiently
from ncr_upload.entrypoints.embedded.sockets import LOOPBACK

STUCK_SECONDS = 90.0
"""After every fault has healed. The longest single wait of the service (object storage: 20 s, three times) is within it."""

QUIET_SECONDS = 30.0
TIME_SKIPPED_SECONDS = 120
"""The janitor waits a minute for a worker that died while it cleaned. The judge does not: it moves the due times."""

ENOUGH_ATTEMPTS, SCARCE_ATTEMPTS = 50, 2
THREADS = 48
LOGS = Path("var/chaos")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What was asked for. Without `seconds` and `trials` it is one trial, `only`."""

    seed: int
    databases: tuple[str, ...]
    seconds: float | None = None
    trials: int | None = None
    only: tuple[str, int] | None = None
    faults: str = ""
    sabotage: bool = False


@dataclass
class Tally:
    """What a run came to so far."""

    trials: int = 0
    jobs: int = 0
    databases: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    faults_that_met_nothing: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    listings: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    slowest_answer_seconds: float = 0

    def report(self, plan: Plan, seconds: float) -> dict[str, Any]:
        """`chaos.json`."""
        counts = Counter(finding.kind for finding in self.findings)
        return {
            "seed": plan.seed,
            "trials": self.trials,
            "jobs": self.jobs,
            "seconds": round(seconds, 1),
            "databases": dict(self.databases),
            "faults": dict(sorted(self.faults.items())),
            "faults_that_met_nothing": dict(sorted(self.faults_that_met_nothing.items())),
            **{kind: counts[kind] for kind in KINDS},
            "outcomes": dict(self.outcomes),
            "answers": dict(self.answers),
            "slowest_answer_seconds": round(self.slowest_answer_seconds, 2),
            "listings": dict(self.listings),
            "failures": self.failures,
            "logs": str(LOGS / str(plan.seed)),
            "ok": self.trials > 0 and not self.findings,
        }


async def run_plan(plan: Plan, say: Say) -> dict[str, Any]:
    """Every round; the report."""
    loop, running = asyncio.get_running_loop(), asyncio.current_task()
    assert running is not None
    loop.set_default_executor(ThreadPoolExecutor(THREADS))
    loop.add_signal_handler(signal.SIGTERM, running.cancel)
    began, tally = time.monotonic(), Tally()
    databases = list(plan.databases) if plan.only is None else [plan.only[0]]
    random.Random(f"{plan.seed}: databases").shuffle(databases)
    for position, database in enumerate(databases):
        left = len(databases) - position
        share = None if plan.seconds is None else max(0.0, plan.seconds - (time.monotonic() - began)) / left
        await Round(replace(plan, seconds=share), database, position, len(databases), tally, say).run()
    return tally.report(plan, time.monotonic() - began)


class Round:
    """The trials on one database. In every third round attempts are scarce, so that jobs may fail of the faults."""

    def __init__(self, plan: Plan, database: str, position: int, rounds: int, tally: Tally, say: Say) -> None:
        self._plan = plan
        self._database = database
        self._position = position
        self._rounds = rounds
        self._tally = tally
        self._say = say
        self._scarce = random.Random(f"{plan.seed}: {database}").random() < 1 / 3
        self._failed = False
        self._ended: list[Job] = []

    async def run(self) -> None:
        began = time.monotonic()
        attempts = SCARCE_ATTEMPTS if self._scarce else ENOUGH_ATTEMPTS
        logs = LOGS / str(self._plan.seed) / self._database
        async with running_stack(
            self._database, max_attempts=attempts, keep_logs=lambda: logs if self._failed else None
        ) as stack:
            self._say(f"{self._database}: the stack runs (MAX_ATTEMPTS={attempts}), after {time.monotonic() - began:.0f} s")
            if not stack.destination.is_disk:
                self._say("the destination is no disk of its own (not root, or no mount here): it is never made full")
            observer = Observer(stack.destination.root)
            login = {
                "username": stack.destination.user,
                "client_keys": [str(stack.user_key)],
                "known_hosts": None,
                "config": None,
            }
            address = (LOOPBACK, stack.site.ports["sftp"])
            with Watching(observer, address, str(stack.destination.root), **login):
                for number in self._numbers(began):
                    await self._run_trial(stack, observer, number)
                    if self._failed:
                        break
                await self._judge_quiet(stack, observer)
            self._tally.listings.update(observer.listings)

    def _numbers(self, began: float) -> Any:
        """The trials' numbers, until the share of time or of trials is spent; of time, one fits always."""
        if self._plan.only is not None:
            yield self._plan.only[1]
            return
        number = 0
        while True:
            if self._plan.trials is not None and number * self._rounds + self._position >= self._plan.trials:
                return
            if number > 0 and self._plan.seconds is not None and time.monotonic() - began >= self._plan.seconds:
                return
            yield number
            number += 1

    async def _run_trial(self, stack: ChaosStack, observer: Observer, number: int) -> None:
        began = time.monotonic()
        numbers = random.Random(f"{self._plan.seed}: {self._database}: {number}")
        jobs = draw_jobs(numbers, f"{self._database[0]}{number}", scarce=self._scarce)
        faults = self._deal(stack, numbers, number)
        for job in jobs:
            job.asked.copied = any(fault.copies for fault in faults)
        async with httpx.AsyncClient(
            base_url=stack.site.url("api"),
            headers={"X-API-Key": stack.site.credentials.api_key},
            timeout=ANSWER_SECONDS,
            trust_env=False,
        ) as client:
            workload = Workload(stack, observer, client)
            met = await self._run_under_faults(stack, workload, jobs, faults, numbers)
            seconds = time.monotonic() - began
            findings = await self._judge(stack, observer, jobs, number, met)
        self._tally.trials += 1
        self._tally.jobs += len(jobs)
        self._tally.databases[self._database] += 1
        self._tally.answers.update(workload.answers)
        self._tally.slowest_answer_seconds = max(self._tally.slowest_answer_seconds, workload.slowest_answer_seconds)
        self._ended.extend(jobs)
        for job in jobs:
            observer.settle(job.job_id)
        self._failed |= bool(findings)
        told = "; ".join(f"{name}{'' if hit else ' (met nothing)'}" for name, hit in met.items())
        self._say(f"{self._database}:{number}  {len(jobs)} jobs, {seconds:.1f} s  {told}  {'FAILED' if findings else 'ok'}")

    def _deal(self, stack: ChaosStack, numbers: random.Random, number: int) -> list[Fault]:
        """Through the whole deck in turn, so that a run of some length has made every fault, whatever else it draws."""
        everything = list_faults(self._database, has_disk=stack.destination.is_disk)
        faults = [fault for fault in everything if re.search(self._plan.faults, fault.name)]
        deck = list(faults)
        random.Random(f"{self._plan.seed}: faults").shuffle(deck)
        share = len(deck) // self._rounds * self._position
        return deal(numbers, faults, deck[(share + number) % len(deck)])

    async def _run_under_faults(
        self, stack: ChaosStack, workload: Workload, jobs: Sequence[Job], faults: Sequence[Fault], numbers: random.Random
    ) -> dict[str, bool]:
        await workload.place(jobs)
        running = asyncio.create_task(workload.run(jobs))
        sabotage = asyncio.create_task(_sabotage(stack.destination.root) if self._plan.sabotage else asyncio.sleep(0))
        schedule = [(numbers.uniform(0, 3.5), random.Random(numbers.getrandbits(64)), fault) for fault in faults]
        try:
            met = await asyncio.gather(*(self._inject(stack, *each) for each in schedule))
            stack.heal()
            with suppress(TimeoutError, NotAnswered):  # then the judge finds what is not there
                await asyncio.wait_for(running, STUCK_SECONDS)
        finally:
            for task in (running, sabotage):
                task.cancel()
            await asyncio.gather(running, sabotage, return_exceptions=True)
        names = dict(zip((fault.name for fault in faults), met, strict=True))
        self._tally.faults.update(name for name, hit in names.items() if hit)
        self._tally.faults_that_met_nothing.update(name for name, hit in names.items() if not hit)
        return names

    async def _inject(self, stack: ChaosStack, after_seconds: float, numbers: random.Random, fault: Fault) -> bool:
        await asyncio.sleep(after_seconds)
        return await fault.make(stack, numbers)

    async def _judge(
        self, stack: ChaosStack, observer: Observer, jobs: Sequence[Job], number: int, met: Mapping[str, bool]
    ) -> list[Finding]:
        findings = []
        for job in jobs:
            found = await patiently(
                lambda job=job: asyncio.to_thread(find_job, stack, observer, job.job_id, job.sku)  # type: ignore[misc]
            )
            self._tally.outcomes.update(str(task["status"]) for task in found.tasks)
            judged = judge_job(job.asked, found)
            findings += judged
            if judged:
                self._tally.failures.append(
                    {
                        "trial": f"{self._database}:{number}",
                        "again": f"python tests/chaos/run.py --seed {self._plan.seed} --only {self._database}:{number}",
                        "faults": dict(met),
                        "findings": [asdict(finding) for finding in judged],
                        "history": tell_history(found),
                        "supervisor": stack.remarks[-20:],
                    }
                )
        self._tally.findings += findings
        return findings

    async def _judge_quiet(self, stack: ChaosStack, observer: Observer) -> None:
        """Every earlier job once more, what the API says of each, and what was left behind."""
        stack.heal()
        findings = judge_leftovers(await self._wait_quiet(stack))
        for job in self._ended if not self._failed else []:
            found = await asyncio.to_thread(find_job, stack, observer, job.job_id, job.sku)
            findings += judge_job(job.asked, found)
            findings += await self._differing_answers(stack, job, found.tasks)
        if findings and not self._failed:
            self._tally.failures.append(
                {
                    "trial": f"{self._database}: the end",
                    "findings": [asdict(each) for each in findings],
                    "supervisor": stack.remarks[-20:],
                }
            )
            self._tally.findings += findings
            self._failed = True

    async def _wait_quiet(self, stack: ChaosStack) -> Any:
        deadline, skipped = time.monotonic() + 2 * QUIET_SECONDS, False
        while True:
            left = await patiently(lambda: asyncio.to_thread(find_leftovers, stack))
            if not any(asdict(left).values()) or time.monotonic() > deadline:
                return left
            if not skipped and time.monotonic() > deadline - QUIET_SECONDS:
                skipped = await patiently(lambda: asyncio.to_thread(_skip_time, stack))
            await asyncio.sleep(0.3)

    async def _differing_answers(self, stack: ChaosStack, job: Job, tasks: Sequence[Mapping[str, Any]]) -> list[Finding]:
        """The API's word against the ledger's."""
        findings = []
        headers = {"X-API-Key": stack.site.credentials.api_key}
        async with httpx.AsyncClient(base_url=stack.site.url("api"), headers=headers, timeout=ANSWER_SECONDS) as client:
            for task in tasks:
                answer = await patiently(lambda task=task: client.get(f"/job-status/{task['task_id']}"))  # type: ignore[misc]
                if (told := answer.json().get("status")) != task["status"]:
                    what = f"the API says '{told}' of task {task['task_id']}, the ledger '{task['status']}'"
                    findings.append(Finding("lost", job.job_id, what))
        return findings


async def _sabotage(root: Path) -> None:
    """What the product must never do, done to it."""
    while True:
        with suppress(OSError):  # while a folder is renamed
            for path in await asyncio.to_thread(lambda: list(root.glob("[!.]*/*/*.glb"))):
                path.unlink()
        await asyncio.sleep(0.1)


def _skip_time(stack: ChaosStack) -> bool:
    """As if the janitor's waiting time had passed."""
    with stack.engine.begin() as connection:
        connection.execute(text(f"UPDATE ncr_jobs SET staging_due_at = staging_due_at - {TIME_SKIPPED_SECONDS}"))
    return True
