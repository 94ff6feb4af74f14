"""Rows that the studio's tables never take: rejected before anything is published, naming table, column and value."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Table
from sqlalchemy.exc import DBAPIError

from ncr_upload.adapters.sql.failures import Failure, cause_of, find_failure
from ncr_upload.application.ports import Recording
from ncr_upload.domain.errors import Rejected

SHOWN_CHARACTERS = 60
DECLARED_LENGTH = "declared_length"
"""Key of `Column.info`: how many characters the studio's column takes."""

_STATEMENT = re.compile(r"^\s*(?:INSERT\s+(?:IGNORE\s+)?INTO|REPLACE\s+INTO|UPDATE|DELETE\s+FROM)\s+([^\s(]+)", re.IGNORECASE)
_MYSQL_COLUMN = re.compile(r"(?:column|field) [`'](?:[^`']+`\.`(?P<table>[^`']+)`\.`)?(?P<column>[^`']+)[`']", re.IGNORECASE)
_SQLITE_COLUMN = re.compile(r"(?:NOT NULL|UNIQUE) constraint failed: (?P<table>\w+)\.(?P<column>\w+)")
_BYTES = re.compile(r"0x[0-9a-f]{2}(?: 0x[0-9a-f]{2})*|(?:\\+x[0-9A-F]{2})+")
"""A character, as PostgreSQL and as MySQL write the one that they cannot keep."""

_LENGTH = re.compile(r"character(?: varying)?\((\d+)\)")


@contextmanager
def rejected_rows(values: Mapping[str, Any], find_tables: Callable[[], Mapping[str, Table]]) -> Iterator[None]:
    """Raise `Rejected` ('database_row_refused') for a row that is refused each time; any other error passes.

    `values` are what is written, by the name of its column or parameter. `find_tables` gives the studio's as they are.
    """
    try:
        yield
    except DBAPIError as error:
        if find_failure(error) is not Failure.ROW:
            raise
        raise _rejection(error, values, find_tables()) from error


def rejecting(record: Recording, values: Mapping[str, Any], find_tables: Callable[[], Mapping[str, Table]]) -> Recording:
    """Return the recording under `rejected_rows`. For rows that are written while nothing is published."""

    def write(connection: Connection) -> str | None:
        with rejected_rows(values, find_tables):
            return record(connection)

    return write


def _rejection(error: DBAPIError, values: Mapping[str, Any], tables: Mapping[str, Table]) -> Rejected:
    place, column = _find_place(error)
    table = tables.get(place or "")
    name = column if column in values else _find_value(str(error.orig), values, table)
    message = f"the studio's table {place or '(unknown)'} does not take this job's row"
    if column is not None or (table is not None and name is not None):
        message += f", because of its column {column or name}"
    elif name is not None:
        message += f", because of :{name}"
    if name is not None and values[name] is not None:
        message += f" and the value {_shown(values[name])}"
        step = "Submit the job again with a value that the column takes, or have the studio change the column"
    else:
        step = "Have the studio change what the table demands, then submit the job again"
    return Rejected(Failure.ROW.value, f"{message}: {cause_of(error)}", f"{step} (docs/database.md). Nothing was published.")


def _find_place(error: DBAPIError) -> tuple[str | None, str | None]:
    """Return table and column as far as the database names them; the table else from the statement."""
    statement = _STATEMENT.match(error.statement or "")
    table = statement[1].rpartition(".")[2].strip('`"[]') if statement else None
    facts = getattr(error.orig, "diag", None)
    if facts is not None:
        return facts.table_name or table, facts.column_name
    words = str(error.orig)
    named = _SQLITE_COLUMN.search(words) or _MYSQL_COLUMN.search(words)
    if named is None:
        return table, None
    return named["table"] or table, named["column"]


def _find_value(words: str, values: Mapping[str, Any], table: Table | None) -> str | None:
    """Return the column, or the parameter of an own statement, whose value fits the error: the database may not name it."""
    texts = {name: value for name, value in values.items() if isinstance(value, str) and _may_hold(table, name)}
    if found := _BYTES.search(words):
        lacking = bytes.fromhex(re.sub(r"\\+x|0x| ", "", found[0])).decode("utf-8", "replace")
        return next((name for name, value in texts.items() if lacking in value), None)
    if found := _LENGTH.search(words):
        limit = int(found[1])
        long = [name for name, value in texts.items() if len(value) > limit]
        return next((name for name in long if table is None or _declared(table, name) in (None, limit)), None)
    return next((name for name, value in texts.items() if value and f'"{value}"' in words), None)


def _may_hold(table: Table | None, name: str) -> bool:
    return table is None or name in table.c


def _declared(table: Table, name: str) -> int | None:
    length: int | None = table.c[name].info.get(DECLARED_LENGTH)
    return length


def _shown(value: Any) -> str:
    """Bounded, with an escape for what is not ASCII: which character it is would else be a guess."""
    text = str(value)
    return ascii(text[:SHOWN_CHARACTERS]) + ("…" if len(text) > SHOWN_CHARACTERS else "")
