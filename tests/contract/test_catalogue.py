"""What the service reads and writes in the studio's tables (docs/contract.md, section 1)."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import Engine, text

from databases import SERVERS
from ncr_upload.adapters.sql import catalogue as studio
from ncr_upload.adapters.sql.catalogue import SqlCatalogue
from ncr_upload.adapters.sql.engine import translated_errors
from ncr_upload.adapters.sql.own_statements import OwnCatalogue
from ncr_upload.adapters.sql.studio_tables import find_lasting
from ncr_upload.application.ports import Verdict
from ncr_upload.domain.errors import Rejected
from ncr_upload.domain.jobs import Stage, Status, Task
from ncr_upload.domain.selection import select_files
from studio_rows import put, put_job, rows

NEW_YORK = ZoneInfo("America/New_York")
TASK = Task("t-1", "job-1", "ann", "spring", None, None, Status.PROCESSING, Stage.RECORD, 97, "", 1, 5, 0.0, 0.0)


@pytest.fixture
def catalogue(engine: Engine) -> SqlCatalogue:
    return SqlCatalogue(engine, NEW_YORK)


def test_the_sku_is_that_of_the_active_row(engine: Engine, catalogue: SqlCatalogue) -> None:
    put_job(engine, "job-1", sku="OLD", status="Archived")
    put_job(engine, "job-1", sku="SKU1")
    found = catalogue.find_job("job-1", None)
    assert (found.sku, found.awaiting) == ("SKU1", True)


def test_a_job_without_an_active_row_is_refused_by_name(engine: Engine, catalogue: SqlCatalogue) -> None:
    put_job(engine, "job-1", status="Archived")
    with pytest.raises(Rejected, match="job-1") as refused:
        catalogue.find_job("job-1", None)
    assert refused.value.code == "sku_not_found"


@pytest.mark.parametrize("sku", [None, ""])
def test_an_active_row_without_a_sku_is_refused(engine: Engine, catalogue: SqlCatalogue, sku: str | None) -> None:
    put_job(engine, "job-1", sku=sku)
    with pytest.raises(Rejected) as refused:
        catalogue.find_job("job-1", None)
    assert refused.value.code == "sku_not_found"


def test_a_job_that_is_not_awaiting_upload_says_so(engine: Engine, catalogue: SqlCatalogue) -> None:
    put_job(engine, "job-1", awaiting=0)
    assert not catalogue.find_job("job-1", None).awaiting


def test_a_row_id_of_another_job_is_refused(engine: Engine, catalogue: SqlCatalogue) -> None:
    put_job(engine, "job-1", id=1)
    put_job(engine, "job-2", id=2)
    assert catalogue.find_job("job-1", 1).row_id == 1
    with pytest.raises(Rejected, match="row_id 2") as refused:
        catalogue.find_job("job-1", 2)
    assert refused.value.code == "row_mismatch"


def test_two_active_skus_are_refused_naming_both(engine: Engine, catalogue: SqlCatalogue) -> None:
    put_job(engine, "job-1", sku="A")
    put_job(engine, "job-1", sku="B")
    with pytest.raises(Rejected, match="A, B") as refused:
        catalogue.find_job("job-1", None)
    assert refused.value.code == "sku_ambiguous"


def remake(engine: Engine, table: str, columns: str, *rows: str) -> None:
    """The studio's table as some studio may have made it."""
    with engine.begin() as connection:
        connection.execute(text(f"DROP TABLE {table}"))
        connection.execute(text(f"CREATE TABLE {table} ({columns})"))
        for row in rows:
            connection.execute(text(f"INSERT INTO {table} VALUES ({row})"))


DETAILS = (
    "id INT PRIMARY KEY, job_id {kind}, sku_id VARCHAR(9), status VARCHAR(9), is_reviewed INT, is_uploaded INT, "
    "job_status VARCHAR(20), upload_count INT, uploadTime {time}, updateTime {time}, campaign VARCHAR(20)"
)


@pytest.mark.parametrize("kind", ["INT", "BIGINT", "NUMERIC(20)"])
def test_a_numeric_job_id_column_matches_only_the_very_same_text(engine: Engine, catalogue: SqlCatalogue, kind: str) -> None:
    time = "TIMESTAMP" if engine.dialect.name == "postgresql" else "DATETIME"
    row = "1, 12, 'SKU1', 'Active', 0, 1, NULL, NULL, NULL, NULL, 'spring'"
    remake(engine, "job_details", DETAILS.format(kind=kind, time=time), row)
    remake(engine, "model_validation", f"job_id {kind} UNIQUE, response INT, json TEXT")
    assert catalogue.find_job("12", 1).sku == "SKU1"
    for other in ("12.0", "012", "12abc", "12/../x", " 12", "0xC", "99999999999999999999"):
        with pytest.raises(Rejected) as refused:
            catalogue.find_job(other, None)
        assert refused.value.code == "sku_not_found"
    with engine.begin() as connection:
        catalogue.judged(replace(TASK, job_id="12"), Verdict(True, "Valid", 200, "{}"))(connection)
        catalogue.delivered(replace(TASK, job_id="12x"), "SKU1")(connection)
        assert connection.execute(text("SELECT is_uploaded FROM job_details")).scalar_one() == 1
        catalogue.delivered(replace(TASK, job_id="12"), "SKU1")(connection)
        assert connection.execute(text("SELECT upload_count, is_uploaded FROM job_details")).one() == (1, 0)


def test_jobs_whose_ids_differ_only_in_case_are_different_jobs(engine: Engine, catalogue: SqlCatalogue) -> None:
    """Most of MySQL's collations take them for one; and so may the studio's own unique key, where the newest wins."""
    put_job(engine, "ABC", sku="UPPER")
    put_job(engine, "abc", sku="lower")
    for job_id, path in (("ABC", "A.glb"), ("abc", "a.glb")):
        put(engine, studio.job_files, job_id=job_id, file_path=path, file_type="base", timestamp=datetime(2026, 11, 1))  # noqa: DTZ001
    assert (catalogue.find_job("ABC", None).sku, catalogue.find_job("abc", None).sku) == ("UPPER", "lower")
    assert [file.key for file in catalogue.list_files("abc")] == ["a.glb"]
    with engine.begin() as connection:
        for job_id in ("ABC", "abc"):
            catalogue.judged(replace(TASK, job_id=job_id), Verdict(True, "Valid", 200, f'{{"of": "{job_id}"}}'))(connection)
        catalogue.delivered(replace(TASK, job_id="abc"), "lower")(connection)
    assert {row["job_id"]: row["is_uploaded"] for row in rows(engine, studio.job_details)} == {"ABC": 1, "abc": 0}
    verdicts = rows(engine, studio.model_validation)
    assert any("abc" in str(row["json"]) for row in verdicts)  # PostgreSQL hands over the text as it is


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_columns_that_were_made_without_quotes_are_found_in_lower_case(engine: Engine, catalogue: SqlCatalogue) -> None:
    remake(engine, "job_details", DETAILS.format(kind="VARCHAR(20)", time="TIMESTAMP"))
    put_values = "1, 'job-1', 'SKU1', 'Active', 0, 1, NULL, 2, NULL, NULL, 'spring'"
    with engine.begin() as connection:
        connection.execute(text(f"INSERT INTO job_details VALUES ({put_values})"))
        catalogue.delivered(TASK, "SKU1")(connection)
        assert connection.execute(text("SELECT uploadtime IS NOT NULL FROM job_details")).scalar_one()


@pytest.mark.parametrize("engine", ["mariadb", "mysql"], indirect=True)
def test_a_zero_date_is_no_time_and_the_row_is_named(engine: Engine, catalogue: SqlCatalogue) -> None:
    with engine.begin() as connection:
        connection.execute(text("SET SESSION sql_mode = ''"))
        connection.execute(
            text("INSERT INTO job_files (job_id, file_path, file_type, timestamp) VALUES ('job-1', 'a.glb', 'base', :at)"),
            {"at": "0000-00-00"},
        )
    with pytest.raises(Rejected, match=r"a\.glb.*0000-00-00") as refused:
        select_files(catalogue.list_files("job-1"), "latest_date", job_id="job-1")
    assert refused.value.code == "timestamp_invalid"
    assert len(select_files(catalogue.list_files("job-1"), "all", job_id="job-1").files) == 1


def test_every_character_of_a_name_is_kept(engine: Engine, catalogue: SqlCatalogue) -> None:
    put_job(engine, "job-1")
    with engine.begin() as connection:
        catalogue.delivered(replace(TASK, username="ann 🚀 Ω", campaign="été 🎄"), "SKU1")(connection)
    assert [row["action_by"] for row in rows(engine, studio.history_log)] == ["ann 🚀 Ω"]
    assert [row["campagin"] for row in rows(engine, studio.email)] == ["été 🎄"]


def test_only_base_files_of_the_job_are_listed(engine: Engine, catalogue: SqlCatalogue) -> None:
    at = datetime(2026, 11, 1, 10, 0, 0)  # noqa: DTZ001 - the studio's times are local
    for job_id, path, kind in (("job-1", "a/x.glb", "base"), ("job-1", "a/y.glb", "preview"), ("job-2", "a/z.glb", "base")):
        put(engine, studio.job_files, job_id=job_id, file_path=path, file_type=kind, timestamp=at)
    assert [(file.key, file.timestamp) for file in catalogue.list_files("job-1")] == [("a/x.glb", "2026-11-01 10:00:00")]


def test_a_delivery_updates_the_awaiting_row_and_adds_one_email_and_one_history_row(
    engine: Engine, catalogue: SqlCatalogue
) -> None:
    put_job(engine, "job-1", upload_count=2, is_reviewed=1, job_status="X")
    put_job(engine, "job-2", sku="SKU2")
    with engine.begin() as connection:
        catalogue.delivered(TASK, "SKU1")(connection)
    mine, other = rows(engine, studio.job_details)
    assert (mine["is_reviewed"], mine["is_uploaded"], mine["job_status"], mine["upload_count"]) == (0, 0, "IAPPROVED", 3)
    assert mine["uploadTime"] == mine["updateTime"] is not None
    assert (other["is_uploaded"], other["job_status"]) == (1, None)
    assert rows(engine, studio.email) == [{"sku": "SKU1", "status": "Waiting", "campagin": "spring"}]
    (entry,) = rows(engine, studio.history_log)
    assert (entry["sku_id"], entry["action"], entry["action_by"]) == ("SKU1", "review", "ann")


def test_a_rehearsed_delivery_leaves_nothing_and_the_real_one_follows(engine: Engine, catalogue: SqlCatalogue) -> None:
    put_job(engine, "job-1", upload_count=2)
    with engine.begin() as connection:
        assert catalogue.rehearsed(TASK, "SKU1")(connection) is None
    (job,) = rows(engine, studio.job_details)
    assert (job["upload_count"], job["is_uploaded"]) == (2, 1)
    assert rows(engine, studio.email) == rows(engine, studio.history_log) == []
    with engine.begin() as connection:
        catalogue.rehearsed(TASK, "SKU1")(connection)
        catalogue.delivered(TASK, "SKU1")(connection)
    assert len(rows(engine, studio.email)) == len(rows(engine, studio.history_log)) == 1


def test_a_rehearsal_is_refused_as_the_delivery_would_be(engine: Engine, catalogue: SqlCatalogue) -> None:
    put_job(engine, "job-1")
    remake(
        engine, "history_log", "sku_id VARCHAR(9), action VARCHAR(9), action_by VARCHAR(9), timestamp TEXT, more INT NOT NULL"
    )
    with pytest.raises(Rejected, match=r"history_log .* column more") as refused:
        rehearse(engine, catalogue, TASK)
    assert refused.value.code == "database_row_refused"
    assert rows(engine, studio.email) == []


def rehearse(engine: Engine, catalogue: SqlCatalogue, task: Task) -> None:
    with translated_errors(engine), engine.begin() as connection:
        catalogue.rehearsed(task, "SKU1")(connection)


HISTORY = "sku_id VARCHAR(9), action VARCHAR(9), action_by VARCHAR(9) {}, timestamp VARCHAR(19)"
EMAIL = "sku VARCHAR(9) UNIQUE, status VARCHAR(9), campagin {}"


@pytest.mark.parametrize(
    ("table", "columns", "task", "told"),
    [
        ("history_log", HISTORY.format("CHECK (action_by <> 'ann')"), {}, ""),
        (
            "history_log",
            HISTORY.format(""),
            {"username": "ann-from-the-studio"},
            "action_by and the value 'ann-from-the-studio'",
        ),
        ("email", EMAIL.format("INTEGER"), {"campaign": "spring"}, "campagin"),
        ("email", EMAIL.format("VARCHAR(9)"), {}, "SKU1"),  # which it holds already
    ],
    ids=["constraint", "length", "type", "unique"],
)
def test_a_row_that_no_try_will_get_in_is_rejected_naming_table_column_and_value(
    engine: Engine, catalogue: SqlCatalogue, table: str, columns: str, task: dict[str, Any], told: str
) -> None:
    put_job(engine, "job-1")
    is_sqlite = engine.dialect.name == "sqlite"
    if is_sqlite:  # it minds neither length nor type, unless it is told to
        columns = columns.replace("action_by VARCHAR(9) ,", "action_by VARCHAR(9) CHECK (length(action_by) < 10),")
        columns = columns.replace("campagin INTEGER", "campagin INTEGER CHECK (typeof(campagin) = 'integer')")
    remake(engine, table, columns, *(["'SKU1', '', NULL"] if told == "SKU1" else []))
    with pytest.raises(Rejected, match=f"table {table} ") as refused:
        rehearse(engine, catalogue, replace(TASK, **task))
    assert refused.value.code == "database_row_refused"
    assert is_sqlite or engine.dialect.name == "postgresql" or told in refused.value.message, refused.value
    if engine.dialect.name == "postgresql" and "length" in told:
        assert told in refused.value.message
    assert rows(engine, studio.history_log) == [] or table == "history_log"


@pytest.mark.parametrize("engine", SERVERS, indirect=True)
def test_of_a_studios_own_statement_the_refused_value_is_named_too(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE shipped (ticket VARCHAR(9), who VARCHAR(4))"))
    own = OwnCatalogue(engine, NEW_YORK, {"record_delivery": [text("INSERT INTO shipped VALUES (:job_id, :username)")]})
    with pytest.raises(Rejected, match="table shipped") as refused:
        rehearse(engine, own, replace(TASK, username="annabel"))
    named = ":username and the value 'annabel'" if engine.dialect.name == "postgresql" else "its column who"
    assert (refused.value.code, named in refused.value.message) == ("database_row_refused", True), refused.value


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_a_constraint_that_is_looked_at_when_the_transaction_ends_is_looked_at_by_the_rehearsal(
    engine: Engine, catalogue: SqlCatalogue
) -> None:
    put_job(engine, "job-1")
    remake(engine, "email", "sku VARCHAR(9) UNIQUE DEFERRABLE INITIALLY DEFERRED, status TEXT, campagin TEXT", "'SKU1', '', ''")
    with pytest.raises(Rejected, match="table email") as refused:
        rehearse(engine, catalogue, TASK)
    assert refused.value.code == "database_row_refused"


def test_what_was_just_taken_from_a_user_for_a_campaign_is_not_tried_again_so_soon(
    engine: Engine, catalogue: SqlCatalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_job(engine, "job-1")
    assert catalogue.foreseen(TASK, "SKU1") is not None
    rehearse(engine, catalogue, TASK)
    assert catalogue.foreseen(TASK, "SKU1") is None
    assert catalogue.foreseen(replace(TASK, username="bob"), "SKU1") is not None
    monkeypatch.setattr(studio, "TAKEN_SECONDS", 0.0)
    assert catalogue.foreseen(TASK, "SKU1") is not None


@pytest.mark.parametrize("engine", ["mariadb", "mysql"], indirect=True)
def test_where_nothing_can_be_taken_back_nothing_is_rehearsed(engine: Engine, catalogue: SqlCatalogue) -> None:
    put_job(engine, "job-1")
    remake(engine, "history_log", "sku_id VARCHAR(9), action VARCHAR(9), action_by VARCHAR(9), timestamp DATETIME")
    with engine.begin() as connection:
        assert find_lasting(connection) == []
        connection.execute(text("ALTER TABLE history_log ENGINE = MyISAM"))
    with engine.begin() as connection:
        catalogue.rehearsed(TASK, "SKU1")(connection)
        assert find_lasting(connection) == ["history_log"]
    assert rows(engine, studio.email) == rows(engine, studio.history_log) == []


def test_a_delivery_with_a_row_id_touches_that_row_only(engine: Engine, catalogue: SqlCatalogue) -> None:
    put_job(engine, "job-1", id=1)
    put_job(engine, "job-1", id=2)
    with engine.begin() as connection:
        catalogue.delivered(replace(TASK, row_id=2), "SKU1")(connection)
    assert [row["is_uploaded"] for row in rows(engine, studio.job_details)] == [1, 0]


def test_times_are_written_in_the_studios_zone_to_the_second(engine: Engine, catalogue: SqlCatalogue) -> None:
    before = datetime.now(NEW_YORK).replace(tzinfo=None, microsecond=0)
    with engine.begin() as connection:
        catalogue.delivered(TASK, "SKU1")(connection)
        written = str(connection.execute(text("SELECT timestamp FROM history_log")).scalar_one())
    after = datetime.now(NEW_YORK).replace(tzinfo=None)
    assert before <= datetime.strptime(written, "%Y-%m-%d %H:%M:%S") <= after  # noqa: DTZ007 - local by contract


@pytest.mark.parametrize(
    ("seconds", "local"),
    [
        (1772953199, "2026-03-08 01:59:59"),
        (1772953200, "2026-03-08 03:00:00"),  # the clock is put forward
        (1793511000, "2026-11-01 01:30:00"),
        (1793514600, "2026-11-01 01:30:00"),  # it is put back, and the hour comes twice
        (1793518200, "2026-11-01 02:30:00"),
    ],
)
def test_at_the_change_to_and_from_summer_time_the_studios_clock_is_written(
    engine: Engine, catalogue: SqlCatalogue, monkeypatch: pytest.MonkeyPatch, seconds: float, local: str
) -> None:
    monkeypatch.setattr(studio, "read_now", lambda _: seconds)
    with engine.begin() as connection:
        catalogue.delivered(TASK, "SKU1")(connection)
        assert str(connection.execute(text("SELECT timestamp FROM history_log")).scalar_one()) == local


def test_the_newest_verdict_replaces_the_one_before(engine: Engine, catalogue: SqlCatalogue) -> None:
    for result in ("Invalid", "Valid"):
        with engine.begin() as connection:
            catalogue.judged(TASK, Verdict(True, result, 200, f'{{"data": [{{"result": "{result}"}}]}}'))(connection)
    (row,) = rows(engine, studio.model_validation)
    assert (row["job_id"], row["response"], _json(row["json"])) == ("job-1", 200, {"data": [{"result": "Valid"}]})


def test_a_no_with_200_closes_the_gate_and_logs_no_failed_request(engine: Engine, catalogue: SqlCatalogue) -> None:
    put_job(engine, "job-1", upload_count=4, job_status="X")
    with engine.begin() as connection:
        catalogue.refused(TASK, "SKU1", Verdict(False, "Invalid", 200, "{}"), "http://validator/validate")(connection)
    (job,) = rows(engine, studio.job_details)
    assert (job["is_uploaded"], job["upload_count"], job["job_status"]) == (0, 4, "X")
    assert rows(engine, studio.validation_failed_req) == []


def test_a_no_with_another_status_is_logged_as_a_failed_request(engine: Engine, catalogue: SqlCatalogue) -> None:
    with engine.begin() as connection:
        catalogue.refused(TASK, "SKU1", Verdict(False, "HTTP 422", 422, "not json"), "http://validator/validate")(connection)
    (entry,) = rows(engine, studio.validation_failed_req)
    assert (entry["job_id"], entry["sku_id"], entry["response"], entry["api_url"]) == (
        "job-1",
        "SKU1",
        422,
        "http://validator/validate",
    )
    assert _json(rows(engine, studio.model_validation)[0]["json"]) == {"body": "not json"}


def _json(stored: Any) -> Any:
    """The studio's column is text, which PostgreSQL's driver gives back as it is."""
    return json.loads(stored) if isinstance(stored, str) else stored
