"""Bring the service's own tables to the newest revision. The studio's tables are never touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import DBAPIError

from ncr_upload.domain.errors import Unavailable

VERSION_TABLE = "ncr_alembic_version"
REVISIONS = Path(__file__).parent / "versions"
LOCK_SECONDS = 60


def newest_revision() -> str:
    """The revision this release needs: that of the last file in `versions/`, which are numbered in order."""
    return max(path.name.split("_")[0] for path in REVISIONS.glob("[0-9]*_*.py"))


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
    """Migrate up, one process at a time. Returns the revisions before and after. A database that is at a newer revision than
    this release knows is left as it is: the release before runs beside the next one."""
    head = newest_revision()
    before = current_revision(engine)
    if before is not None and before >= head:
        return before, before
    with engine.connect() as connection, _locked(connection):
        before = _read_revision(connection)
        if before is None or before < head:
            _migrate(connection, "upgrade", head)
        connection.commit()
    return before, head


def downgrade(engine: Engine, to: str) -> tuple[str | None, str | None]:
    """Migrate down to a revision ('base': none), one process at a time. Returns the revisions before and after. What only
    the newer revisions keep is lost. Raises `LookupError` for a revision this release does not know."""
    if to != "base" and not any(REVISIONS.glob(f"{to}_*.py")):
        raise LookupError(to)
    with engine.connect() as connection, _locked(connection):
        before = _read_revision(connection)
        if before is not None and (to == "base" or to < before):
            _migrate(connection, "downgrade", to)
        connection.commit()
        return before, _read_revision(connection)


def _migrate(connection: Connection, direction: Literal["upgrade", "downgrade"], to: str) -> None:
    # Alembic is slow to load, and every start but the first finds nothing to do.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    {"upgrade": command.upgrade, "downgrade": command.downgrade}[direction](config, to)


@contextmanager
def _locked(connection: Connection) -> Iterator[None]:
    """SQLite needs no lock: every transaction here begins IMMEDIATE. A session that ends gives its lock back."""
    _take_lock(connection)
    try:
        yield
    finally:
        with suppress(DBAPIError):
            connection.rollback()
            _leave_lock(connection)


def _take_lock(connection: Connection) -> None:
    match connection.dialect.name:
        case "postgresql":
            connection.execute(text("SELECT pg_advisory_lock(7227001)"))
        case "mysql" | "mariadb":
            if connection.execute(text(f"SELECT GET_LOCK('ncr_migrate', {LOCK_SECONDS})")).scalar() != 1:
                raise Unavailable(
                    "migration_locked",
                    f"another process has been migrating for over {LOCK_SECONDS} s",
                    "See what holds the lock ncr_migrate (SELECT IS_USED_LOCK('ncr_migrate')), or wait for it to end.",
                )


def _leave_lock(connection: Connection) -> None:
    match connection.dialect.name:
        case "postgresql":
            connection.execute(text("SELECT pg_advisory_unlock(7227001)"))
        case "mysql" | "mariadb":
            connection.execute(text("SELECT RELEASE_LOCK('ncr_migrate')"))
    connection.commit()
