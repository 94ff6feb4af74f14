"""The studio's tables as they really are in this database: how their columns are spelt, and whether job ids are numbers."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    LargeBinary,
    MetaData,
    Table,
    and_,
    cast,
    false,
    inspect,
    literal,
    text,
)
from sqlalchemy.engine.reflection import ObjectKind
from sqlalchemy.types import Integer, Numeric, String

from ncr_upload.adapters.sql.refusals import DECLARED_LENGTH

LARGEST_NUMBER = 2**63 - 1


def adapt_tables(connection: Connection, wanted: MetaData) -> dict[str, Table]:
    """The wanted tables by name, each column under the name it is wanted by and spelt as the database has it: PostgreSQL folds
    what was not quoted when the table was made. What is missing stays as wanted, so that using it says what is missing."""
    found = inspect(connection).get_multi_columns(kind=ObjectKind.ANY, filter_names=list(wanted.tables))
    described = {name: columns for (_, name), columns in found.items()}
    adapted = MetaData()
    return {name: _adapt(table, described.get(name, []), adapted) for name, table in wanted.tables.items()}


def _adapt(table: Table, described: Any, adapted: MetaData) -> Table:
    spelt = {str(column["name"]).lower(): column for column in described} | {str(c["name"]): c for c in described}
    columns = []
    for column in table.columns:
        real = spelt.get(column.name) or spelt.get(column.name.lower())
        is_number = column.name == "job_id" and real is not None and isinstance(real["type"], Integer | Numeric)
        name = str(real["name"]) if real is not None else column.name
        kind = BigInteger() if is_number else column.type
        info: dict[str, Any] = {}
        if real is not None:
            info = {"real_type": real["type"], DECLARED_LENGTH: getattr(real["type"], "length", None)}
        columns.append(Column(name, kind, key=column.name, primary_key=column.primary_key, info=info))
    return Table(table.name, adapted, *columns)


def find_lasting(connection: Connection) -> list[str]:
    """The tables of this database whose writes no rollback takes back, such as MySQL's on MyISAM."""
    if connection.dialect.name not in ("mysql", "mariadb"):
        return []
    query = (
        "SELECT t.table_name FROM information_schema.tables t JOIN information_schema.engines e ON e.engine = t.engine "
        "WHERE t.table_schema = DATABASE() AND t.table_type = 'BASE TABLE' AND e.transactions <> 'YES' ORDER BY 1"
    )
    return [str(name) for name in connection.execute(text(query)).scalars()]


def is_job(connection: Connection, column: Column[Any], job_id: str) -> ColumnElement[bool]:
    """Whether the column holds this very job id. Databases are laxer: MySQL takes '12x' for 12 where the column is a number,
    and 'abc' for 'ABC' in most collations. Job ids are ASCII, so their bytes are the same in every character set."""
    if isinstance(column.type, Integer):
        return column == int(job_id) if _is_number(job_id) else false()
    if connection.dialect.name in ("mysql", "mariadb"):
        return and_(column == job_id, cast(column, LargeBinary) == cast(literal(job_id, String()), LargeBinary))
    return column == job_id


def job_value(column: Column[Any], job_id: str) -> str | int:
    """The job id as the column holds it."""
    return int(job_id) if isinstance(column.type, Integer) and _is_number(job_id) else job_id


def _is_number(job_id: str) -> bool:
    return job_id.isascii() and job_id.isdecimal() and str(int(job_id)) == job_id and int(job_id) <= LARGEST_NUMBER
