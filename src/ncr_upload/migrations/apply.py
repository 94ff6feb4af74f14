"""Bring the service's own tables to the newest revision. The studio's tables are never touched."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    return config


def newest_revision() -> str:
    """The revision this release needs."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


def current_revision(engine: Engine) -> str | None:
    """The revision the database is at; None before the first migration."""
    with engine.connect() as connection:
        return _current(connection)


def _current(connection: Connection) -> str | None:
    return MigrationContext.configure(connection, opts={"version_table": "ncr_alembic_version"}).get_current_revision()


def upgrade(engine: Engine) -> tuple[str | None, str]:
    """Migrate, one process at a time. Returns the revisions before and after."""
    head = newest_revision()
    before = current_revision(engine)
    if before == head:
        return before, head
    with engine.connect() as connection:
        _take_lock(connection)
        try:
            before = _current(connection)
            if before != head:
                config = _config()
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
            connection.commit()
        finally:
            _leave_lock(connection)
    return before, head


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
