"""Whatever callers, workers, the sweeper and faults do to a ledger, in any order: it stays what a model in plain Python says.

Another database joins by a line in `BOOKS`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test
from sqlalchemy import Engine, delete, event, func, insert, select

from databases import Databases
from fault_table import fault
from ledgers import Ledger, memory_ledger, sql_ledger
from ncr_upload.adapters.sql.catalogue import email
from ncr_upload.adapters.sql.tables import metadata
from ncr_upload.application.ports import AlreadyLive, CancelAnswer, Idempotency, KeyReused
from ncr_upload.domain.errors import CancelRequested, LeaseLost, Unavailable
from ncr_upload.domain.jobs import LIVE, TERMINAL, Claim, NewJob, Problem, Stage, Status, Task, may_follow
from ncr_upload.domain.retries import LOOKS
from studio_rows import open_database

MAX_ATTEMPTS = 3

BATCH_SIZE = 2
LONG = 3600.0
PROBLEM = Problem("p", "transient", "it went wrong", "look")
FULL = Unavailable("database_unavailable", "the studio's table is full", "Make room.")
ALL = 10_000


@dataclass(frozen=True)
class Books:
    """A ledger with nothing in it, and how many rows the recordings of a task have left."""

    ledger: Ledger
    record: Callable[[Any, str], None]
    count: Callable[[str], int]


def memory_books() -> Books:
    recorded: list[str] = []
    return Books(memory_ledger(), lambda _, task_id: recorded.append(task_id), recorded.count)


def sql_books(engine: Engine) -> Books:
    with engine.begin() as connection:
        for table in [*metadata.sorted_tables, email]:
            connection.execute(delete(table))

    def record(connection: Any, task_id: str) -> None:
        connection.execute(insert(email).values(sku=task_id, status="Waiting", campagin="spring"))

    def count(task_id: str) -> int:
        with engine.connect() as connection:
            return int(connection.execute(select(func.count()).where(email.c.sku == task_id)).scalar_one())

    return Books(sql_ledger(engine), record, count)


class When(Enum):
    """When a task may be claimed next, or its staging removed."""

    NOW = "now"
    LATER = "later"
    HELD = "held by its batch"
    NEVER = "never"


@dataclass
class Expected:
    """A task as the model has it."""

    task_id: str
    job_id: str
    batch_id: str | None
    when: When
    status: Status = Status.PENDING
    attempt: int = 0
    fence: int = 0
    has_worker: bool = False
    cancel_requested: bool = False
    announced: bool = False
    staging: When = When.NEVER
    recorded: int = 0
    finished_by: int | None = None
    kinds: list[str] = field(default_factory=lambda: ["accepted"])

    @property
    def is_live(self) -> bool:
        return self.status in LIVE

    @property
    def may_try(self) -> bool:
        return self.attempt < MAX_ATTEMPTS + (LOOKS if self.announced else 0)

    @property
    def is_claimable(self) -> bool:
        return self.is_live and self.when is When.NOW and self.may_try

    def owned_by(self, claim: Claim) -> bool:
        return self.is_live and self.has_worker and self.fence == claim.fence

    def may_become(self, status: Status) -> bool:
        return self.status is status or may_follow(self.status, status)

    def end(self, status: Status) -> None:
        self.status, self.when = status, When.NEVER
        self.kinds.append(status.value)


class LedgerMachine(RuleBasedStateMachine):
    tasks: Bundle[str] = Bundle("tasks")
    claims: Bundle[Claim] = Bundle("claims")
    job_ids = st.sampled_from(["job-1", "job-2", "job-3", "job-4"])
    chance = st.booleans()

    def __init__(self, open_books: Callable[[], Books]) -> None:
        super().__init__()
        self.books = open_books()
        self.ledger = self.books.ledger
        self.model: dict[str, Expected] = {}
        self.keys: dict[str, tuple[str, list[str]]] = {}
        self.bells: list[str] = []
        self.claimed: list[Claim] = []
        self.touched: set[str] = set()
        self.batches = 0

    def of(self, task_id: str) -> Expected:
        self.touched.add(task_id)
        return self.model[task_id]

    def live_of(self, job_ids: Sequence[str]) -> dict[str, str]:
        return {task.job_id: task.task_id for task in self.model.values() if task.is_live and task.job_id in job_ids}

    # --- callers

    @rule(target=tasks, job_id=job_ids, key=st.sampled_from([None, None, "key-1", "key-2"]))
    def submit(self, job_id: str, key: str | None) -> Any:
        return self._accept([job_id], None, key, skip_live=False)

    @rule(
        target=tasks,
        job_ids=st.lists(job_ids, min_size=1, max_size=4, unique=True),
        key=st.sampled_from([None, None, "key-1", "key-2"]),
        skip_live=chance,
    )
    def submit_batch(self, job_ids: list[str], key: str | None, skip_live: bool) -> Any:
        self.batches += 1
        return self._accept(job_ids, f"batch-{self.batches}", key, skip_live=skip_live)

    def _accept(self, job_ids: Sequence[str], batch_id: str | None, key: str | None, *, skip_live: bool) -> Any:
        asked = hashlib.sha256(repr((list(job_ids), batch_id is None)).encode()).hexdigest()
        answer = self.ledger.submissions.accept(
            [NewJob(job_id, "ann", "spring") for job_id in job_ids],
            batch_id=batch_id,
            release=BATCH_SIZE,
            skip_live=skip_live,
            idempotency=None if key is None else Idempotency(key, asked),
        )
        if key in self.keys:
            first, task_ids = self.keys[key]
            if asked != first:
                assert answer == KeyReused(key)
            else:
                assert isinstance(answer, list)
                assert [each.task_id for each in answer] == task_ids
            return multiple()
        running = self.live_of(job_ids)
        if running and (not skip_live or len(running) == len(job_ids)):
            assert isinstance(answer, list)
            assert {each: each for each in answer} == {AlreadyLive(*pair): AlreadyLive(*pair) for pair in running.items()}
            return multiple()
        assert isinstance(answer, list)
        taken = [task for task in answer if isinstance(task, Task)]
        assert [task.job_id for task in taken] == [job_id for job_id in job_ids if job_id not in running]
        for number, task in enumerate(taken):
            when = When.NOW if number < BATCH_SIZE else When.HELD
            self.model[task.task_id] = Expected(task.task_id, task.job_id, batch_id, when)
            self.touched.add(task.task_id)
        self.bells += [task.task_id for task in taken[:BATCH_SIZE]]
        if key is not None:
            self.keys[key] = (asked, [task.task_id for task in taken])
        return multiple(*(task.task_id for task in taken))

    @rule(task_id=tasks)
    def cancel(self, task_id: str) -> None:
        assert self.ledger.submissions.cancel(task_id) is self._cancelled(self.of(task_id))

    @rule(task_id=tasks)
    def cancel_its_batch(self, task_id: str) -> None:
        batch_id = self.model[task_id].batch_id
        if batch_id is not None:
            told = self.ledger.submissions.cancel_batch(batch_id)
            mine = [each for each in self.model.values() if each.batch_id == batch_id]
            answers = [self._cancelled(self.of(each.task_id)) for each in mine]
            assert told == {answer: answers.count(answer) for answer in answers}

    @staticmethod
    def _cancelled(task: Expected) -> CancelAnswer:
        if not task.is_live:
            return CancelAnswer.CANCELLED if task.status is Status.CANCELLED else CancelAnswer.ENDED
        if task.announced:
            return CancelAnswer.PUBLISHING
        task.cancel_requested = True
        if task.has_worker:
            task.kinds.append("cancel_requested")
            return CancelAnswer.REQUESTED
        task.end(Status.CANCELLED)
        return CancelAnswer.CANCELLED

    # --- workers

    @rule(target=claims, task_id=tasks)
    def claim(self, task_id: str) -> Any:
        task = self.of(task_id)
        claim = self.ledger.claims.claim(task_id, "w1", LONG)
        if not task.is_claimable:
            assert claim is None
            return multiple()
        assert claim is not None
        assert claim.fence > task.fence, "a newer claim has a newer fence"
        assert (claim.cancel_requested, claim.publish_fence is not None) == (task.cancel_requested, task.announced)
        task.status, task.when, task.has_worker = Status.PROCESSING, When.LATER, True
        task.attempt, task.fence = task.attempt + 1, claim.fence
        task.kinds.append("claimed")
        self.claimed = [*self.claimed[-5:], claim]
        return claim

    @rule(target=claims)
    def answer_the_bell(self) -> Any:
        return self.claim(self.bells.pop(0)) if self.bells else multiple()

    @rule(target=claims, claim=claims)
    def take_over(self, claim: Claim) -> Any:
        """The worker stands still, its lease runs out, and another worker has the task."""
        self.let_time_pass(claim.task.task_id)
        return self.claim(claim.task.task_id)

    @rule()
    def write_under_every_claim_that_was_lost(self) -> None:
        for claim in self.claimed:
            task = self.of(claim.task.task_id)
            if task.owned_by(claim) or task.finished_by == claim.fence:
                continue
            self._try_every_write(claim)
            self.advance(claim, Status.PROCESSING, staging=True)
            end = Status.FAILED if task.is_live else task.status
            self._passes(claim, {LeaseLost}, lambda stale=claim, end=end: self._finish(stale, end))

    @rule(claim=claims)
    def cancel_what_runs(self, claim: Claim) -> None:
        self.cancel(claim.task.task_id)
        self._try_every_write(claim)

    def _try_every_write(self, claim: Claim) -> None:
        self.renew(claim)
        self.announce_publish(claim)
        self.retract_publish(claim)
        self.put_back(claim, 0.0, spend=False)

    @rule(claim=claims)
    def renew(self, claim: Claim) -> None:
        task = self.of(claim.task.task_id)
        if self._passes(claim, {CancelRequested} if task.cancel_requested else set(), lambda: self.ledger.claims.renew(claim)):
            task.when = When.LATER

    @rule(claim=claims, status=st.sampled_from([Status.PROCESSING, Status.VALIDATION_PASSED, Status.UPLOADING]), staging=chance)
    def advance(self, claim: Claim, status: Status, staging: bool) -> None:
        task = self.of(claim.task.task_id)
        if self._passes(claim, self._illegal(task, status), lambda: self._advance(claim, status, announce_staging=staging)):
            self._advanced(task, status)
            task.staging = When.NOW if staging else task.staging

    @rule(claim=claims)
    def upload(self, claim: Claim) -> None:
        self.advance(claim, Status.VALIDATION_PASSED, staging=True)
        self.advance(claim, Status.UPLOADING, staging=False)

    @rule(claim=claims)
    def upload_and_announce_publish(self, claim: Claim) -> None:
        self.upload(claim)
        self.announce_publish(claim)

    @rule(claim=claims)
    def announce_publish(self, claim: Claim) -> None:
        task = self.of(claim.task.task_id)
        refused = self._illegal(task, Status.UPLOADING) | ({CancelRequested} if task.cancel_requested else set())
        if self._passes(claim, refused, lambda: self._advance(claim, Status.UPLOADING, announce_publish=True)):
            self._advanced(task, Status.UPLOADING)
            task.announced = True

    @rule(claim=claims)
    def retract_publish(self, claim: Claim) -> None:
        task = self.of(claim.task.task_id)
        refused = self._illegal(task, Status.PROCESSING)
        if self._passes(claim, refused, lambda: self._advance(claim, Status.PROCESSING, retract_publish=True)):
            self._advanced(task, Status.PROCESSING)
            task.announced = False

    def _advance(self, claim: Claim, status: Status, **more: bool) -> None:
        self.ledger.claims.advance(claim, status=status, stage=Stage.UPLOAD, message="", **more)

    @staticmethod
    def _advanced(task: Expected, status: Status) -> None:
        task.status = status
        task.kinds.append("stage")

    @rule(claim=claims, delay=st.sampled_from([0.0, LONG]), spend=chance)
    def put_back(self, claim: Claim, delay: float, spend: bool) -> None:
        task = self.of(claim.task.task_id)

        def put_back() -> None:
            self.ledger.claims.put_back(claim, problem=PROBLEM, message="", delay_seconds=delay, spend_attempt=spend)

        if self._passes(claim, {CancelRequested} if task.cancel_requested else set(), put_back):
            task.status, task.has_worker = Status.PENDING, False
            task.when = When.LATER if delay else When.NOW
            task.attempt -= 0 if spend else 1
            task.kinds.append("put_back")

    @rule(
        claim=claims,
        end=st.sampled_from([Status.COMPLETED, Status.VALIDATION_FAILED, Status.FAILED]),
        breaks=chance,
        times=st.integers(1, 2),
    )
    def finish(self, claim: Claim, end: Status, breaks: bool, times: int) -> None:
        """As a worker does: completed once it has published, cancelled once it was asked. `times`: the answer was lost."""
        task = self.of(claim.task.task_id)
        status = Status.CANCELLED if task.cancel_requested else Status.COMPLETED if task.announced else end
        if status is Status.COMPLETED and not task.announced:
            status = Status.FAILED
        refused = self._illegal(task, status)
        if task.status is status and task.finished_by == claim.fence:
            self._finish(claim, status)  # the answer was lost, and it is said again
        elif not breaks or not task.owned_by(claim) or refused:
            if self._passes(claim, refused, lambda: [self._finish(claim, status) for _ in range(times)]):
                task.end(status)
                task.finished_by = claim.fence
                task.recorded += 1
                task.staging = When.LATER if task.staging is not When.NEVER else When.NEVER
        else:
            with pytest.raises(Unavailable):
                self._finish(claim, status, breaks=True)

    def _finish(self, claim: Claim, status: Status, *, breaks: bool = False) -> None:
        def record(connection: Any) -> None:
            if breaks and connection is None:  # the twin has no transaction to roll back
                raise FULL
            self.books.record(connection, claim.task.task_id)
            if breaks:
                raise FULL

        self.ledger.claims.finish(claim, status=status, stage=Stage.DONE, message="", problem=None, also=record)

    @rule(claim=claims, times=st.integers(1, 2))
    def deliver(self, claim: Claim, times: int) -> None:
        """The whole way; its staging stays behind, and whoever had the task before comes back."""
        self.upload_and_announce_publish(claim)
        self.finish(claim, Status.FAILED, breaks=False, times=times)
        self.let_time_pass(claim.task.task_id)
        self.write_under_every_claim_that_was_lost()

    @staticmethod
    def _illegal(task: Expected, status: Status) -> set[type[Exception]]:
        return set() if task.may_become(status) else {LeaseLost}

    def _passes(self, claim: Claim, refused: set[type[Exception]], write: Callable[[], object]) -> bool:
        """Whether the write is to pass. One under a claim that is not the task's own any more never does."""
        task = self.model[claim.task.task_id]
        refused = refused if task.owned_by(claim) else refused | {LeaseLost}
        if not refused:
            write()
            return True
        with pytest.raises(tuple(refused)):
            write()
        return False

    # --- time and faults

    @rule(task_id=tasks)
    def let_time_pass(self, task_id: str) -> None:
        """A lease runs out, a delay is over, a hold on the cleaning ends."""
        task = self.of(task_id)
        if task.when is When.LATER:
            self.ledger.expire(self._task(task_id))
            task.when = When.NOW
        if task.staging is When.LATER:
            self.ledger.forget_grace(self._task(task_id))
            task.staging = When.NOW

    def _task(self, task_id: str) -> Task:
        found = self.ledger.submissions.task(task_id)
        assert found is not None
        return found

    @rule()
    def wipe_redis(self) -> None:
        self.bells.clear()

    # --- the sweeper and the janitor

    @rule()
    def ring_what_is_due(self) -> None:
        self.bells = [*self.ledger.recovery.abandoned(ALL), *self.ledger.recovery.due(ALL)]

    @rule()
    def give_up_the_exhausted(self) -> None:
        for dead in self.ledger.recovery.exhausted(ALL):
            assert self.ledger.recovery.give_up(dead, PROBLEM)
            assert not self.ledger.recovery.give_up(dead, PROBLEM)
            task = self.of(dead.task_id)
            assert not task.may_try
            task.end(Status.FAILED)

    @rule(task_id=tasks)
    def give_up_what_is_not_exhausted(self, task_id: str) -> None:
        """What the sweeper had listed has moved on meanwhile."""
        task = self.of(task_id)
        if task.when is not When.NOW:
            assert not self.ledger.recovery.give_up(self._task(task_id), PROBLEM)

    @rule()
    def release_batch_jobs(self) -> None:
        released = self.ledger.recovery.release_batch_jobs(BATCH_SIZE)
        expected: list[str] = []
        for batch_id in {task.batch_id for task in self.model.values() if task.batch_id}:
            live = [task for task in self.model.values() if task.batch_id == batch_id and task.is_live]
            held = [task.task_id for task in live if task.when is When.HELD]
            expected += held[: max(0, BATCH_SIZE - (len(live) - len(held)))]
        assert sorted(released) == sorted(expected)
        for task_id in released:
            self.of(task_id).when = When.NOW
        self.bells += released

    @rule(task_id=tasks, done=chance)
    def clean(self, task_id: str, done: bool) -> None:
        task = self.of(task_id)
        taken = self.ledger.cleaning.take_cleaning(task_id, LONG)
        assert taken is (not task.is_live and task.staging is When.NOW)
        if taken:
            assert not self.ledger.cleaning.take_cleaning(task_id, LONG)
            task.staging = When.LATER
            if done:
                self.ledger.cleaning.cleaned(task_id)
                task.staging = When.NEVER

    # --- what holds after every step

    @invariant()
    def what_can_be_claimed_is_named_with_redis_empty(self) -> None:
        live = [task for task in self.model.values() if task.is_live and task.when is When.NOW]
        recovery = self.ledger.recovery
        assert set(recovery.due(ALL)) == {task.task_id for task in live if task.may_try and not task.has_worker}
        assert set(recovery.abandoned(ALL)) == {task.task_id for task in live if task.may_try and task.has_worker}
        assert {task.task_id for task in recovery.exhausted(ALL)} == {task.task_id for task in live if not task.may_try}

    @invariant()
    def what_was_left_at_the_destination_is_named(self) -> None:
        left = {task.task_id for task in self.model.values() if not task.is_live and task.staging is When.NOW}
        assert set(self.ledger.cleaning.unclean(ALL)) == left

    @invariant()
    def one_live_task_per_job_and_none_of_them_stuck(self) -> None:
        page = self.ledger.submissions.active(username=None, campaign=None, status=None, limit=ALL, cursor=None)
        expected = {task.task_id: (task.status, task.attempt) for task in self.model.values() if task.is_live}
        assert {task.task_id: (task.status, task.attempt) for task in page.tasks} == expected
        assert len({task.job_id for task in page.tasks}) == len(page.tasks) == page.total
        for task in page.tasks:
            assert self.model[task.task_id].when is not When.NEVER
            assert task.attempt <= MAX_ATTEMPTS + LOOKS

    @invariant()
    def what_changed_is_as_the_model_says_with_each_step_in_its_history(self) -> None:
        for task_id in self.touched:
            self._compare(self.model[task_id])
        self.touched.clear()

    def _compare(self, expected: Expected) -> None:
        task = self._task(expected.task_id)
        assert (task.status, task.attempt) == (expected.status, expected.attempt)
        assert (task.finished_at is not None) is (not expected.is_live)
        history = self.ledger.submissions.history(expected.task_id)
        assert [each.kind for each in history] == expected.kinds
        assert all(each.actor for each in history)
        assert sum(each.kind in {status.value for status in TERMINAL} for each in history) == (not expected.is_live)
        assert self.books.count(expected.task_id) == expected.recorded <= 1
        assert not (expected.announced and expected.status is Status.CANCELLED)

    # --- and in the end

    def teardown(self) -> None:
        for expected in self.model.values():
            self._compare(expected)
        for _ in range(MAX_ATTEMPTS + LOOKS + len(self.model) + 1):
            if not self._go_on():
                return
        raise AssertionError("a task never ends although its workers die, the sweeper comes and time passes")

    def _go_on(self) -> bool:
        """Every worker dies, time passes, the sweeper comes; whether a task is still live."""
        for task in self.ledger.submissions.active(username=None, campaign=None, status=None, limit=ALL, cursor=None).tasks:
            if task.status is not Status.PENDING or task.due_at is not None:
                self.ledger.expire(task)
        for task_id in [*self.ledger.recovery.abandoned(ALL), *self.ledger.recovery.due(ALL)]:
            assert self.ledger.claims.claim(task_id, "w2", LONG) is not None
        for dead in self.ledger.recovery.exhausted(ALL):
            assert self.ledger.recovery.give_up(dead, PROBLEM)
        self.ledger.recovery.release_batch_jobs(BATCH_SIZE)
        return self.ledger.submissions.active(username=None, campaign=None, status=None, limit=1, cursor=None).total > 0


@contextmanager
def open_kind(kind: str, databases: Databases, folder: Path) -> Iterator[Callable[[], Books]]:
    if kind == "memory":
        yield memory_books
        return
    engine = open_database(databases.create(kind, folder))
    if kind == "sqlite":
        engine.dispose()
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    try:
        yield lambda: sql_books(engine)
    finally:
        engine.dispose()


BOOKS = {"memory": 60, "sqlite": 16, "postgresql": 4, "mariadb": 4}
"""How many examples each kind gets, of 40 steps each. `LEDGER_EXAMPLES=2000` searches for longer."""


@fault(
    "Ledger: any order of events",
    injector="Hypothesis, stateful",
    invariants="LOSRH",
    outcome="no task lost, doubled, stuck or recorded twice",
)
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", BOOKS)
def test_in_any_order_of_events_a_task_is_neither_lost_nor_stuck_nor_ended_twice(
    kind: str, databases: Databases, tmp_path: Path
) -> None:
    with open_kind(kind, databases, tmp_path) as open_books:
        run_state_machine_as_test(
            lambda: LedgerMachine(open_books),
            settings=settings(
                max_examples=int(os.environ.get("LEDGER_EXAMPLES", BOOKS[kind])),
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
