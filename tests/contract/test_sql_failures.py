"""What the databases do when they fail: told clearly, healed where it can be, nothing lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import Engine, event, text

from api_server import JOB, SETTINGS, assert_problem, make_ports, serve
from databases import SERVERS, create_database, prepared
from fault_table import fault
from ledger_twin import MemoryHost, MemoryJobQueue, MemoryStatusBoard
from ledgers import Ledger, sql_ledger
from ncr_upload.adapters.celery_queue import QUEUE
from ncr_upload.adapters.sql.catalogue import SqlCatalogue
from ncr_upload.adapters.sql.engine import CONTENDED_TRIES, RESTED_SECONDS, open_engine, translated_errors, whole_transaction
from ncr_upload.adapters.sql.recovery import SqlRecovery
from ncr_upload.adapters.sql.submissions import SqlSubmissions
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import NewJob, Stage, Status, Task
from ncr_upload.entrypoints.api.app import create_app
from ncr_upload.entrypoints.bootstrap.records import check_database
from patience import PROMISED_SECONDS, allowed
from servers import free_port
from studio_rows import open_database

TASK = Task("t-1", "job-1", "ann", "spring", None, None, Status.PROCESSING, Stage.RECORD, 97, "", 1, 5, 0.0, 0.0)


@pytest.fixture
def ledger(engine: Engine) -> Ledger:
    return sql_ledger(engine)


def refusal(url: str) -> Unavailable:
    engine = open_engine(url)
    try:
        with pytest.raises(Unavailable) as refused:
            sql_ledger(engine).accept("job-1")
        return refused.value
    finally:
        engine.dispose()


# --- connecting


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "mysql+pymysql"])
@fault("Database: unreachable", injector="closed port", invariants="A", outcome="told with host and name, within 3 s")
def test_an_unreachable_server_is_named_with_its_database_but_not_its_password(driver: str) -> None:
    began = time.monotonic()
    refused = refusal(f"{driver}://ann:hunter2@127.0.0.1:{free_port()}/studio")
    assert time.monotonic() - began < allowed(PROMISED_SECONDS)
    assert "127.0.0.1" in refused.message
    assert "studio" in refused.message
    assert "hunter2" not in str(refused)
    assert refused.code == "database_unavailable"


@pytest.mark.parametrize("engine", SERVERS, indirect=True)
def test_a_database_that_the_server_does_not_have_is_no_missing_table(engine: Engine) -> None:
    refused = refusal(engine.url.set(database="nowhere").render_as_string(hide_password=False))
    assert (refused.code, "nowhere" in refused.message, "DB_NAME" in refused.next_step) == (
        "database_login_refused",
        True,
        True,
    )


@pytest.mark.parametrize("parent", ["/proc/none", "a file"])
def test_a_folder_where_no_sqlite_file_can_be_is_named(tmp_path: Path, parent: str) -> None:
    if parent == "a file":
        parent = str(tmp_path / "file")
        Path(parent).write_text("")
    refused = refusal(f"sqlite:///{parent}/ncr.db")
    assert (refused.code, f"its folder {parent}" in refused.message) == ("database_unavailable", True), refused


# --- what a server may refuse


@pytest.mark.parametrize("engine", SERVERS, indirect=True)
@fault("Database: user without rights", injector="GRANT", invariants="A", outcome="told with what to grant")
def test_a_user_without_the_right_to_write_is_told_what_to_grant(ledger: Ledger, engine: Engine) -> None:
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("CREATE ROLE reader LOGIN"))
            connection.execute(text("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader"))
        else:
            connection.execute(text("CREATE USER reader@'127.0.0.1'"))
            connection.execute(text(f"GRANT SELECT ON {engine.url.database}.* TO reader@'127.0.0.1'"))
    try:
        refused = refusal(engine.url.set(username="reader").render_as_string(hide_password=False))
    finally:
        with engine.begin() as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(text("DROP OWNED BY reader"))
                connection.execute(text("DROP ROLE reader"))
            else:
                connection.execute(text("DROP USER reader@'127.0.0.1'"))
    assert (refused.code, "GRANT" in refused.next_step.upper()) == ("database_denied", True), refused


@pytest.mark.parametrize("engine", SERVERS, indirect=True)
def test_a_read_only_server_is_said_to_be_one(ledger: Ledger, engine: Engine) -> None:
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.execute(text(f"ALTER DATABASE {engine.url.database} SET default_transaction_read_only = on"))
        assert refusal(engine.url.render_as_string(hide_password=False)).code == "database_read_only"
    else:  # root may write on a read-only MariaDB, so the transaction is made so
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("SET TRANSACTION READ ONLY"))
        engine.dispose()
        with pytest.raises(Unavailable) as refused:
            ledger.accept("job-1")
        assert refused.value.code == "database_read_only", refused.value


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
@fault(
    "Database: disk full", injector="max_page_count", invariants="LS", outcome="told; the same call works once there is room"
)
def test_a_full_disk_is_told_and_nothing_is_lost(ledger: Ledger, engine: Engine) -> None:
    (task,) = ledger.accept("job-1")
    claim = ledger.uploading(task)

    def shrink(connection: Any, *_: Any) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # it does not go below what there is

    event.listen(engine, "connect", shrink)
    engine.dispose()
    with pytest.raises(Unavailable, match=r"test\.db has no room left") as full:
        [ledger.accept(f"more-{number}") for number in range(2000)]
    assert full.value.code == "database_full"
    assert full.value.retry_after_seconds
    event.remove(engine, "connect", shrink)
    engine.dispose()
    ledger.claims.finish(claim, status=Status.COMPLETED, stage=Stage.DONE, message="delivered", problem=None)
    assert ledger.status(task) is Status.COMPLETED


# --- contention


def cross(engine: Engine, seen: list[str]) -> Callable[[str, str], None]:
    """Updates two rows in one transaction. Two of these at once, in opposite order, wait for each other the first time."""
    met = threading.Barrier(2, timeout=20)

    @whole_transaction
    def update_both(first: str, second: str) -> None:
        seen.append(first)
        with translated_errors(engine), engine.begin() as connection:
            connection.execute(text("UPDATE ncr_jobs SET message = 'x' WHERE job_id = :j"), {"j": first})
            if seen.count(first) == 1:
                met.wait()
            connection.execute(text("UPDATE ncr_jobs SET fence = fence + 1 WHERE job_id = :j"), {"j": second})

    return update_both


@pytest.mark.parametrize("engine", SERVERS, indirect=True)
@fault(
    "Database: deadlock", injector="two crossing transactions", invariants="LO", outcome="the loser's transaction runs again"
)
def test_a_transaction_that_lost_a_deadlock_is_run_again(ledger: Ledger, engine: Engine) -> None:
    ledger.accept("a", "b")
    seen: list[str] = []
    update_both = cross(engine, seen)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(update_both, ("a", "b"), ("b", "a")))
    assert len(seen) == 3
    with engine.connect() as connection:
        assert connection.execute(text("SELECT fence FROM ncr_jobs")).scalars().all() == [1, 1]


def test_what_is_contended_for_ever_is_given_up(engine: Engine) -> None:
    tries = []

    @whole_transaction
    def lose() -> None:
        tries.append(1)
        with translated_errors(engine):
            raise deadlock()

    with pytest.raises(Unavailable) as contended:
        lose()
    assert (contended.value.code, len(tries)) == ("database_contended", CONTENDED_TRIES)


def deadlock() -> Exception:
    from pymysql.err import OperationalError as DriverError
    from sqlalchemy.exc import OperationalError

    return OperationalError("UPDATE", {}, DriverError(1213, "Deadlock found when trying to get lock"))


@pytest.mark.parametrize("engine", SERVERS, indirect=True)
def test_batches_submitted_at_once_in_opposite_order_are_each_answered(ledger: Ledger, engine: Engine) -> None:
    """Their unique keys and MySQL's gap locks cross."""
    names = [f"j{number:03}" for number in range(60)]

    def submit(order: list[str]) -> object:
        return ledger.submissions.accept([NewJob(j, "ann", "spring") for j in order], batch_id=None, release=100)

    for _ in range(3):
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(submit, (names, names[::-1], names[30:], names[:30][::-1])))
        accepted = [task for answer in answers for task in answer if isinstance(task, Task)]  # type: ignore[attr-defined]
        assert len({task.job_id for task in accepted}) == len(accepted) > 0
        for task in accepted:
            ledger.submissions.cancel(task.task_id)


# --- the studio's tables


def test_a_row_that_the_studios_table_refuses_is_named_as_such(ledger: Ledger, engine: Engine) -> None:
    (task,) = ledger.accept("job-1")
    claim = ledger.uploading(task)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE email"))
        connection.execute(
            text("CREATE TABLE email (sku VARCHAR(9), status VARCHAR(9), campagin VARCHAR(9), sent_by VARCHAR(9) NOT NULL)")
        )
    recording = SqlCatalogue(engine, ZoneInfo("UTC")).delivered(replace(TASK, job_id="job-1"), "SKU1")
    with pytest.raises(Unavailable, match="sent_by") as refused:
        ledger.claims.finish(claim, status=Status.COMPLETED, stage=Stage.DONE, message="", problem=None, also=recording)
    assert refused.value.code == "database_row_refused"
    assert ledger.status(task) is Status.UPLOADING


# --- a server that dies


@pytest.fixture(scope="module", params=SERVERS)
def mortal(request: pytest.FixtureRequest) -> Iterator[Any]:
    with prepared(request.param) as server:
        yield server


@fault("Database: killed and started again", injector="SIGKILL", invariants="ALS", outcome="503 meanwhile; accepted jobs stay")
def test_while_its_server_is_down_the_api_answers_503_and_afterwards_goes_on(mortal: Any) -> None:
    url = create_database(mortal.start())
    engine = open_database(url)
    ledger = SqlSubmissions(engine, max_attempts=3)
    board, queue = MemoryStatusBoard(), MemoryJobQueue()
    ports = make_ports(ledger, board, queue, MemoryHost(), QUEUE, lambda: check_database(engine), {}, SqlRecovery(engine))
    with serve(create_app(ports, SETTINGS)) as http:
        task_id = http.post("/process-job", json=JOB).json()["task_id"]
        mortal.kill()
        for _ in range(2):
            began = time.monotonic()
            answer = http.post("/process-job", json=JOB | {"job_id": "job-2"})
            assert time.monotonic() - began < allowed(PROMISED_SECONDS)
            body = assert_problem(answer, 503, answer.json()["code"])
            assert body["code"] in ("database_unavailable", "database_timeout")
            assert int(answer.headers["retry-after"]) > 0
        assert http.get("/health").status_code == 503
        mortal.start()
        assert http.post("/process-job", json=JOB).json()["task_id"] == task_id  # 409, naming it
        assert http.post("/process-job", json=JOB | {"job_id": "job-2"}).status_code == 202
        assert http.get(f"/job-status/{task_id}").json()["status"] == "pending"
        mortal.kill()
        mortal.start()  # while nobody asks: no caller pays for the connections that are gone
        time.sleep(RESTED_SECONDS)
        assert http.post("/process-job", json=JOB | {"job_id": "job-3"}).status_code == 202
    engine.dispose()


@pytest.mark.parametrize("engine", SERVERS, indirect=True)
def test_no_more_connections_are_opened_than_the_pool_may_and_who_waits_too_long_is_told(engine: Engine) -> None:
    small = open_engine(engine.url.render_as_string(hide_password=False), pool_size=2, wait_seconds=1)
    with small.connect(), small.connect():
        with pytest.raises(Unavailable) as told, translated_errors(small), small.connect():
            pass
        assert told.value.code == "database_unavailable"
    with small.connect() as connection:
        assert connection.execute(text("SELECT 1")).scalar_one() == 1
    small.dispose()


@pytest.mark.parametrize("engine", SERVERS, indirect=True)
def test_a_statement_that_takes_too_long_ends_in_time(engine: Engine) -> None:
    hasty = open_engine(engine.url.render_as_string(hide_password=False), statement_seconds=1)
    sleep = "SELECT pg_sleep(20)" if engine.dialect.name == "postgresql" else "SELECT sleep(20)"
    began = time.monotonic()
    with pytest.raises(Unavailable), translated_errors(hasty), hasty.connect() as connection:
        connection.execute(text(sleep))
    assert time.monotonic() - began < allowed(15)
    hasty.dispose()
