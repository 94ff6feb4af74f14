"""Whole jobs on real S3, validator and SFTP servers, with the records on each kind of database and in a foreign schema."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, text

from databases import SERVERS, Databases
from fault_table import fault
from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.adapters.sql.own_statements import load_statements
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import Status
from ncr_upload.entrypoints.bootstrap.deliveries import SettingsMissing, require_worker_settings
from ncr_upload.entrypoints.bootstrap.doctor import make_checks
from ncr_upload.entrypoints.bootstrap.records import check_tables
from ncr_upload.entrypoints.doctor import State, examine
from ncr_upload.entrypoints.embedded.product import Product
from ncr_upload.migrations.apply import upgrade
from studio_rows import open_database
from workplace import Workplace

DOCUMENT = Path(__file__).parents[2] / "docs" / "catalogue_sql.md"
FOREIGN = (
    "CREATE TABLE assets (asset_id INTEGER PRIMARY KEY, ticket VARCHAR(64), product_code VARCHAR(64), state VARCHAR(20), "
    "delivered_at VARCHAR(19), delivered_by VARCHAR(64))",
    "CREATE TABLE uploads (ticket VARCHAR(64), bucket_key VARCHAR(500), uploaded_at VARCHAR(19))",
    "CREATE TABLE verdicts (ticket VARCHAR(64), http_status INTEGER, body TEXT)",
    "CREATE TABLE notices (product_code VARCHAR(64), campaign VARCHAR(64), notice VARCHAR(64))",
)


@pytest.fixture(scope="module")
def databases() -> Iterator[Databases]:
    running = Databases()
    yield running
    running.close()


@pytest.fixture(params=["sqlite", *SERVERS])
def url(request: pytest.FixtureRequest, databases: Databases, tmp_path: Path) -> str:
    folder = tmp_path / "other"
    folder.mkdir()
    return databases.create(request.param, folder)


@pytest.fixture
def site(workplace: Workplace, url: str) -> Workplace:
    """With the studio's usual tables on that database."""
    workplace.engine.dispose()
    workplace.engine = open_database(url)
    workplace.change(database_url=SecretStr(url))
    return workplace


def test_a_job_is_delivered_recorded_and_cleaned_up(site: Workplace, product: Product) -> None:
    job_id = f"job-{site.engine.dialect.name}"
    site.place(job_id, product)
    task = site.deliver(job_id)
    assert task.status is Status.COMPLETED, task
    delivered = site.delivered(job_id)
    assert delivered is not None
    assert len(delivered) == task.files
    (row,) = site.studio_rows("job_details")
    assert (row["is_uploaded"], row["job_status"], row["upload_count"]) == (0, "IAPPROVED", 1)
    assert [len(site.studio_rows(table)) for table in ("email", "history_log", "model_validation")] == [1, 1, 1]
    assert any("delivered" in line or "completed" in line for line in site.history(task))


def test_a_package_that_fails_validation_closes_the_gate(site: Workplace, broken_product: Product) -> None:
    job_id = f"bad-{site.engine.dialect.name}"
    site.place(job_id, broken_product)
    assert site.deliver(job_id).status is Status.VALIDATION_FAILED
    assert site.delivered(job_id) is None
    assert [row["is_uploaded"] for row in site.studio_rows("job_details")] == [0]


# --- another schema


@pytest.fixture
def foreign(workplace: Workplace, url: str, tmp_path: Path) -> Workplace:
    """A studio with the tables of the documented example, and none of the usual ones."""
    (example,) = re.findall(r"```sql\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    path = tmp_path / "catalogue.sql"
    path.write_text(example)
    workplace.engine.dispose()
    workplace.engine = open_engine(url)
    upgrade(workplace.engine)
    run(workplace.engine, *FOREIGN)
    workplace.change(database_url=SecretStr(url), catalogue_sql=path)
    return workplace


def run(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def put_asset(site: Workplace, job_id: str, product: Product, *, state: str = "uploaded") -> None:
    site.put_objects(product.files)
    run(site.engine, f"INSERT INTO assets VALUES (7, '{job_id}', '{product.sku}', '{state}', NULL, NULL)")
    for key in product.files:
        run(site.engine, f"INSERT INTO uploads VALUES ('{job_id}', '{key}', '2026-11-01 10:00:00')")


@fault(
    "SQL: the studio's tables refuse the rows of a delivery",
    injector="ALTER TABLE history_log: a column that demands a value",
    invariants="LOPRH",
    outcome="found out before the publish: nothing becomes visible; delivered once it is mended",
)
def test_a_delivery_that_could_not_be_recorded_is_not_published(site: Workplace, product: Product) -> None:
    job_id = f"unrecorded-{uuid.uuid4().hex}"  # the destination is shared with the other cases
    site.place(job_id, product)
    run(site.engine, "DROP TABLE history_log")
    columns = "sku_id VARCHAR(64), action VARCHAR(16), action_by VARCHAR(64), timestamp VARCHAR(19)"
    run(site.engine, f"CREATE TABLE history_log ({columns}, reason VARCHAR(9) NOT NULL)")
    task = site.deliver(job_id)
    assert task.status is Status.FAILED
    assert task.problem is not None
    assert (task.problem.code, "reason" in task.message, "may be visible" in task.message) == (
        *("database_row_refused", True, False),
    ), task.message
    assert site.delivered(job_id) is None
    site.sweep(task)
    assert site.leftovers() == []
    assert [len(site.studio_rows(table)) for table in ("email", "history_log")] == [0, 0]
    run(site.engine, "DROP TABLE history_log", f"CREATE TABLE history_log ({columns})")
    assert site.deliver(job_id).status is Status.COMPLETED
    assert [len(site.studio_rows(table)) for table in ("email", "history_log")] == [1, 1]


def test_a_job_of_another_schema_is_delivered_by_the_documented_example(foreign: Workplace, product: Product) -> None:
    check_tables(foreign.engine, foreign.settings)
    job_id = f"own-{foreign.engine.dialect.name}"
    put_asset(foreign, job_id, product)
    task = foreign.deliver(job_id, row_id=7)
    assert task.status is Status.COMPLETED, task
    assert foreign.delivered(job_id)
    (asset,) = foreign.studio_rows("assets")
    assert (asset["state"], asset["delivered_by"], len(asset["delivered_at"])) == ("delivered", "ann", 19)
    assert foreign.studio_rows("notices") == [{"product_code": product.sku, "campaign": "spring", "notice": "delivered"}]
    assert [row["http_status"] for row in foreign.studio_rows("verdicts")] == [200]


def test_in_another_schema_a_no_closes_the_gate_and_every_look_up_refuses_as_usual(
    foreign: Workplace, broken_product: Product
) -> None:
    job_id = f"no-{foreign.engine.dialect.name}"
    put_asset(foreign, job_id, broken_product)
    codes = [foreign.deliver(job_id, row_id).problem for row_id in (8,)] + [foreign.deliver("nobody").problem]
    assert [problem.code for problem in codes if problem] == ["row_mismatch", "sku_not_found"]
    assert foreign.deliver(job_id).status is Status.VALIDATION_FAILED
    assert [row["state"] for row in foreign.studio_rows("assets")] == ["refused"]
    assert foreign.deliver(job_id).status is Status.FAILED  # no longer awaiting


def test_tables_that_no_transaction_covers_are_a_doubt_of_the_doctors(databases: Databases, workplace: Workplace) -> None:
    engine = open_database(databases.create("mariadb", workplace.settings.work_dir))
    run(engine, "ALTER TABLE email ENGINE = MyISAM")
    workplace.change(database_url=SecretStr(engine.url.render_as_string(hide_password=False)))
    engine.dispose()
    checks = {"database": make_checks(workplace.settings)["database"]}
    (doubt,) = [finding for finding in examine(checks, 60) if finding.state is State.DOUBTFUL]
    assert ("covers email" in doubt.told, "InnoDB" in str(doubt.next_step)) == (True, True), doubt


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("product_code AS sku, ticket AS job_id", "product_code", "'find_sku' returns no column sku"),
        ("FROM uploads", "FROM nowhere", "'list_files' is refused by the database"),
        ("UPDATE assets SET state = 'refused'", "UPDATE assets SET nothing = 'refused'", "'record_refusal' is refused"),
    ],
)
def test_a_statement_that_does_not_fit_the_database_is_named_by_doctor_and_changes_nothing(
    foreign: Workplace, before: str, after: str, told: str
) -> None:
    path = foreign.settings.catalogue_sql
    assert path is not None
    content = path.read_text()
    assert before in content
    path.write_text(content.replace(before, after, 1))
    (wrong,) = [
        finding
        for finding in examine({"database": make_checks(foreign.settings)["database"]}, 60)
        if finding.state is State.WRONG
    ]
    assert (wrong.code, str(path) in wrong.told, told in wrong.told) == ("catalogue_sql", True, True), wrong
    assert [foreign.studio_rows(table) for table in ("assets", "notices", "verdicts")] == [[], [], []]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        ("", "names no statement"),
        ("SELECT 1;", "line 1: there is a statement before"),
        ("-- name: find_everything\nSELECT 1;", "line 1: no statement is called 'find_everything'"),
        ("-- name: find_sku\nSELECT :job_id;\n-- name: find_sku\nSELECT :job_id;", "line 3: 'find_sku' is there twice"),
        ("-- name: find_sku\nSELECT sku FROM t WHERE j = :job;", "'find_sku' asks for :job, which it is not given"),
        ("-- name: find_sku\nSELECT sku FROM t;", "'find_sku' does not use :job_id"),
        ("-- name: find_sku\n-- SELECT sku", "'find_sku' needs exactly one SELECT, not 0"),
        ("-- name: list_files\nSELECT :job_id;\nSELECT :job_id;", "'list_files' needs exactly one SELECT, not 2"),
    ],
)
def test_a_file_that_cannot_be_used_stops_the_worker_with_the_reason(
    workplace: Workplace, tmp_path: Path, content: str | None, told: str
) -> None:
    path = tmp_path / "own.sql"
    if content is not None:
        path.write_text(content)
    with pytest.raises(Unavailable):
        load_statements(path)
    workplace.change(catalogue_sql=path)
    with pytest.raises(SettingsMissing, match=re.escape(told)) as stopped:
        require_worker_settings(workplace.settings)
    assert str(path) in str(stopped.value)
    assert "docs/catalogue_sql.md" in str(stopped.value)


def test_what_the_file_does_not_name_goes_to_the_usual_tables(site: Workplace, product: Product, tmp_path: Path) -> None:
    path = tmp_path / "own.sql"
    path.write_text("-- name: record_delivery\nUPDATE job_details SET job_status = 'SENT' WHERE job_id = :job_id;\n")
    site.change(catalogue_sql=path)
    job_id = f"part-{site.engine.dialect.name}"
    site.place(job_id, product)
    assert site.deliver(job_id).status is Status.COMPLETED
    assert [row["job_status"] for row in site.studio_rows("job_details")] == ["SENT"]
    assert site.studio_rows("email") == []
    assert len(site.studio_rows("model_validation")) == 1
