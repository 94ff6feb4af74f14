"""Bring your own schema: the studio's look-ups and recordings by named statements of one file (CATALOGUE_SQL).

docs/catalogue_sql.md says what each statement is given and must return.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import Connection, Engine, TextClause, text
from sqlalchemy.exc import SQLAlchemyError

from ncr_upload.adapters.sql.catalogue import SMALL_ANSWER_BYTES, SqlCatalogue, bound_answer, choose_sku, row_mismatch
from ncr_upload.adapters.sql.engine import READ_ONLY, redactor_of, translated_errors
from ncr_upload.adapters.sql.failures import cause_of
from ncr_upload.application.ports import Recording, StudioJob, Verdict
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import Task
from ncr_upload.domain.packages import SourceFile
from ncr_upload.domain.text import CODE, clean

JOB = frozenset({"job_id", "row_id"})
DELIVERY = JOB | {"sku", "username", "campaign", "task_id", "now"}
ANSWER = DELIVERY | {"http_status", "body", "result"}


@dataclass(frozen=True, slots=True)
class Form:
    """What a statement may ask for, and what a look-up must return. Of a recording, `columns` is None."""

    parameters: frozenset[str]
    columns: frozenset[str] | None = None


FORMS: Mapping[str, Form] = {
    "find_sku": Form(JOB, frozenset({"sku"})),
    "check_row": Form(JOB, frozenset()),
    "find_awaiting": Form(JOB, frozenset()),
    "list_files": Form(frozenset({"job_id"}), frozenset({"file_path", "timestamp"})),
    "record_delivery": Form(DELIVERY),
    "record_verdict": Form(ANSWER - {"sku"}),
    "record_refusal": Form(ANSWER),
    "record_unanswered": Form(DELIVERY | {"http_status", "api_url"}),
}
_USERS: Mapping[str, set[str]] = {
    "job_details": {"find_sku", "check_row", "find_awaiting", "record_delivery", "record_refusal"},
    "job_files": {"list_files"},
    "model_validation": {"record_verdict"},
    "validation_failed_req": {"record_unanswered"},
    "email": {"record_delivery"},
    "history_log": {"record_delivery"},
}
"""The statements that use each of the usual tables."""

HEADER = re.compile(r"^\s*--\s*name:\s*(?P<name>.*?)\s*$", re.IGNORECASE)
END_OF_STATEMENT = re.compile(r";\s*$", re.MULTILINE)
COMMENT = re.compile(r"--[^\n]*")
NEXT_STEP = "Correct the file (docs/catalogue_sql.md), then start the service again; `ncr doctor` tries it."


Statements = Mapping[str, Sequence[TextClause]]


def load_statements(path: Path) -> Statements:
    """The statements of the file by name. A recording may have several or none. Raises `Unavailable` ('catalogue_sql')."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(path, f"cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    found = {name: _read_statement(path, name, body) for name, body in _split(path, content)}
    if not found:
        raise _unusable(path, "has no '-- name: …' line, so it names no statement")
    return found


def tables_in_use(statements: Statements) -> set[str]:
    """The studio's usual tables that are still read or written."""
    return {table for table, names in _USERS.items() if not names <= statements.keys()}


def _split(path: Path, content: str) -> list[tuple[str, str]]:
    parts: list[tuple[str, list[str]]] = []
    for number, line in enumerate(content.splitlines(), 1):
        if header := HEADER.match(line):
            name = header["name"]
            if name not in FORMS:
                raise _unusable(path, f"line {number}: no statement is called '{name}' (known: {', '.join(FORMS)})")
            if any(name == other for other, _ in parts):
                raise _unusable(path, f"line {number}: '{name}' is there twice")
            parts.append((name, []))
        elif parts:
            parts[-1][1].append(line)
        elif COMMENT.sub("", line).strip():
            raise _unusable(path, f"line {number}: there is a statement before the first '-- name: …' line")
    return [(name, "\n".join(lines)) for name, lines in parts]


def _read_statement(path: Path, name: str, body: str) -> list[TextClause]:
    """Comments go: a colon or a semicolon in one means nothing."""
    plain = COMMENT.sub("", body)
    statements = [text(part.strip()) for part in END_OF_STATEMENT.split(plain) if part.strip()]
    form = FORMS[name]
    if form.columns is not None and len(statements) != 1:
        raise _unusable(path, f"'{name}' needs exactly one SELECT, not {len(statements)}")
    for statement in statements:
        asked = set(statement.compile().params)
        if unknown := sorted(asked - form.parameters):
            given = ", ".join(f":{each}" for each in sorted(form.parameters))
            raise _unusable(
                path,
                f"'{name}' asks for :{unknown[0]}, which it is not given. It may use {given}; a colon that begins no parameter "
                "is written \\:",
            )
        if form.columns is not None and "job_id" not in asked:
            raise _unusable(path, f"'{name}' does not use :job_id, so it would find every job")
    return statements


class OwnCatalogue(SqlCatalogue):
    """`Catalogue` where the statements given replace those on the studio's usual tables."""

    def __init__(self, engine: Engine, zone: ZoneInfo, statements: Statements) -> None:
        super().__init__(engine, zone)
        self._statements = statements

    def find_job(self, job_id: str, row_id: int | None) -> StudioJob:
        """See `Catalogue.find_job`. What no statement tells comes from the usual rows of `job_details`."""
        if not self._statements.keys() & {"find_sku", "check_row", "find_awaiting"}:
            return super().find_job(job_id, row_id)
        asked = {"job_id": job_id, "row_id": row_id}
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            whole = {"find_sku", "check_row", "find_awaiting"} <= self._statements.keys()
            usual = [] if whole else self.read_rows(connection, job_id)
            usual = [row for row in usual if row_id is None or row.id == row_id]
            if row_id is not None and not self._ask(connection, "check_row", asked, usual):
                raise row_mismatch(job_id, row_id)
            skus = self._ask(connection, "find_sku", asked, [{"sku": row.sku_id} for row in usual])
            awaiting = self._ask(connection, "find_awaiting", asked, [row for row in usual if row.is_uploaded == 1])
        return StudioJob(row_id or 0, choose_sku(job_id, [row["sku"] for row in skus]), awaiting=bool(awaiting))

    def list_files(self, job_id: str) -> Sequence[SourceFile]:
        """See `Catalogue.list_files`."""
        if "list_files" not in self._statements:
            return super().list_files(job_id)
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            rows = self._ask(connection, "list_files", {"job_id": job_id}, [])
        return [SourceFile(row["file_path"] or "", str(row["timestamp"] or "")) for row in rows]

    def delivered(self, task: Task, sku: str) -> Recording:
        """See `Catalogue.delivered`."""
        return self._recording("record_delivery", super().delivered(task, sku), task, sku)

    def is_delivered_to(self, tables: Sequence[str]) -> bool:
        """Statements of the studio's own may write into any."""
        return bool(tables) if "record_delivery" in self._statements else super().is_delivered_to(tables)

    def judged(self, task: Task, verdict: Verdict) -> Recording:
        """See `Catalogue.judged`."""
        facts = _facts(self._engine, verdict)
        record = self._recording("record_verdict", super().judged(task, verdict), task, task.sku, **facts)
        return self._rejecting(record, task, task.sku, **facts)

    def refused(self, task: Task, sku: str, verdict: Verdict, api_url: str) -> Recording:
        """See `Catalogue.refused`. `record_refusal` stands for closing the gate; what was answered is recorded as ever."""
        if "record_refusal" not in self._statements:
            return super().refused(task, sku, verdict, api_url)
        close = self._recording("record_refusal", _nothing, task, sku, **_facts(self._engine, verdict))

        def write(connection: Connection) -> str | None:
            self.judged(task, verdict)(connection)
            if verdict.http_status != 200:
                self.unanswered(task, sku, verdict.http_status, api_url)(connection)
            return close(connection)

        return self._rejecting(write, task, sku, **_facts(self._engine, verdict))

    def unanswered(self, task: Task, sku: str, http_status: int, api_url: str) -> Recording:
        """See `Catalogue.unanswered`."""
        usual = super().unanswered(task, sku, http_status, api_url)
        record = self._recording("record_unanswered", usual, task, sku, http_status=http_status, api_url=api_url)
        return self._rejecting(record, task, sku, http_status=http_status, api_url=api_url)

    def _recording(self, name: str, usual: Recording, task: Task, sku: str | None, **more: Any) -> Recording:
        if name not in self._statements:
            return usual

        def write(connection: Connection) -> str | None:
            given = {
                "job_id": task.job_id,
                "row_id": task.row_id,
                "sku": sku,
                "username": task.username,
                "campaign": task.campaign,
                "task_id": task.task_id,
                "now": str(self.local_now(connection)),
                **more,
            }
            changed = [connection.execute(each, _used(each, given)).rowcount for each in self._statements[name]]
            return f"{name} changed no row" if changed and not any(changed) else None

        return write

    def _ask(self, connection: Connection, name: str, given: Mapping[str, Any], usual: Sequence[Any]) -> Sequence[Any]:
        """The rows a look-up finds. Where they hold a job_id, only the very same text is the job."""
        if name not in self._statements:
            return usual
        (statement,) = self._statements[name]
        rows = connection.execute(statement, _used(statement, given)).mappings().all()
        return [row for row in rows if "job_id" not in row or str(row["job_id"]) == given["job_id"]]


def check_statements(engine: Engine, path: Path, statements: Statements) -> None:
    """Tries each on the database, for a job that is not there, and takes everything back. Look-ups are run, recordings only
    planned. Raises `Unavailable` naming file, statement and what is wrong."""
    for name, each in statements.items():
        for statement in each:
            with translated_errors(engine), engine.connect() as connection, _told(path, name):
                missing = _try(connection, name, statement)
                connection.rollback()
            if missing:
                raise _unusable(path, f"'{name}' returns no column {', '.join(missing)}")


def _try(connection: Connection, name: str, statement: TextClause) -> list[str]:
    """The columns that a look-up should return and does not."""
    given = _used(statement, _SAMPLE)
    columns = FORMS[name].columns
    if columns is None:
        connection.execute(text(f"EXPLAIN {statement.text}"), given)
        return []
    return sorted(columns - set(connection.execute(statement, given).keys()))


_SAMPLE: Mapping[str, Any] = {
    **dict.fromkeys(("sku", "username", "campaign", "task_id", "body", "result", "api_url"), "ncr-check"),
    "job_id": "0",
    "row_id": 0,
    "http_status": 200,
    "now": "2000-01-01 00:00:00",
}


@contextmanager
def _told(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        if getattr(error, "connection_invalidated", False):
            raise
        raise _unusable(path, f"'{name}' is refused by the database: {cause_of(error)}") from error


def _unusable(path: Path, reason: str) -> Unavailable:
    return Unavailable("catalogue_sql", f"CATALOGUE_SQL {path}: {reason}", NEXT_STEP, retry_after_seconds=60)


def _used(statement: TextClause, given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in statement.compile().params}


def _facts(engine: Engine, verdict: Verdict) -> dict[str, Any]:
    """The validator's answer; as it was sent, where there is nothing to hide or to shorten."""
    body = redactor_of(engine).redact(verdict.body)
    if body != verdict.body or len(body.encode("utf-8", "replace")) > SMALL_ANSWER_BYTES or clean(body) != body:
        body = json.dumps(bound_answer(engine, verdict.body, SMALL_ANSWER_BYTES))
    return {"http_status": verdict.http_status, "body": body, "result": redactor_of(engine).bound(verdict.result, CODE)}


def _nothing(_: Any) -> None:
    return None
