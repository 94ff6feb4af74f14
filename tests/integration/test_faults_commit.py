"""The server commits and its answer is lost: nothing happens twice, nothing is lost. On real servers, behind a proxy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, make_url, text

from api_server import JOB, SETTINGS, assert_problem, make_ports, serve
from databases import SERVERS, create_database, started
from fault_proxy import FaultProxy, fault_proxy
from fault_table import fault
from ledger_twin import MemoryHost, MemoryJobQueue, MemoryStatusBoard
from ncr_upload.adapters.celery_queue import QUEUE
from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.adapters.sql.recovery import SqlRecovery
from ncr_upload.adapters.sql.submissions import SqlSubmissions
from ncr_upload.application.api_ports import ApiPorts
from ncr_upload.application.crash_points import CRASH_POINTS
from ncr_upload.application.lanes import Lanes
from ncr_upload.application.ports import CancelAnswer
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import TERMINAL, NewJob, Status, Task
from ncr_upload.entrypoints.api.app import create_app
from ncr_upload.entrypoints.bootstrap.records import check_database
from ncr_upload.entrypoints.embedded.product import Product
from studio_rows import open_database
from workplace import Workplace

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

COMMITS = {
    "claim:before": "claim",
    "lookup:after": "advance to its plan",
    "validate:after": "advance to validated",
    "stage:before": "advance to upload",
    "stage:after": "announcing the publish",
    "record:before": "finish",
    "cleanup:before": "noting that staging is gone",
}
"""Where an attempt is → what it commits next."""


COMMIT = {"postgresql": b"COMMIT\0", "mysql": b"COMMIT"}
"""The statement, as it goes over the wire; PostgreSQL's BEGIN may name READ COMMITTED."""


@dataclass
class Behind:
    """A database and the proxy in front of it. `engine` goes to it directly, `url` through the proxy."""

    engine: Engine
    url: str
    proxy: FaultProxy

    def lose_commit(self) -> None:
        self.proxy.lose_answer(COMMIT[self.engine.dialect.name])


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    with started(request.param) as url:
        yield url


@pytest.fixture
def behind(server: str) -> Iterator[Behind]:
    direct = make_url(create_database(server))
    assert direct.host is not None
    assert direct.port is not None
    engine = open_database(direct.render_as_string(hide_password=False))
    with fault_proxy((direct.host, direct.port)) as proxy:
        yield Behind(engine, direct.set(port=proxy.port).render_as_string(hide_password=False), proxy)
    engine.dispose()


@pytest.fixture
def lossy(workplace: Workplace, behind: Behind) -> Workplace:
    workplace.engine = behind.engine
    # No renewal commits in between.
    workplace.change(database_url=SecretStr(behind.url), lease_seconds=600, lease_renew_seconds=300)
    return workplace


def try_until_ended(lossy: Workplace, task: Task, reach: Callable[[str], None]) -> Task:
    """As the sweeper and the leases would have it, without waiting for them."""
    for _ in range(8):
        with suppress(Unavailable):
            lossy.attempt(task, reach)
        found = lossy.ports().submissions.task(task.task_id)
        assert isinstance(found, Task)
        if found.status in TERMINAL:
            return found
        with lossy.engine.begin() as connection:
            connection.execute(text("UPDATE ncr_jobs SET claimable_at = 1 WHERE claimable_at IS NOT NULL"))
    raise AssertionError(lossy.history(task))


def assert_delivered_once(lossy: Workplace, ended: Task, product: Product) -> None:
    assert ended.status is Status.COMPLETED, lossy.history(ended)
    assert lossy.delivered(ended.job_id) == product.delivered
    (row,) = [row for row in lossy.studio_rows("job_details") if row["job_id"] == ended.job_id]
    assert row["upload_count"] == 1
    assert len(lossy.studio_rows("email")) == len(lossy.studio_rows("history_log")) == 1
    assert sum(line.startswith("completed") for line in lossy.history(ended)) == 1
    lossy.sweep(ended)
    assert lossy.leftovers() == []


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(
            point,
            id=point,
            marks=fault(
                f"SQL: the answer to the COMMIT of {commit} lost",
                injector="proxy: request forwarded, connection reset",
                invariants="LOPRH",
                outcome="the row is asked or the job tried again; one delivery, one record",
            ),
        )
        for point, commit in COMMITS.items()
    ],
)
def test_a_lost_answer_to_a_workers_commit_delivers_and_records_once(
    lossy: Workplace, behind: Behind, small: Product, job_id: str, point: str
) -> None:
    assert point in CRASH_POINTS
    lossy.place(job_id, small)
    (task,) = lossy.submit(job_id)
    armed: list[str] = []

    def reach(reached: str) -> None:
        if reached == point and not armed:
            armed.append(point)
            behind.lose_commit()

    ended = try_until_ended(lossy, task, reach)
    assert (armed, behind.proxy.count()["lost"]) == ([point], 1)
    assert_delivered_once(lossy, ended, small)


@fault(
    "SQL: the answer to the COMMIT of put_back lost",
    injector="proxy: request forwarded, connection reset",
    invariants="LOH",
    outcome="it is put back once; the next attempt delivers",
)
def test_a_lost_answer_to_putting_a_job_back_puts_it_back_once(
    lossy: Workplace, behind: Behind, small: Product, job_id: str
) -> None:
    lossy.place(job_id, small)
    (task,) = lossy.submit(job_id)
    failed: list[str] = []

    def reach(reached: str) -> None:
        if reached == "lookup:after" and not failed:
            failed.append(reached)
            behind.lose_commit()
            raise Unavailable("away", "a part is away", "Wait.")

    ended = try_until_ended(lossy, task, reach)
    assert behind.proxy.count()["lost"] == 1
    assert sum(line.startswith("put_back") for line in lossy.history(ended)) == 1
    assert ended.attempt == 2
    assert_delivered_once(lossy, ended, small)


# --- the API


def api_on(engine: Engine) -> ApiPorts:
    ledger = SqlSubmissions(engine, max_attempts=3)
    lanes = Lanes(submit_threads=1 if engine.dialect.name == "sqlite" else 4)
    board, queue, recovery = MemoryStatusBoard(), MemoryJobQueue(), SqlRecovery(engine)
    ports = make_ports(ledger, board, queue, MemoryHost(), QUEUE, lambda: check_database(engine), {}, recovery)
    return replace(ports, lanes=lanes)


@pytest.mark.parametrize("key", [None, "once"])
@fault(
    "SQL: the answer to the COMMIT of a submit lost",
    injector="proxy: request forwarded, connection reset",
    invariants="LOA",
    outcome="503 with Retry-After; asking again names the one task (409), or with an Idempotency-Key is the first answer",
)
def test_a_lost_answer_to_a_submit_is_503_and_asking_again_finds_the_one_task(behind: Behind, key: str | None) -> None:
    engine = open_engine(behind.url)
    headers = {"Idempotency-Key": key} if key else {}
    with serve(create_app(api_on(engine), SETTINGS)) as http:
        http.get("/readyz")
        behind.lose_commit()
        lost = http.post("/process-job", json=JOB, headers=headers)
        assert_problem(lost, 503, "database_unavailable")
        assert int(lost.headers["retry-after"]) > 0
        again = http.post("/process-job", json=JOB, headers=headers)
        assert again.status_code == (202 if key else 409), again.text
    engine.dispose()
    with behind.engine.connect() as connection:
        (task_id,) = connection.execute(text("SELECT task_id FROM ncr_jobs")).scalars()
    assert again.json()["task_id"] == task_id


@fault(
    "SQL: the answer to the COMMIT of a cancel lost",
    injector="proxy: request forwarded, connection reset",
    invariants="LOH",
    outcome="asking twice is harmless; cancelled once",
)
def test_a_lost_answer_to_a_cancel_cancels_once(behind: Behind) -> None:
    engine = open_engine(behind.url)
    submissions = SqlSubmissions(engine, max_attempts=3)
    (task,) = submissions.accept([NewJob("job-1", "ann", "spring")], batch_id=None, release=1)
    assert isinstance(task, Task)
    behind.lose_commit()
    with pytest.raises(Unavailable):
        submissions.cancel(task.task_id)
    assert submissions.cancel(task.task_id) is CancelAnswer.CANCELLED
    assert [event.kind for event in submissions.history(task.task_id)].count("cancelled") == 1
    engine.dispose()


CALLERS = 50


@pytest.fixture
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    if request.param == "sqlite":
        engine = open_database(tmp_path / "ncr.db")
        yield engine
    else:
        with started(request.param) as url:
            engine = open_database(create_database(url))
            yield engine
    engine.dispose()


@pytest.mark.parametrize("anywhere", ["sqlite", *SERVERS], indirect=True)
@fault(
    "Callers: 50 submits of one job, and of one Idempotency-Key, at once",
    injector="50 threads",
    invariants="LO",
    outcome="one 202 and 49 times 409 naming its task; with the key 50 times the first answer",
)
def test_fifty_callers_at_once_make_one_task(anywhere: Engine) -> None:
    with serve(create_app(api_on(anywhere), SETTINGS)) as http:

        def submit(job: dict[str, object], headers: dict[str, str]) -> httpx.Response:
            with httpx.Client(base_url=http.base_url, trust_env=False, timeout=60) as client:
                while (answer := client.post("/process-job", json=job, headers=headers)).status_code == 503:
                    """A busy machine: it says so and is asked again."""
                return answer

        with ThreadPoolExecutor(CALLERS) as callers:
            answers = [callers.submit(submit, JOB, {}) for _ in range(CALLERS)]
            statuses = sorted(answer.result().status_code for answer in answers)
            assert statuses == [202] + [409] * (CALLERS - 1)
            assert len({answer.result().json()["task_id"] for answer in answers}) == 1
            keyed = [callers.submit(submit, JOB | {"job_id": "other"}, {"Idempotency-Key": "k"}) for _ in range(CALLERS)]
            assert {answer.result().status_code for answer in keyed} == {202}
            assert len({answer.result().json()["task_id"] for answer in keyed}) == 1
    with anywhere.connect() as connection:
        assert connection.execute(text("SELECT COUNT(*) FROM ncr_jobs")).scalar_one() == 2
