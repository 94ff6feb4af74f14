"""Rows of the studio's tables for tests, and a database that has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import Engine, insert, select
from sqlalchemy.sql.schema import Table

from ncr_upload.adapters.sql import catalogue
from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.entrypoints.embedded.studio import create_tables
from ncr_upload.migrations.apply import upgrade


def open_database(place: Path | str) -> Engine:
    """A fresh database, at this URL or in this SQLite file, with the service's tables and the studio's."""
    engine = open_engine(place if isinstance(place, str) else f"sqlite:///{place}", pool_size=12)
    upgrade(engine)
    create_tables(engine)
    return engine


def put(engine: Engine, table: Table, **values: Any) -> None:
    with engine.begin() as connection:
        connection.execute(insert(table).values(**values))


def put_job(
    engine: Engine, job_id: str, *, sku: str | None = "SKU1", awaiting: int = 1, status: str = "Active", **more: Any
) -> None:
    """A row of job_details."""
    put(engine, catalogue.job_details, job_id=job_id, sku_id=sku, status=status, is_uploaded=awaiting, **more)


def rows(engine: Engine, table: Table) -> list[dict[str, Any]]:
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(select(table).order_by(*table.primary_key)).mappings()]
