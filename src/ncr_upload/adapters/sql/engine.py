"""Connections: made once per process (never carried over a fork), bounded in number and in waiting time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, ProgrammingError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from ncr_upload.domain.errors import Rejected, Unavailable

WAIT_SECONDS = 2.5
"""For a connection, a lock or the pool, unless told otherwise: the API must say so within its 3 seconds."""

MISSING = re.compile(r"no such (table|column)|has no column|does not exist|doesn't exist|Unknown column", re.IGNORECASE)
"""How the three databases say that a table or a column is not there."""

STATEMENT_SECONDS = 10.0
"""For one statement's answer."""

CONNECT_SECONDS = 8.0
"""For a connection at most, however patient its user is with locks."""

READ_ONLY = {"ncr_read_only": True}


def open_engine(
    url: str, *, pool_size: int = 5, wait_seconds: float = WAIT_SECONDS, statement_seconds: float = STATEMENT_SECONDS
) -> Engine:
    """An engine for the URL. Nothing is connected yet. It opens no more than `pool_size` connections."""
    parsed = make_url(url)
    options: dict[str, Any] = {
        "pool_pre_ping": True,
        "pool_size": pool_size,
        "max_overflow": 0,
        "pool_timeout": wait_seconds,
        "hide_parameters": True,
    }
    connect_seconds = int(min(wait_seconds, CONNECT_SECONDS) + 0.5)
    match parsed.get_backend_name():
        case "sqlite":
            _make_folder(parsed)
            engine = create_engine(parsed, connect_args={"timeout": wait_seconds, "check_same_thread": False}, **options)
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return engine
        case "postgresql":
            timeouts = f"-c lock_timeout={int(wait_seconds * 1000)} -c statement_timeout={int(statement_seconds * 1000)}"
            return create_engine(
                parsed,
                pool_recycle=1800,
                connect_args={"connect_timeout": connect_seconds, "options": timeouts},
                **options,
            )
        case "mysql" | "mariadb":
            connect_args = {
                "connect_timeout": connect_seconds,
                "read_timeout": statement_seconds,
                "write_timeout": statement_seconds,
                "charset": "utf8mb4",
                "init_command": f"SET SESSION innodb_lock_wait_timeout={int(wait_seconds)}, time_zone='+00:00'",
            }
            return create_engine(
                parsed, pool_recycle=1800, isolation_level="READ COMMITTED", connect_args=connect_args, **options
            )
        case other:
            raise Rejected(
                "database_unknown",
                f"DATABASE_URL names the database '{other}'",
                "Use sqlite, mysql+pymysql or postgresql+psycopg.",
            )


def _make_folder(url: URL) -> None:
    if url.database and url.database != ":memory:":
        with suppress(OSError):  # connecting says so
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own BEGIN comes too late (at the first write), so a read followed by a write could deadlock.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    read_only = connection.get_execution_options().get("ncr_read_only")
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def place_of(engine: Engine) -> str:
    """The database in words, without its password."""
    return engine.url.render_as_string(hide_password=True)


def describe_server(connection: Connection) -> str:
    """Product and version."""
    dialect = connection.dialect
    name = "MariaDB" if getattr(dialect, "is_mariadb", False) else dialect.name.replace("postgresql", "PostgreSQL")
    version = dialect.server_version_info or ()
    return f"{name} {'.'.join(str(part) for part in version if isinstance(part, int))}".strip()


@contextmanager
def translated_errors(engine: Engine) -> Iterator[None]:
    """The one table from the database's errors to ours. What is a bug (a wrong column, say) passes through."""
    try:
        yield
    except (OperationalError, InterfaceError, ProgrammingError, PoolTimeoutError) as error:
        if MISSING.search(_cause(error)):
            raise _schema_differs(engine, error) from error
        if isinstance(error, ProgrammingError):
            raise
        raise _unavailable(engine, error) from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise _unavailable(engine, error) from error
        raise


def _unavailable(engine: Engine, error: SQLAlchemyError) -> Unavailable:
    return Unavailable(
        "database_unavailable",
        f"the database {place_of(engine)} did not do as asked: {_cause(error)}",
        "Check that it runs, is reachable, has room, and that DB_USER may read and write; the service tries again by itself.",
        retry_after_seconds=5,
    )


def _schema_differs(engine: Engine, error: SQLAlchemyError) -> Unavailable:
    return Unavailable(
        "database_schema",
        f"the database {place_of(engine)} lacks a table or column: {_cause(error)}",
        "If its name begins with ncr_, run `ncr db upgrade` with this release; else it is the studio's: see that DATABASE_URL "
        "names the studio's database.",
        retry_after_seconds=60,
    )


def _cause(error: SQLAlchemyError) -> str:
    cause = getattr(error, "orig", None)
    lines = str(cause if cause is not None else error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
