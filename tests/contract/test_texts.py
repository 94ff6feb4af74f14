"""Texts from outside, of any size and with any character, fit every column on each database, and hold no secret there."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import Engine, MetaData, select, text

from ledgers import Ledger, sql_ledger
from ncr_upload.adapters.sql import catalogue as studio
from ncr_upload.adapters.sql.catalogue import ANSWER_BYTES, SqlCatalogue
from ncr_upload.adapters.sql.engine import open_engine, place_of, translated_errors
from ncr_upload.adapters.sql.own_statements import OwnCatalogue, load_statements
from ncr_upload.application.ports import Verdict
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import Problem, Stage, Status, Task
from ncr_upload.domain.redaction import Redactor
from ncr_upload.domain.text import MESSAGE, PROBLEM, STATUS
from studio_rows import rows

SECRET = "s3cret/of the&validator"
TEXTS = {
    "a code of 3 MB": "A" * 3_145_728,
    "emoji": "😀" * 1_000_000,
    "what no database takes": "\0\ud83d\udfff\x1b[31m" * 200_000,
    "secrets": f"{SECRET} " * 200_000,
    "short": "é😀\0",
}
ZONE = ZoneInfo("America/New_York")
TASK = Task("t-1", "job-1", "ann", "spring", None, None, Status.PROCESSING, Stage.RECORD, 97, "", 1, 5, 0.0, 0.0, sku="SKU1")


@pytest.fixture
def guarded(engine: Engine) -> Any:
    """The same database, through an engine that knows a secret."""
    other = open_engine(engine.url.render_as_string(hide_password=False), redactor=Redactor([SECRET]))
    yield other
    other.dispose()


@pytest.fixture
def ledger(guarded: Engine) -> Ledger:
    return sql_ledger(guarded)


@pytest.mark.parametrize("words", TEXTS.values(), ids=TEXTS)
def test_an_attempt_ends_as_it_ended_whatever_was_said(guarded: Engine, ledger: Ledger, words: str) -> None:
    (task,) = ledger.accept("job-1")
    claim = ledger.claim(task)
    problem = Problem("object_x" * 99, "transient", words, words)
    ledger.claims.advance(claim, status=Status.PROCESSING, stage=Stage.DOWNLOAD, message=words)
    ledger.claims.put_back(claim, problem=problem, message=words, delay_seconds=0, spend_attempt=True)
    ledger.parking.park("sftp.partner", problem, 30)
    ledger.parking.stay_parked("sftp.partner", problem, tell=lambda _: words, wait_seconds=1, park_seconds=9)
    ledger.parking.heal("sftp.partner", words)
    ended = ledger.claims.finish(
        ledger.claim(task), status=Status.FAILED, stage=Stage.DOWNLOAD, message=words, problem=replace(problem, code="object_x")
    )
    assert (ended.status, ended.problem and ended.problem.code, ended.problem and ended.problem.error_class) == (
        *(Status.FAILED, "object_x", "transient"),
    )
    events = ledger.submissions.history(task.task_id)
    told = [ended.message, *(event.message for event in events)]
    assert all(len(each) <= STATUS.characters and len(each.encode()) <= STATUS.bytes for each in told)
    assert ended.problem is not None
    assert len(ended.problem.message) <= PROBLEM.characters
    assert len(words) < MESSAGE.characters or f"({len(words):,} characters in all)" in ended.message
    kept = everything(guarded)
    assert "s3cret" not in kept
    assert len(kept) < 12 * 4 * STATUS.bytes, "megabytes were kept"


def everything(engine: Engine) -> str:
    """Every value of every table, as text."""
    found = MetaData()
    found.reflect(engine)
    with engine.connect() as connection:
        return "\n".join(str(row) for table in found.sorted_tables for row in connection.execute(select(table)))


ANSWERS = {
    "60 reasons of 400 emoji": {"data": [{"result": "Invalid", "issues": [{"message": "😀" * 400}] * 60}]},
    "100,000 results": {"data": [{"result": "Invalid"}] * 100_000},
    "numbers that are none": {"data": [{"result": "Invalid", "score": float("nan"), "n": float("-inf"), "m": 10**400}]},
    "what no database takes": {"data": [{"result": "Invalid", "a\0\ud800": "b\0\udfff\ud83d"}]},
    "secrets": {"data": [{"result": "Invalid", f"for {SECRET}": [SECRET, json.dumps(SECRET)]}]},
    "deep": json.loads("[" * 400 + "]" * 400),
}
COLUMNS = {
    "as the studio has it": None,
    "JSON": {"postgresql": "JSONB", "mysql": "JSON", "mariadb": "JSON", "sqlite": "JSON"},
    "TEXT": {"postgresql": "TEXT", "mysql": "TEXT", "mariadb": "TEXT", "sqlite": "TEXT"},
    "VARCHAR": {"postgresql": "VARCHAR(2000)", "mysql": "VARCHAR(2000)", "mariadb": "VARCHAR(2000)", "sqlite": "VARCHAR(2000)"},
}


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_every_answer_of_a_validator_is_kept_as_far_as_the_column_goes(guarded: Engine, column: dict[str, str] | None) -> None:
    if column is not None:
        with guarded.begin() as connection:
            connection.execute(text("DROP TABLE model_validation"))
            kind = column[guarded.dialect.name]
            connection.execute(text(f"CREATE TABLE model_validation (job_id VARCHAR(64), response INTEGER, json {kind})"))
    catalogue = SqlCatalogue(guarded, ZONE)
    for name, answer in ANSWERS.items():
        with translated_errors(guarded), guarded.begin() as connection:
            connection.execute(text("DELETE FROM model_validation"))
            catalogue.judged(TASK, Verdict(False, "Invalid", 200, json.dumps(answer)))(connection)
        (row,) = rows(guarded, studio.model_validation)
        kept = row["json"] if not isinstance(row["json"], str) else json.loads(row["json"])  # as PostgreSQL's TEXT gives it
        assert len(json.dumps(kept, allow_nan=False)) <= ANSWER_BYTES, name
        assert "s3cret" not in json.dumps(kept), name
        assert isinstance(kept, dict | list), name


def test_an_answer_with_nothing_to_hide_is_kept_as_it_came(guarded: Engine) -> None:
    answer = {"data": [{"result": "Valid", "score": 1.5, "issues": [{"message": "é 😀", "n": 2**53}]}], "x": None}
    with guarded.begin() as connection:
        SqlCatalogue(guarded, ZONE).judged(TASK, Verdict(True, "Valid", 200, json.dumps(answer)))(connection)
    (kept,) = (row["json"] for row in rows(guarded, studio.model_validation))
    assert (json.loads(kept) if isinstance(kept, str) else kept) == answer


def test_statements_of_the_studios_own_get_no_more(guarded: Engine, tmp_path: Any) -> None:
    with guarded.begin() as connection:
        connection.execute(text("CREATE TABLE verdicts (body TEXT, result VARCHAR(64))"))
    path = tmp_path / "own.sql"
    path.write_text("-- name: record_verdict\nINSERT INTO verdicts VALUES (:body, :result);\n")
    own = OwnCatalogue(guarded, ZONE, load_statements(path))
    bodies = {name: json.dumps(answer) for name, answer in ANSWERS.items()}
    for name, body in {**bodies, "no JSON": "no JSON " + "😀" * 1_000_000 + SECRET}.items():
        with translated_errors(guarded), guarded.begin() as connection:
            connection.execute(text("DELETE FROM verdicts"))
            own.judged(TASK, Verdict(False, f"{SECRET}" * 99, 200, body))(connection)
        with guarded.connect() as connection:
            ((kept, result),) = connection.execute(text("SELECT body, result FROM verdicts")).all()
        assert len(kept.encode()) <= 65_535, name
        assert "s3cret" not in kept + result, name


def test_an_error_of_the_database_holds_no_secret(guarded: Engine) -> None:
    with pytest.raises(Unavailable) as failed, translated_errors(guarded), guarded.connect() as connection:
        connection.execute(text("SELECT 1 FROM no_such_table_" + "s3cret_of_theirs" + "x" * 20))
    assert failed.value.code == "database_schema"
    loud = open_engine(guarded.url.render_as_string(hide_password=False), redactor=Redactor(["s3cret_of_theirs"]))
    with pytest.raises(Unavailable) as failed, translated_errors(loud), loud.connect() as connection:
        connection.execute(text("SELECT 1 FROM no_such_table_" + "s3cret_of_theirs" + "x" * 20))
    assert "s3cret" not in str(failed.value)
    loud.dispose()


@pytest.mark.parametrize("password", ["p@ss", "p@s/s@x", "a#b@c", "a?b@c", "a/b@c", "100%zz", "p%40ss", "plain"])
@pytest.mark.parametrize("backend", ["mysql+pymysql", "postgresql+psycopg"])
def test_a_database_is_named_without_any_end_of_its_password(backend: str, password: str) -> None:
    engine = open_engine(f"{backend}://ann:{password}@host/db?ssl_key=/etc/tail@x.pem")
    place = place_of(engine)
    assert place.startswith(f"{backend}://")
    assert place.endswith("host/db")
    assert not any(part in place.replace("host/db", "") for part in ("p@", "ss@", "s/s", "b@c", "%zz", "%40", "plain", "tail"))
