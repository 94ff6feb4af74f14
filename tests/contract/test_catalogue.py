"""What the service reads and writes in the studio's tables (DESIGN 3.1)."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import Engine, text

from ncr_upload.adapters.sql import catalogue as studio
from ncr_upload.adapters.sql.catalogue import SqlCatalogue
from ncr_upload.application.ports import Verdict
from ncr_upload.domain.errors import Rejected
from ncr_upload.domain.jobs import Stage, Status, Task
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


@pytest.mark.parametrize("engine", ["sqlite", "mariadb"], indirect=True)  # PostgreSQL compares no number with text
def test_a_numeric_job_id_column_matches_only_the_very_same_text(engine: Engine, catalogue: SqlCatalogue) -> None:
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE job_details"))
        columns = "id INT PRIMARY KEY, job_id INT, sku_id VARCHAR(9), status VARCHAR(9), is_uploaded INT"
        connection.execute(text(f"CREATE TABLE job_details ({columns})"))
        connection.execute(text("INSERT INTO job_details VALUES (1, 12, 'SKU1', 'Active', 1)"))
    assert catalogue.find_job("12", None).sku == "SKU1"
    for coerced in ("12.0", "12/../x", "12abc", " 12", "012", "0xC"):
        with pytest.raises(Rejected):
            catalogue.find_job(coerced, None)


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
