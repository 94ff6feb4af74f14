"""Bring the service's own tables to the newest revision. The studio's tables are never touched."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

VERSION_TABLE = "ncr_alembic_version"


def newest_revision() -> str:
    """The revision this release needs: that of the last file in `versions/`, which are numbered in order."""
    return max(path.name.split("_")[0] for path in (Path(__file__).parent / "versions").glob("[0-9]*_*.py"))


def current_revision(engine: Engine) -> str | None:
    """The revision the database is at; None before the first migration."""
    with engine.connect() as connection:
        return _read_revision(connection)


def _read_revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    found: str | None = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608 - a constant
    return found


def upgrade(engine: Engine) -> tuple[str | None, str]:
    """Migrate, one process at a time. Returns the revisions before and after."""
    head = newest_revision()
    before = current_revision(engine)
    if before == head:
        return before, head
    with engine.connect() as connection:
        _take_lock(connection)
        try:
            before = _read_revision(connection)
            if before != head:
                _migrate(connection, head)
            connection.commit()
        finally:
            _leave_lock(connection)
    return before, head


def _migrate(connection: Connection, to: str) -> None:
    # Alembic is slow to load, and every start but the first finds nothing to do.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, to)


def _take_lock(connection: Connection) -> None:
    """SQLite needs none: every transaction here begins IMMEDIATE."""
    match connection.dialect.name:
        case "postgresql":
            connection.execute(text("SELECT pg_advisory_lock(7227001)"))
        case "mysql" | "mariadb":
            connection.execute(text("SELECT GET_LOCK('ncr_migrate', 60)"))


def _leave_lock(connection: Connection) -> None:
    match connection.dialect.name:
        case "postgresql":
            connection.execute(text("SELECT pg_advisory_unlock(7227001)"))
        case "mysql" | "mariadb":
            connection.execute(text("SELECT RELEASE_LOCK('ncr_migrate')"))
    connection.commit()
