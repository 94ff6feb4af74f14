"""Whether the database has the tables and columns this release needs: its own, and the studio's."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import Engine, MetaData, inspect
from sqlalchemy.engine.reflection import ObjectKind

from ncr_upload.adapters.sql.catalogue import studio
from ncr_upload.adapters.sql.engine import READ_ONLY, place_of, translated_errors
from ncr_upload.adapters.sql.tables import metadata
from ncr_upload.domain.errors import Unavailable

SCHEMA_CODE = "database_schema"


def check_own_tables(engine: Engine) -> None:
    """Raises `Unavailable` ('database_schema') naming every missing table and column of the service's own."""
    if missing := find_missing(engine, metadata):
        raise Unavailable(
            SCHEMA_CODE,
            f"the database {place_of(engine)} lacks {', '.join(missing)}",
            "Run `ncr db upgrade` with this release.",
            retry_after_seconds=60,
        )


def check_studio_tables(engine: Engine, names: Collection[str] | None = None) -> None:
    """Raises `Unavailable` ('database_schema') naming every missing table and column of the studio's; of these tables only."""
    found = find_missing(engine, studio)
    if missing := [each for each in found if names is None or each.partition(".")[0] in names]:
        raise Unavailable(
            SCHEMA_CODE,
            f"the studio's database {place_of(engine)} lacks {', '.join(missing)}",
            "See that DATABASE_URL (or DB_*) names the studio's database; the service never alters these tables itself.",
            retry_after_seconds=60,
        )


def find_missing(engine: Engine, wanted: MetaData) -> Sequence[str]:
    """What is not there: 'table', or 'table.column' of a table that is. Views count as tables, case does not count."""
    with translated_errors(engine), engine.connect().execution_options(**READ_ONLY) as connection:
        inspector = inspect(connection)
        found = inspector.get_multi_columns(kind=ObjectKind.ANY, filter_names=list(wanted.tables))
    columns = {name: {str(column["name"]).lower() for column in described} for (_, name), described in found.items()}
    missing: list[str] = []
    for table in wanted.sorted_tables:
        if not columns.get(table.name):
            missing.append(table.name)
            continue
        missing += [f"{table.name}.{c.name}" for c in table.columns if c.name.lower() not in columns[table.name]]
    return sorted(missing)
