"""Connections: made once per process (never carried over a fork), bounded in number and in waiting time."""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import DisconnectionError, SQLAlchemyError

from ncr_upload.adapters.sql.failures import NEXT_STEPS, Failure, cause_of, find_failure
from ncr_upload.adapters.sql.session import bound_statements, mysql_settings, note_encoding, set_postgresql_session
from ncr_upload.domain.errors import Rejected, Unavailable
from ncr_upload.domain.redaction import NO_SECRETS, Redactor

P = ParamSpec("P")
T = TypeVar("T")
TlsMode = Literal["disable", "prefer", "require", "verify-ca", "verify-full"]

WAIT_SECONDS = 2.5
"""For a connection, a lock or the pool, unless told otherwise: the API must say so within its 3 seconds."""

CONTENDED_TRIES = 5
CONTENDED_SECONDS = 0.05
"""After the nth deadlock, up to n times this long is waited."""

STATEMENT_SECONDS = 10.0
"""For one statement's answer."""

CONNECT_SECONDS = 8.0
"""For a connection at most, however patient its user is with locks."""

RESTED_SECONDS = 0.1
"""A connection used again sooner is taken to be alive: no server starts again within that."""

READ_ONLY = {"ncr_read_only": True}
AT_ONCE = {"ncr_at_once": True}
"""Each statement is a transaction by itself. On PostgreSQL only."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Encryption of the connection, by libpq's words. `mode` None leaves it to the driver and the URL. The files are PEM."""

    mode: TlsMode | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


def open_engine(
    url: str,
    *,
    pool_size: int = 5,
    wait_seconds: float = WAIT_SECONDS,
    statement_seconds: float = STATEMENT_SECONDS,
    tls: Tls = Tls(),
    redactor: Redactor = NO_SECRETS,
    zone: str = "UTC",
) -> Engine:
    """An engine for the URL. Nothing is connected yet. It opens no more than `pool_size` connections. What is written by it,
    and what its errors say, goes through the `redactor` (see `redactor_of`).

    `zone` is the studio's: PostgreSQL reads and writes columns `timestamp with time zone` by it.
    """
    parsed = make_url(url)
    options: dict[str, Any] = {
        "pool_size": pool_size,
        "max_overflow": 0,
        "pool_timeout": wait_seconds,
        "hide_parameters": True,
        "execution_options": {"ncr_redactor": redactor},
    }
    connect_seconds = int(min(wait_seconds, CONNECT_SECONDS) + 0.5)
    match parsed.get_backend_name():
        case "sqlite":
            _make_folder(parsed)
            engine = create_engine(parsed, connect_args={"timeout": wait_seconds, "check_same_thread": False}, **options)
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return engine  # a file: nobody cuts the connection
        case "postgresql":
            connect_args = {"connect_timeout": connect_seconds, "client_encoding": "utf8", **_postgresql_tls(tls)}
            engine = create_engine(parsed, pool_recycle=1800, connect_args=connect_args, **options)
            event.listen(engine, "connect", set_postgresql_session(wait_seconds, statement_seconds, zone))
            event.listen(engine, "connect", note_encoding(engine.dialect))
            event.listen(engine, "set_connection_execution_options", _go_without_transaction)
            event.listen(engine, "checkin", _write_in_transactions)
        case "mysql" | "mariadb":
            connect_args = {
                "connect_timeout": connect_seconds,
                "read_timeout": statement_seconds,
                "write_timeout": statement_seconds,
                "charset": "utf8mb4",
                "init_command": mysql_settings(wait_seconds, statement_seconds),
                **_mysql_tls(tls),
            }
            engine = create_engine(
                parsed, pool_recycle=1800, isolation_level="READ COMMITTED", connect_args=connect_args, **options
            )
            event.listen(engine, "connect", bound_statements())
        case other:
            raise Rejected(
                "database_unknown",
                f"DATABASE_URL names the database '{other}'",
                "Use sqlite, mysql+pymysql or postgresql+psycopg.",
            )
    _ping_rested(engine)
    return engine


def _go_without_transaction(connection: Connection, options: dict[str, Any]) -> None:
    """BEGIN and COMMIT around one statement are two round trips more, and each query sees its own moment anyway. Told to the
    driver itself: SQLAlchemy's AUTOCOMMIT would leave every later BEGIN with an isolation level to be read."""
    if options.keys() & {*READ_ONLY, *AT_ONCE}:
        connection.connection.dbapi_connection.autocommit = True  # type: ignore[union-attr]


def _write_in_transactions(connection: Any, _record: Any) -> None:
    if connection is not None and not connection.closed:
        connection.autocommit = False


def _ping_rested(engine: Engine) -> None:
    """Try a connection that has rested before it is used, as `pool_pre_ping` does each time: a round trip to the server."""

    def note(_connection: Any, record: Any) -> None:
        record.info["used_at"] = time.monotonic()

    def ping(connection: Any, record: Any, _proxy: Any) -> None:
        if time.monotonic() - record.info.get("used_at", 0.0) < RESTED_SECONDS:
            return
        try:
            alive = engine.dialect.do_ping(connection)
        except engine.dialect.dbapi.Error as error:  # type: ignore[union-attr]
            raise DisconnectionError from error
        if not alive:
            raise DisconnectionError

    event.listen(engine, "connect", note)
    event.listen(engine, "checkin", note)
    event.listen(engine, "checkout", ping)


def _postgresql_tls(tls: Tls) -> dict[str, str]:
    given = {"sslmode": tls.mode, "sslrootcert": tls.ca, "sslcert": tls.cert, "sslkey": tls.key}
    return {name: str(value) for name, value in given.items() if value is not None}


def _mysql_tls(tls: Tls) -> dict[str, Any]:
    """A context makes the driver insist on TLS; without one it takes what the server offers."""
    if tls.mode is None and tls.ca is None and tls.cert is None:
        return {}
    if tls.mode == "disable":
        return {"ssl_disabled": True}
    if tls.mode == "prefer":
        return {}
    context = ssl.create_default_context(cafile=tls.ca)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # Python 3.13 sets it; the certificates that MySQL makes itself fail it
    context.check_hostname = tls.mode == "verify-full"
    context.verify_mode = ssl.CERT_REQUIRED if tls.mode in ("verify-ca", "verify-full") else ssl.CERT_NONE
    if tls.cert is not None:
        context.load_cert_chain(tls.cert, tls.key)
    return {"ssl": context}


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
    """The database in words, without its password and its options."""
    url = engine.url
    if url.get_backend_name() == "sqlite":
        return url.set(query={}).render_as_string(hide_password=True)
    if "@" in f"{url.host}{url.database}":  # the end of a password in which an '@' is not written %40
        port = f":{url.port}" if url.port else ""
        return f"{url.drivername}://" + f"{url.host}{port}/{url.database or ''}".rpartition("@")[2]
    return url.set(query={}).render_as_string(hide_password=True)


def redactor_of(source: Engine | Connection) -> Redactor:
    """The redactor that the engine was opened with."""
    redactor: Redactor = source.get_execution_options().get("ncr_redactor", NO_SECRETS)
    return redactor


def describe_server(connection: Connection) -> str:
    """Product and version."""
    dialect = connection.dialect
    name = "MariaDB" if getattr(dialect, "is_mariadb", False) else dialect.name.replace("postgresql", "PostgreSQL")
    version = dialect.server_version_info or ()
    return f"{name} {'.'.join(str(part) for part in version if isinstance(part, int))}".strip()


@contextmanager
def translated_errors(engine: Engine) -> Iterator[None]:
    """Raises `Unavailable` for what the database fails to do, `Rejected` for text of others that cannot be read. What is a bug
    (broken SQL, say) passes through."""
    try:
        yield
    except SQLAlchemyError as error:
        failure = find_failure(error)
        if failure is None:
            raise
        message = redactor_of(engine).redact(f"the database {place_of(engine)} {_did(failure)}: {_words(engine, error)}")
        if failure is Failure.TEXT:
            raise Rejected(failure.value, message, NEXT_STEPS[failure]) from error
        kind = Contended if failure is Failure.CONTENDED else Unavailable
        seconds = _RETRY_AFTER_SECONDS.get(failure, 5)
        raise kind(failure.value, message, NEXT_STEPS[failure], retry_after_seconds=seconds) from error


class Contended(Unavailable):
    """A deadlock or a lost race undid the transaction."""


def whole_transaction(method: Callable[P, T]) -> Callable[P, T]:
    """For a method that is one transaction, or several that may be repeated: after a deadlock or a serialization failure it
    is run again from its beginning, `CONTENDED_TRIES` times in all, then raises `Unavailable`. A wait for a lock that took
    too long is not repeated here: its caller has waited long enough."""

    @wraps(method)
    def until_done(*args: P.args, **kwargs: P.kwargs) -> T:
        for tries in range(1, CONTENDED_TRIES):
            try:
                return method(*args, **kwargs)
            except Contended:
                time.sleep(random.uniform(0, CONTENDED_SECONDS * tries))
        return method(*args, **kwargs)

    return until_done


_RETRY_AFTER_SECONDS = {Failure.SCHEMA: 60, Failure.FULL: 30, Failure.CONTENDED: 1}
_DID = {
    Failure.SCHEMA: "lacks a table or column",
    Failure.LOGIN: "refused the login",
    Failure.TLS: "and this client found no common TLS",
    Failure.FULL: "has no room left",
    Failure.READ_ONLY: "cannot be written",
    Failure.CONNECTIONS: "allows no more connections",
    Failure.PACKET: "takes no statement of that length",
    Failure.SETTING: "has a setting under which it refuses this",
    Failure.TEXT: "holds text that is not UTF-8",
    Failure.ROW: "refused a row",
}


def _did(failure: Failure) -> str:
    return _DID.get(failure, "did not do as asked")


def _words(engine: Engine, error: SQLAlchemyError) -> str:
    cause = cause_of(error)
    if "unable to open database file" in cause:
        folder = Path(engine.url.database or "").absolute().parent
        return f"{cause} (its folder {folder} must exist, and this user must be allowed to write there)"
    return cause
