"""One attempt, on twins: what callers see live, what is settled, and what stops a worker that lost its claim."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from fault_table import fault
from ledger_twin import MemoryHost, MemoryJobQueue, MemoryLedger, MemoryStatusBoard, MemoryWorkerReports
from ncr_upload.adapters.zip_archive import ZipArchiver
from ncr_upload.application import download_cache
from ncr_upload.application.attempts import Settled, WorkerOptions, WorkerPorts, run_task
from ncr_upload.application.crash_points import CRASH_POINTS
from ncr_upload.application.download_cache import DownloadCache, describe
from ncr_upload.application.duties import run_duty
from ncr_upload.application.janitor import JanitorOptions
from ncr_upload.application.parking import ParkingOptions
from ncr_upload.application.pipeline import PipelineOptions, PipelinePorts
from ncr_upload.application.ports import CancelAnswer, Fetched, Memory, Recording, StudioJob, Verdict
from ncr_upload.application.recovery import ReleaseLimits, SweepPorts, sweep
from ncr_upload.domain.admission import AdmissionLimits
from ncr_upload.domain.errors import Deferred, DestinationParked, Rejected, Unavailable
from ncr_upload.domain.jobs import NewJob, Problem, Stage, Status, Task
from ncr_upload.domain.packages import SourceFile
from ncr_upload.domain.retries import LOOKS, RetryLimits
from twins import MemoryDropoff, MemoryObjectStore, MemoryValidator, Staging

OBJECTS = {"a/GLB_files/x.glb": b"model" * 1000, "a/renders/front.jpg": b"jpeg" * 1000}
JANITOR = JanitorOptions(every_seconds=600, keep_staging_seconds=3600, keep_keys_seconds=3600)
PARKING = ParkingOptions(probe_seconds=30, park_seconds=3600)
AWAY = Unavailable("validator_undecided", "the validator did not answer", "Look at it.")
NO = Verdict(False, "Invalid", 200, "{}", ("error: SKU1/SKU1.glb is broken",))


class MemoryCatalogue:
    """A studio with one job; `written` are the recordings that were carried out."""

    def __init__(self) -> None:
        self.awaiting = True
        self.written: list[str] = []

    def find_job(self, job_id: str, row_id: int | None) -> StudioJob:
        return StudioJob(row_id or 1, "SKU1", self.awaiting)

    def list_files(self, job_id: str) -> Sequence[SourceFile]:
        return [SourceFile(key, "2026-11-01 10:00:00") for key in OBJECTS]

    def delivered(self, task: Task, sku: str) -> Recording:
        return self._noting("delivered")

    def rehearsed(self, task: Task, sku: str) -> Recording:
        return lambda _: None

    def foreseen(self, task: Task, sku: str) -> Recording | None:
        return None

    def judged(self, task: Task, verdict: Verdict) -> Recording:
        return self._noting("judged")

    def refused(self, task: Task, sku: str, verdict: Verdict, api_url: str) -> Recording:
        return self._noting("refused")

    def unanswered(self, task: Task, sku: str, http_status: int, api_url: str) -> Recording:
        return self._noting(f"unanswered {http_status}")

    def _noting(self, name: str) -> Recording:
        return lambda _: self.written.append(name)


class RecordingBoard(MemoryStatusBoard):
    """Keeps every view that was posted."""

    def __init__(self) -> None:
        super().__init__()
        self.posted: list[dict[str, Any]] = []

    def post(self, views: Sequence[dict[str, Any]], *, live: bool, fence: int = 0) -> None:
        super().post(views, live=live, fence=fence)
        self.posted.extend(json.loads(json.dumps(views)))


@dataclass
class Worker:
    """A worker on twins, with one job submitted."""

    work_dir: Path
    ledger: MemoryLedger = field(default_factory=MemoryLedger)
    catalogue: MemoryCatalogue = field(default_factory=MemoryCatalogue)
    store: MemoryObjectStore = field(default_factory=lambda: MemoryObjectStore(OBJECTS))
    validator: MemoryValidator = field(default_factory=MemoryValidator)
    dropoff: MemoryDropoff = field(default_factory=MemoryDropoff)
    host: MemoryHost = field(default_factory=MemoryHost)
    board: RecordingBoard = field(default_factory=RecordingBoard)
    lease_renew_seconds: float = 5.0
    max_attempts: int = 3
    stage_before_verdict: bool = False

    def __post_init__(self) -> None:
        (accepted,) = self.ledger.accept([NewJob("job-1", "ann", "spring")], batch_id=None, release=1)
        assert isinstance(accepted, Task)
        self.task_id = accepted.task_id

    def ports(self) -> PipelinePorts:
        return PipelinePorts(
            claims=self.ledger,
            cleaning=self.ledger,
            parking=self.ledger,
            catalogue=self.catalogue,
            store=self.store,
            archiver=ZipArchiver(),
            validator=self.validator,
            dropoff=self.dropoff,
            host=self.host,
        )

    def run(self, reach: Callable[[str], None] = lambda _: None) -> Settled | None:
        pipeline = self.ports()
        options = WorkerOptions(
            name="w1",
            lease_seconds=20,
            lease_renew_seconds=self.lease_renew_seconds,
            retry_limits=RetryLimits(self.max_attempts, 5, 60),
            parking=PARKING,
            janitor=JANITOR,
            pipeline=PipelineOptions(self.work_dir, "latest_date", "refuse", 4, self.stage_before_verdict, AdmissionLimits(80)),
        )
        return run_task(self.task_id, WorkerPorts(pipeline, self.ledger, self.ledger, self.board), options, reach)

    @property
    def task(self) -> Task:
        found = self.ledger.task(self.task_id)
        assert found is not None
        return found

    def nothing_left(self) -> bool:
        kept = self.work_dir / download_cache.FOLDER
        left = [path for path in self.work_dir.iterdir() if path != kept] if self.work_dir.exists() else []
        return not self.dropoff.staging and not left


@pytest.fixture(params=[False, True], ids=["strict", "staged ahead"])
def worker(tmp_path: Path, request: pytest.FixtureRequest) -> Worker:
    """One that uploads after the verdict, and one that does so before it."""
    return Worker(tmp_path / "work", stage_before_verdict=request.param)


def test_a_delivery_is_published_recorded_and_cleaned_up(worker: Worker) -> None:
    worker.run()
    assert worker.task.status is Status.COMPLETED
    assert worker.dropoff.deliveries == {
        "job-1": {"SKU1/SKU1.glb": OBJECTS["a/GLB_files/x.glb"], "SKU1/renders/front.jpg": OBJECTS["a/renders/front.jpg"]}
    }
    assert worker.catalogue.written == ["judged", "delivered"]
    assert worker.nothing_left()


def test_a_delivery_over_a_previous_one_passes_every_crash_point_once_and_in_order(worker: Worker) -> None:
    worker.dropoff.deliveries["job-1"] = {"SKU1/SKU1.glb": b"the one before"}
    reached: list[str] = []
    worker.run(reached.append)
    if worker.stage_before_verdict:
        assert reached.index("stage:before") < reached.index("validate:after")
        reached.sort(key=CRASH_POINTS.index)
    assert reached == list(CRASH_POINTS)


def test_the_last_view_posted_is_the_final_one_and_stays(worker: Worker) -> None:
    worker.run()
    (view,) = worker.board.read([worker.task_id])
    assert view is not None
    assert (view["status"], view["stage"], view["progress"]) == ("completed", "done", 100)


@pytest.mark.parametrize(
    ("point", "stage"),
    [
        ("download:before", Stage.DOWNLOAD),
        ("validate:after", Stage.VALIDATE),
        ("stage:after", Stage.UPLOAD),
        ("publish:before", Stage.PUBLISH),
    ],
)
def test_the_status_board_shows_each_stage_while_it_lasts(worker: Worker, point: str, stage: Stage) -> None:
    shown = threading.Event()

    def wait_until_shown(reached: str) -> None:
        while reached == point and not shown.is_set():
            if worker.board.posted and worker.board.posted[-1]["stage"] == stage:
                shown.set()
            shown.wait(0.01)

    worker.run(wait_until_shown)
    assert shown.is_set()
    assert worker.task.status is Status.COMPLETED


@fault(
    "Redis: away during an attempt",
    injector="twin that raises",
    invariants="LOS",
    outcome="delivered; the status comes from SQL",
)
def test_without_redis_the_job_is_delivered_all_the_same(worker: Worker) -> None:
    worker.board.away = True
    worker.run()
    assert worker.task.status is Status.COMPLETED


def test_a_no_is_recorded_and_nothing_is_sent(worker: Worker) -> None:
    worker.validator.answers = [NO]
    worker.run()
    assert worker.task.status is Status.VALIDATION_FAILED
    assert "SKU1/SKU1.glb is broken" in worker.task.message
    assert worker.catalogue.written == ["refused"]
    assert worker.dropoff.deliveries == {}
    assert worker.nothing_left()


@pytest.mark.parametrize("worker", [True], indirect=True)
def test_what_is_staged_before_a_no_is_hidden_and_removed(worker: Worker) -> None:
    worker.dropoff.deliveries["job-1"] = {"SKU1/SKU1.glb": b"the one before"}
    staged: list[int] = []

    def look(point: str) -> None:
        if point == "validate:after":
            staged.append(len(worker.dropoff.staging))
            assert worker.dropoff.deliveries == {"job-1": {"SKU1/SKU1.glb": b"the one before"}}

    worker.validator.answers = [NO]
    worker.run(look)
    assert staged == [1]
    assert worker.task.status is Status.VALIDATION_FAILED
    assert worker.dropoff.deliveries == {"job-1": {"SKU1/SKU1.glb": b"the one before"}}
    assert worker.nothing_left()


@pytest.mark.parametrize("worker", [True], indirect=True)
def test_what_a_no_could_not_remove_is_removed_by_the_next_ring(worker: Worker) -> None:
    worker.validator.answers = [NO]
    worker.dropoff.failures["discard"].append(AWAY)
    worker.run()
    assert worker.task.status is Status.VALIDATION_FAILED
    assert worker.dropoff.staging
    worker.ledger.set_time("staging_due_at", worker.task_id)
    worker.run()
    assert worker.nothing_left()


def test_a_transient_fault_is_told_with_class_cause_attempt_and_next_try(worker: Worker) -> None:
    worker.validator.answers = [AWAY]
    worker.run()
    assert worker.task.status is Status.PENDING
    for words in ("transient", "the validator did not answer", "attempt 1 of 3", "next try in"):
        assert words in worker.task.message


@pytest.mark.parametrize("pieces", [0, 1])
def test_a_pass_before_all_of_the_zip_was_taken_delivers_nothing(worker: Worker, pieces: int) -> None:
    """Also when every file has arrived: a proxy that answers for the validator and closes has judged nothing."""

    async def judge(sku: str, package: Iterable[bytes]) -> Verdict:
        await asyncio.to_thread(take, package)
        return Verdict(True, "Valid", 200, "{}")

    def take(package: Iterable[bytes]) -> None:
        list(islice(package, pieces))
        while worker.task.stage is not Stage.VALIDATE:
            time.sleep(0.01)

    worker.validator.judge = judge  # type: ignore[method-assign]
    worker.run()
    assert worker.task.problem is not None
    assert worker.task.problem.code == "validator_early"
    assert worker.dropoff.deliveries == {}
    assert worker.catalogue.written == []


def test_a_validators_answer_that_is_no_verdict_is_written_to_the_studios_table(worker: Worker) -> None:
    answer = Unavailable("validator_undecided", "the validator answered 503", "Look at it.")
    answer.http_status = 503  # type: ignore[attr-defined]
    worker.validator.answers = [answer]
    worker.run()
    assert worker.catalogue.written == ["unanswered 503"]


def test_a_rejection_of_one_object_wins_over_the_upload_it_breaks_off(worker: Worker) -> None:
    worker.store.failures["a/renders/front.jpg"] = [Rejected("object_missing", "no a/renders/front.jpg", "Upload it.")]
    worker.run()
    assert worker.task.problem is not None
    assert worker.task.problem.code == "object_missing"


FULL = DestinationParked("disk_full", "the partner's disk is full", "Make room there.")


def test_a_parked_destination_spends_no_attempt_and_says_what_is_waited_for(worker: Worker) -> None:
    worker.dropoff.failures["session"] = [FULL]
    worker.run()
    assert (worker.task.status, worker.task.attempt) == (Status.PENDING, 0)
    for words in ("parked", "since", "the partner's disk is full", "Make room there.", "next probe at", "attempt 1 of 3"):
        assert words in worker.task.message
    assert worker.task.problem is not None
    assert worker.task.problem.code == "disk_full"


def probe(worker: Worker) -> None:
    worker.ledger.make_probe_due(1)
    run_duty("probe", worker.ports(), worker.ledger, PARKING, JANITOR)


def test_while_the_destination_is_parked_a_job_fetches_nothing_and_asks_it_nothing(worker: Worker) -> None:
    worker.dropoff.failures["session"] = [FULL]
    worker.run()
    fetched, judged, logins = list(worker.store.fetched), len(worker.validator.asked), worker.dropoff.logins
    for _ in range(3):
        worker.ledger.set_time("claimable_at", worker.task_id)
        worker.run()
    assert (worker.store.fetched, len(worker.validator.asked), worker.dropoff.logins) == (fetched, judged, logins)
    assert (worker.task.status, worker.task.attempt) == (Status.PENDING, 0)
    assert "the partner's disk is full" in worker.task.message


def test_a_probe_that_fails_tells_the_waiting_jobs_and_one_that_works_lets_them_go_on(worker: Worker) -> None:
    worker.dropoff.failures["session"] = [FULL]
    worker.run()
    worker.dropoff.failures["probe"] = [DestinationParked("permission_denied", "permission denied", "Grant it.")]
    probe(worker)
    assert "permission denied" in worker.task.message
    assert worker.ledger.due(10) == []
    probe(worker)
    assert worker.ledger.due(10) == [worker.task_id]
    assert "works again" in worker.task.message
    worker.run()
    assert (worker.task.status, worker.task.attempt) == (Status.COMPLETED, 1)


def test_nobody_probes_before_it_is_due(worker: Worker) -> None:
    worker.dropoff.failures["session"] = [FULL]
    worker.run()
    logins = worker.dropoff.logins
    run_duty("probe", worker.ports(), worker.ledger, PARKING, JANITOR)
    assert worker.dropoff.logins == logins


def test_a_probe_that_finds_the_server_away_leaves_it_parked(worker: Worker) -> None:
    worker.dropoff.failures["session"] = [FULL, Unavailable("sftp_unreachable", "nobody answers", "See whether it is up.")]
    worker.run()
    probe(worker)
    assert "nobody answers" in worker.task.message
    assert worker.ledger.find_parked(worker.dropoff.destination) is not None


def test_a_probe_is_told_what_the_destination_is_parked_for_also_after_one_that_found_the_server_away(worker: Worker) -> None:
    worker.dropoff.failures["session"] = [DestinationParked("delete_refused", "may not delete", "Ask for it.")]
    worker.run()
    worker.dropoff.failures["probe"] = [Unavailable("sftp_unreachable", "nobody answers", "See whether it is up.")]
    probe(worker)
    parked = worker.ledger.find_parked(worker.dropoff.destination)
    assert (parked and parked.code) == "delete_refused"
    assert "may not delete" in worker.task.message
    assert "the last probe failed: nobody answers" in worker.task.message
    probe(worker)
    assert worker.dropoff.probed_for == ["delete_refused"] * 2
    assert "works again" in worker.task.message


def test_a_probe_that_gets_no_connection_leaves_the_reason_as_it_was(worker: Worker) -> None:
    worker.dropoff.failures["session"] = [FULL, Deferred("connections_in_use", "all 2 connections are in use", "")]
    worker.run()
    probe(worker)
    parked = worker.ledger.find_parked(worker.dropoff.destination)
    assert parked is not None
    assert (parked.code, parked.probes) == ("disk_full", 1)
    assert "the partner's disk is full" in worker.task.message
    probe(worker)
    assert "works again" in worker.task.message


def test_a_destination_is_told_to_be_parked_and_to_be_well_once_not_for_each_job(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    worker.dropoff.failures["session"] = [FULL]
    worker.run()
    worker.ledger.set_time("claimable_at", worker.task_id)
    worker.run()
    probe(worker)
    assert [(line.levelname, line.message.split(":")[0]) for line in caplog.records if "destination" in line.message] == [
        ("WARNING", "destination_parked"),
        ("INFO", "destination_recovered"),
    ]


def test_a_job_healed_before_it_was_known_to_wait_does_not_wait(worker: Worker) -> None:
    worker.dropoff.failures["session"] = [FULL]
    put_back = worker.ledger.put_back

    def heal_first(claim: Any, **how: Any) -> None:
        worker.ledger.heal(worker.dropoff.destination, "it works again")
        put_back(claim, **how)

    worker.ledger.put_back = heal_first  # type: ignore[method-assign]
    worker.run()
    assert worker.ledger.due(10) == [worker.task_id]


def test_a_job_that_waited_longer_than_park_hours_fails_with_the_cause(worker: Worker) -> None:
    now = [1000.0]
    worker = Worker(worker.work_dir, ledger=MemoryLedger(clock=lambda: now[0]))
    worker.dropoff.failures["session"] = [FULL]
    worker.run()
    now[0] += 3601
    worker.run()
    assert worker.task.status is Status.FAILED
    assert "the partner's disk is full" in worker.task.message
    assert "PARK_HOURS" in worker.task.message


def test_a_published_package_is_looked_for_although_the_destination_is_parked(worker: Worker) -> None:
    def lose_the_database(reached: str) -> None:
        if reached == "publish:after":
            raise Unavailable("database_unavailable", "the database is away", "Look at it.")

    worker.run(lose_the_database)
    worker.ledger.park(worker.dropoff.destination, Problem("disk_full", "parked", "full", "Make room."), 30)
    worker.ledger.set_time("claimable_at", worker.task_id)
    worker.run()
    assert worker.task.status is Status.COMPLETED


class Killed(BaseException):
    """As SIGKILL: nothing may catch it."""


def die_at(point: str) -> Callable[[str], None]:
    def die(reached: str) -> None:
        if reached == point:
            raise Killed

    return die


def die_often(worker: Worker, point: str, times: int) -> None:
    for _ in range(times):
        with pytest.raises(Killed):
            worker.run(die_at(point))
        worker.ledger.set_time("claimable_at", worker.task_id)


@fault(
    "Worker: dead after the publish of its last attempt",
    injector="lease run out",
    invariants="LOH",
    outcome="looked for, found, and recorded as delivered",
)
def test_a_delivered_job_whose_worker_died_in_every_attempt_is_found_delivered(worker: Worker) -> None:
    die_often(worker, "publish:after", 1)
    die_often(worker, "record:before", 2)
    assert worker.task.attempt == worker.task.max_attempts
    assert worker.ledger.exhausted(10) == []
    worker.run()
    assert worker.task.status is Status.COMPLETED
    assert "look 1 of 3 after 3 attempts" in worker.ledger.history(worker.task_id)[-2].message
    assert worker.catalogue.written.count("delivered") == 1


def test_a_job_that_only_looks_and_finds_nothing_published_fails_and_fetches_nothing(worker: Worker) -> None:
    die_often(worker, "publish:before", 3)
    fetched = len(worker.store.fetched)
    worker.run()
    assert worker.task.status is Status.FAILED
    assert worker.task.problem is not None
    assert worker.task.problem.code == "worker_died"
    assert "not visible" in worker.task.problem.message
    assert len(worker.store.fetched) == fetched
    assert worker.dropoff.deliveries == {}


def test_looking_that_kills_its_worker_too_ends_and_warns_that_the_package_may_be_visible(
    worker: Worker, tmp_path: Path
) -> None:
    die_often(worker, "publish:after", 1)
    die_often(worker, "record:before", 5)
    assert worker.run() is None
    ports = SweepPorts(*[worker.ledger] * 5, MemoryJobQueue(), worker.board, MemoryWorkerReports())  # type: ignore[arg-type]
    swept = sweep(ports, ReleaseLimits(5, 30))
    assert swept.given_up == (worker.task_id,)
    assert "may be visible as 'job-1'" in worker.task.message
    assert worker.task.problem is not None
    assert "job-1" in worker.task.problem.next_step


@fault(
    "Code: an unforeseen error", injector="an exception at a crash point", invariants="LH", outcome="failed after three tries"
)
@pytest.mark.parametrize("point", ["lookup:after", "stage:after", "record:before"])
def test_an_error_nobody_foresaw_ends_after_bounded_tries(worker: Worker, point: str) -> None:
    def break_down(reached: str) -> None:
        if reached == point:
            raise KeyError("password=hunter2")

    unexpected = 0
    while worker.task.status is Status.PENDING:
        settled = worker.run(break_down)
        assert settled is not None
        unexpected += settled.unexpected
        worker.ledger.set_time("claimable_at", worker.task_id)
    assert worker.task.status is Status.FAILED
    assert unexpected <= 3 + LOOKS
    assert "attempt 1 of 3" in "".join(event.message for event in worker.ledger.history(worker.task_id))
    assert "hunter2" not in worker.task.message


def test_an_unforeseen_fault_is_settled_as_unknown_without_its_text(worker: Worker) -> None:
    worker.dropoff.failures["stage"] = [ValueError("password=hunter2")]
    settled = worker.run()
    assert settled is not None
    assert settled.unexpected
    assert (worker.task.status, worker.task.problem and worker.task.problem.error_class) == (Status.PENDING, "unknown")
    assert "hunter2" not in worker.task.message


def test_a_retry_uploads_nothing_that_was_staged_whole(worker: Worker) -> None:
    worker.dropoff.failures["publish"] = [Unavailable("sftp_lost", "the connection was lost", "It is tried again.")]
    worker.run()
    uploaded = list(worker.dropoff.uploaded)
    worker.ledger.set_time("claimable_at", worker.task_id)
    worker.run()
    assert worker.task.status is Status.COMPLETED
    assert worker.dropoff.uploaded == uploaded


def lose_claim_at(worker: Worker, point: str) -> Callable[[str], None]:
    """Another worker claims the task when the attempt reaches the point."""

    def lose(reached: str) -> None:
        if reached == point:
            worker.ledger.set_time("claimable_at", worker.task_id)
            assert worker.ledger.claim(worker.task_id, "w2", 20) is not None

    return lose


@pytest.mark.parametrize("point", ["lookup:after", "validate:after", "stage:after"])
@fault(
    "Worker: claim lost at any stage", injector="another claim", invariants="OP", outcome="stops; publishes and records nothing"
)
def test_a_worker_that_lost_its_claim_publishes_and_records_nothing(worker: Worker, point: str) -> None:
    settled = worker.run(lose_claim_at(worker, point))
    assert settled is not None
    assert settled.task.status is Status.PROCESSING, "the other worker's claim stands"
    assert "delivered" not in worker.catalogue.written
    assert worker.dropoff.deliveries == {}


@pytest.mark.parametrize("point", ["publish:before", "publish:after", "record:before"])
@fault(
    "Worker: stale while it publishes",
    injector="claim taken over at a crash point",
    invariants="LOPH",
    outcome="the next attempt finds it published and records it, once",
)
def test_a_worker_that_lost_its_claim_while_publishing_records_nothing_and_the_next_finds_it_published(
    worker: Worker, point: str
) -> None:
    """The announced publish may still go through, until the next attempt adopts the staging folder; then it is the one."""
    worker.run(lose_claim_at(worker, point))
    assert "delivered" not in worker.catalogue.written
    published = worker.dropoff.deliveries["job-1"]
    worker.ledger.set_time("claimable_at", worker.task_id)
    worker.run()
    assert worker.task.status is Status.COMPLETED
    assert worker.dropoff.deliveries["job-1"] is published
    assert worker.catalogue.written.count("delivered") == 1
    assert len(worker.validator.asked) == 1


@fault(
    "SQL: away after the last publish",
    injector="ledger twin",
    invariants="LO",
    outcome="not given up before an attempt has looked",
)
def test_a_package_that_may_be_visible_is_not_given_up_before_an_attempt_has_looked(worker: Worker) -> None:
    """The publish went through, the database was away ever since, and the attempts are spent."""

    def lose_the_database(reached: str) -> None:
        if reached == "publish:after":
            raise Unavailable("database_unavailable", "the database is away", "Look at it.")

    worker = Worker(worker.work_dir, ledger=MemoryLedger(max_attempts=1), max_attempts=1)
    worker.run(lose_the_database)
    assert (worker.task.status, worker.task.attempt) == (Status.PENDING, 0)
    worker.ledger.set_time("claimable_at", worker.task_id)
    published = worker.dropoff.deliveries["job-1"]
    worker.run()
    assert worker.task.status is Status.COMPLETED
    assert worker.dropoff.deliveries["job-1"] is published


@pytest.mark.parametrize("point", ["lookup:after", "download:before", "validate:after", "stage:before", "stage:after"])
@fault(
    "Caller: cancel at each stage",
    injector="cancel at a crash point",
    invariants="LOPRH",
    outcome="stops there; nothing delivered, nothing left",
)
def test_a_cancelled_job_stops_at_any_stage_before_its_publish(worker: Worker, point: str) -> None:
    def cancel(reached: str) -> None:
        if reached == point:
            assert worker.ledger.cancel(worker.task_id) is CancelAnswer.REQUESTED

    worker.run(cancel)
    assert worker.task.status is Status.CANCELLED
    assert worker.dropoff.deliveries == {}
    assert "delivered" not in worker.catalogue.written


@fault(
    "Caller: cancel during a long download",
    injector="cancel while a part answers nothing",
    invariants="LRH",
    outcome="stops within LEASE_RENEW_SECONDS",
)
def test_a_cancel_is_heard_while_the_attempt_is_busy(worker: Worker) -> None:
    """Within one renewal, not at the end of the stage: here the validator never answers."""
    worker.lease_renew_seconds = 0.05

    async def never(sku: str, package: object) -> Verdict:
        assert worker.ledger.cancel(worker.task_id) is CancelAnswer.REQUESTED
        await asyncio.Event().wait()
        raise AssertionError

    worker.validator.judge = never  # type: ignore[assignment]
    worker.run()
    assert worker.task.status is Status.CANCELLED


@pytest.mark.parametrize("point", ["publish:before", "publish:after", "record:before"])
@fault(
    "Caller: cancel against the publish",
    injector="cancel at a crash point",
    invariants="LOPH",
    outcome="told that it is too late; delivered and recorded",
)
def test_a_cancel_against_the_finish_comes_too_late(worker: Worker, point: str) -> None:
    def cancel(reached: str) -> None:
        if reached == point:
            assert worker.ledger.cancel(worker.task_id) is CancelAnswer.PUBLISHING

    worker.run(cancel)
    assert worker.task.status is Status.COMPLETED


@fault(
    "Caller: cancel while the worker is dead",
    injector="cancel before the lease has run out",
    invariants="LOPH",
    outcome="the next claim cancels it",
)
def test_a_job_cancelled_while_its_worker_was_dead_is_cancelled_by_the_next(worker: Worker) -> None:
    assert worker.ledger.claim(worker.task_id, "dead", 20) is not None
    worker.ledger.cancel(worker.task_id)
    worker.ledger.set_time("claimable_at", worker.task_id)
    worker.run()
    assert worker.task.status is Status.CANCELLED


def test_a_ring_for_a_task_that_is_taken_ended_or_unknown_does_nothing(worker: Worker) -> None:
    assert worker.ledger.claim(worker.task_id, "w2", 20) is not None
    assert worker.run() is None
    worker.task_id = "never-issued"
    assert worker.run() is None


def test_a_ring_for_an_ended_task_removes_the_staging_it_left(worker: Worker) -> None:
    worker.dropoff.failures["discard"] = [Unavailable("sftp_lost", "the connection was lost", "It is tried again.")]
    worker.run()
    assert worker.task.status is Status.COMPLETED
    assert worker.dropoff.staging
    worker.ledger.set_time("staging_due_at", worker.task_id)
    assert worker.ledger.unclean(10) == [worker.task_id]
    worker.run()
    assert worker.nothing_left()
    assert worker.ledger.unclean(10) == []


def test_the_janitor_removes_staging_of_ended_tasks_and_old_staging_of_unknown_ones_only(worker: Worker) -> None:
    now = [1000.0]
    worker = Worker(worker.work_dir, ledger=MemoryLedger(clock=lambda: now[0]))
    worker.dropoff.failures["discard"] = [Unavailable("sftp_lost", "the connection was lost", "It is tried again.")]
    worker.run()
    now[0] += 301
    (running,) = worker.ledger.accept([NewJob("job-2", "ann", "spring")], batch_id=None, release=1)
    assert isinstance(running, Task)
    for task in (running.task_id, "stranger", "abandoned"):
        worker.dropoff.staging[task, 1] = Staging()
    worker.dropoff.idle_seconds = {running.task_id: 9000, "stranger": 3000, "abandoned": 4000}
    for _ in range(2):
        run_duty("janitor", worker.ports(), worker.ledger, PARKING, JANITOR)
    assert {task for task, _ in worker.dropoff.staging} == {running.task_id, "stranger"}
    assert worker.ledger.due_duties(["janitor"]) == []


def test_a_folder_that_cannot_be_removed_does_not_keep_the_janitor_from_the_others(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    for task in ("foreign", "abandoned"):
        worker.dropoff.staging[task, 1] = Staging()
    worker.dropoff.idle_seconds = {"foreign": 4000, "abandoned": 4000}
    worker.dropoff.failures["clear"] = [DestinationParked("permission_denied", "foreign-1 may not be removed", "Ask.")]
    run_duty("janitor", worker.ports(), worker.ledger, PARKING, JANITOR)
    assert list(worker.dropoff.staging) == [("foreign", 1)]
    assert "foreign-1 may not be removed" in caplog.text


def test_the_janitor_leaves_a_parked_destination_alone(worker: Worker) -> None:
    worker.ledger.park(worker.dropoff.destination, Problem("disk_full", "parked", "full", "Make room."), 30)
    with pytest.raises(DestinationParked):
        run_duty("janitor", worker.ports(), worker.ledger, PARKING, JANITOR)
    assert worker.dropoff.logins == 0


def test_for_want_of_disk_what_other_tasks_keep_goes_before_a_job_is_deferred(worker: Worker) -> None:
    other = worker.work_dir / "00000000-0000-0000-0000-000000000000-1"
    other.mkdir(parents=True)
    worker.host.free_disk = lambda _: 0 if other.exists() else 10**12  # type: ignore[method-assign]
    worker.run()
    assert worker.task.status is Status.COMPLETED
    assert worker.nothing_left()


def test_memory_that_only_the_cache_of_downloads_takes_defers_no_job(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(_: DownloadCache) -> None:
        worker.host.figures = Memory(20, 100, "cgroup2")

    worker.host.figures = Memory(90, 100, "cgroup2")
    monkeypatch.setattr(DownloadCache, "forget_pages", forget)
    worker.run()
    assert worker.task.status is Status.COMPLETED


def test_a_disk_that_is_full_all_of_a_sudden_costs_the_cache_of_downloads_and_no_attempt(worker: Worker) -> None:
    file = worker.work_dir / "file"
    worker.work_dir.mkdir()
    file.write_bytes(b"x")
    entry = describe("bucket", "key", Fetched(1, "a" * 64, 1, "etag"), file)
    assert entry is not None
    cached = worker.work_dir / download_cache.FOLDER / entry.name
    cached.parent.mkdir()
    file.rename(cached)

    async def fill_up(*_: object, **__: object) -> Fetched:
        raise Deferred("disk_full", "no room", "Make room.")

    worker.store.fetch = fill_up  # type: ignore[method-assign]
    worker.run()
    assert (worker.task.status, worker.task.attempt) == (Status.PENDING, 0)
    assert not cached.exists()


def test_a_job_that_no_removal_makes_room_for_is_deferred_and_keeps_what_it_has(worker: Worker) -> None:
    worker.validator.answers = [AWAY]
    worker.run()
    worker.host.free_disk = lambda _: 0  # type: ignore[method-assign]
    worker.ledger.set_time("claimable_at", worker.task_id)
    worker.store.objects["a/renders/front.jpg"] += b"replaced"
    worker.run()
    assert worker.task.problem is not None
    assert worker.task.problem.code == "disk_short"
    assert len(list(worker.work_dir.glob(f"{worker.task_id}-*/[!j]*"))) == len(OBJECTS) - 1, "beside the journal"


def test_what_is_here_already_is_not_believed_to_be_the_newest_by_a_list(worker: Worker) -> None:
    """A list may lag behind the objects."""
    for key in OBJECTS:
        worker.store.listed[key] = asyncio.run(worker.store.stat(key))
    worker.validator.answers = [AWAY]
    worker.run()
    worker.validator.answers = [Verdict(True, "Valid", 200, "{}")]
    worker.ledger.set_time("claimable_at", worker.task_id)
    replaced = next(iter(OBJECTS))
    worker.store.objects[replaced] = b"replaced"
    worker.store.fetched.clear()
    worker.run()
    assert worker.task.status is Status.COMPLETED
    assert worker.store.fetched == [replaced]
    assert b"replaced" in worker.dropoff.deliveries["job-1"].values()


@pytest.mark.parametrize("size", [0, 10, 100_000])
def test_an_object_that_is_newer_than_the_list_costs_one_attempt(worker: Worker, size: int) -> None:
    """However long the list lags behind: the next attempt asks for no list."""
    for key in OBJECTS:
        worker.store.listed[key] = replace(asyncio.run(worker.store.stat(key)), size=size, etag="before")
    worker.run()
    assert worker.dropoff.deliveries == {}
    worker.ledger.set_time("claimable_at", worker.task_id)
    worker.run()
    assert worker.task.status is Status.COMPLETED
    assert sorted(worker.dropoff.deliveries["job-1"].values()) == sorted(OBJECTS.values())


def test_an_object_that_only_a_list_tells_of_is_missing(worker: Worker) -> None:
    for key in OBJECTS:
        worker.store.listed[key] = asyncio.run(worker.store.stat(key))
    del worker.store.objects[next(iter(OBJECTS))]
    worker.run()
    assert worker.task.problem is not None
    assert worker.task.problem.code == "object_missing"
