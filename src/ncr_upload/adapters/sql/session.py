"""The settings of a database session: set at connect, because a server, a role or a database may have others by default."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Dialect, Text, text
from sqlalchemy.types import TypeDecorator

UNICODE_ENCODINGS = ("UTF8", "SQL_ASCII")
"""PostgreSQL's encodings that hold every character; SQL_ASCII holds the bytes of UTF-8 unlooked-at."""

SQL_MODE = "STRICT_ALL_TABLES,STRICT_TRANS_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION"
"""Without a strict mode, MySQL cuts values that are too long and writes '?' for characters that a column lacks."""

IDLE_SECONDS = 60
"""The server may end an idle transaction after so long: that of a worker that stands still. Also the least `wait_timeout`."""

INVALID_SETTING = "22023"
HUNG_UP = (2006, 2013, 1153)
"""How the driver tells that the server closed the connection; with 1153 it does so next."""

SMALL_PACKET_BYTES = 1024 * 1024
LARGEST_STATEMENT_BYTES = 1_000_000
PACKET_MARGIN_BYTES = 1024


_codecs: WeakKeyDictionary[Dialect, str] = WeakKeyDictionary()
"""Python's name of the encoding of each engine's database, where that is not Unicode."""


class FreeText(TypeDecorator[str]):
    """Text for people, such as a line of the history. A character that the database's encoding lacks is written as an escape:
    an error from outside must not keep the service from writing down that it happened."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Return the text as the database can hold it."""
        codec = _codecs.get(dialect)
        return value if codec is None or value is None else value.encode(codec, "backslashreplace").decode(codec)


def note_encoding(dialect: Dialect) -> Callable[[Any, Any], None]:
    """Return a listener for `connect` that remembers the encoding of a PostgreSQL database for `FreeText`."""

    def note(connection: Any, _record: Any) -> None:
        encoding = connection.info.parameter_status("server_encoding") or UNICODE_ENCODINGS[0]
        if encoding not in UNICODE_ENCODINGS:
            _codecs[dialect] = _codec_of(encoding)

    return note


def _codec_of(encoding: str) -> str:
    name = _LATIN.get(encoding) or encoding.replace("WIN", "cp").replace("ISO_8859_", "iso8859_")
    try:
        return codecs.lookup(name).name
    except LookupError:
        return "ascii"


_LATIN = {f"LATIN{number}": f"latin{number}" for number in range(1, 11)} | {"KOI8R": "koi8_r", "KOI8U": "koi8_u"}


def mysql_settings(wait_seconds: float, statement_seconds: float) -> str:
    """Return one SET statement for MySQL and MariaDB. `/*M! */` is read by MariaDB only, `/*!50708 */` by MySQL only.

    The server's limit on a statement ends what the client, whose own limit comes a second earlier, no longer waits for.
    """
    limit = statement_seconds + 1
    return (
        f"SET SESSION sql_mode='{SQL_MODE}', time_zone='+00:00', lc_messages='en_US'"
        f", innodb_lock_wait_timeout={max(1, int(wait_seconds))}, lock_wait_timeout={max(1, int(wait_seconds))}"
        f", wait_timeout=CAST(GREATEST(@@SESSION.wait_timeout, {IDLE_SECONDS}) AS SIGNED)"
        ", sql_select_limit=18446744073709551615, sql_safe_updates=0, sql_big_selects=1, completion_type=0"
        f"/*M! , max_statement_time={limit:g} *//*!50708 , max_execution_time={int(limit * 1000)} */"
    )


def set_postgresql_session(wait_seconds: float, statement_seconds: float, zone: str) -> Callable[[Any, Any], None]:
    """Return a listener for `connect` that sets PostgreSQL's session by one statement.

    The startup packet's `options` would save the round trip. Poolers refuse or drop them, and those of the URL would be lost.
    """
    settings = {
        "DateStyle": "ISO",
        "IntervalStyle": "postgres",
        "TimeZone": zone,
        "standard_conforming_strings": "on",
        "bytea_output": "hex",
        "extra_float_digits": "3",
        "default_transaction_isolation": "read committed",
        "default_transaction_deferrable": "off",
        "lock_timeout": f"{int(wait_seconds * 1000)}ms",
        "statement_timeout": f"{int(statement_seconds * 1000)}ms",
        "idle_in_transaction_session_timeout": f"{int(max(IDLE_SECONDS, statement_seconds) * 1000)}ms",
    }
    newer = {170000: {"transaction_timeout": "0"}}

    def apply(connection: Any, _record: Any) -> None:
        wanted = dict(settings)
        for version, more in newer.items():
            wanted |= more if connection.info.server_version >= version else {}
        connection.autocommit = True  # a transaction would take it back, or need two round trips more
        try:
            set_all(connection, wanted)
        except Exception as error:
            if getattr(error, "sqlstate", None) != INVALID_SETTING:
                raise
            set_all(connection, wanted | {"TimeZone": "UTC"})  # the server's list of zones lacks this one
        finally:
            connection.autocommit = False

    def set_all(connection: Any, wanted: dict[str, str]) -> None:
        calls = ", ".join(["set_config(%s, %s, false)"] * len(wanted))
        connection.execute(f"SELECT {calls}", [part for setting in wanted.items() for part in setting])

    return apply


def bound_statements() -> Callable[[Any, Any], None]:
    """Return a listener for `connect` that keeps MySQL's many-row INSERTs within what the server takes.

    The first connection asks for `max_allowed_packet`, which no session may change.
    """
    cursors: list[type] = []

    def apply(connection: Any, _record: Any) -> None:
        if not cursors:
            with connection.cursor() as cursor:
                cursor.execute("SELECT @@max_allowed_packet")
                cursors.append(_make_cursor(int(cursor.fetchone()[0])))
        connection.cursorclass = cursors[0]

    return apply


def _make_cursor(packet_bytes: int) -> type:
    from pymysql.cursors import Cursor  # noqa: PLC0415 - only where there is MySQL
    from pymysql.err import OperationalError  # noqa: PLC0415

    class BoundedCursor(Cursor):
        max_stmt_length = min(LARGEST_STATEMENT_BYTES, packet_bytes - PACKET_MARGIN_BYTES)

        def execute(self, query: str | bytearray, args: Any = None) -> int:
            """Run the statement. The server hangs up on one that is too long, which would look like an outage."""
            try:
                return super().execute(query, args)  # type: ignore[arg-type]
            except OperationalError as error:
                if error.args[0] not in HUNG_UP:
                    raise
                sent = query if isinstance(query, bytearray) else self.mogrify(query, args).encode(errors="replace")
                size = len(sent)  # `executemany` hands over bytes that are complete
                if size < packet_bytes:
                    raise
                told = f"a statement of {size} bytes does not fit into the server's max_allowed_packet of {packet_bytes} bytes"
                raise OperationalError(HUNG_UP[0], told) from error

    return BoundedCursor


Doubtful = tuple[str, str]
"""What may harm, and the next step."""


def find_session_doubts(connection: Connection, studio_columns: Collection[str], zone: str) -> Iterator[Doubtful]:
    """Yield what the server's settings do to the service that no session can change.

    `studio_columns` are those of the studio's that callers' words are written into, as 'table.column'.
    """
    if connection.dialect.name == "postgresql":
        yield from _postgresql_doubts(connection, zone)
    elif connection.dialect.name in ("mysql", "mariadb"):
        yield from _mysql_doubts(connection, studio_columns)


def _postgresql_doubts(connection: Connection, zone: str) -> Iterator[Doubtful]:
    names = ("server_encoding", "synchronous_commit", "transaction_read_only", "TimeZone")
    asked = f"SELECT {', '.join(f'current_setting({name!r})' for name in names)}, pg_backend_pid()"
    encoding, commits, read_only, server_zone, process = connection.execute(text(asked)).one()
    if read_only == "on":
        yield (
            "transactions are read-only by default: the service can write nothing",
            "Name the primary server, or ALTER ROLE … RESET default_transaction_read_only (or the database's).",
        )
    if server_zone != zone:
        yield (
            f"the server knows no time zone '{zone}': it takes times in columns with a time zone for {server_zone}",
            "Install the server's time zones (tzdata-legacy on Debian), or name TIMEZONE as Area/City.",
        )
    if encoding == "SQL_ASCII":
        yield (
            "the database is in SQL_ASCII: it takes any bytes, and what other programs wrote there may not be UTF-8",
            "Have every program write UTF-8 there, or move to a database made with ENCODING 'UTF8'.",
        )
    elif encoding not in UNICODE_ENCODINGS:
        yield (
            f"the database is in {encoding}: the history shows characters it lacks as escapes, and names with them are refused",
            "Move to a database made with ENCODING 'UTF8' if callers have such names.",
        )
    if commits == "off":
        yield (
            "synchronous_commit is off: a crash of the database loses the jobs it accepted in its last moments",
            f"ALTER ROLE … SET synchronous_commit = on for the service's role {connection.engine.url.username!r}.",
        )
    info = getattr(connection.connection.dbapi_connection, "info", None)
    if info is not None and info.backend_pid != process:
        yield (
            "a connection pooler stands before the database",
            "Let it pool sessions (PgBouncer: pool_mode = session), to which settings, locks and prepared statements belong.",
        )


def _mysql_doubts(connection: Connection, studio_columns: Collection[str]) -> Iterator[Doubtful]:
    asked = "SELECT @@max_allowed_packet, @@innodb_flush_log_at_trx_commit, @@log_bin, @@binlog_format"
    packet, flush, logged, logging = connection.execute(text(asked)).one()
    if packet < SMALL_PACKET_BYTES:
        yield (
            f"max_allowed_packet is {packet} bytes: a validator's long answer or a long manifest may not fit into a statement",
            "Set max_allowed_packet=16M in the server's configuration.",
        )
    if flush != 1:
        yield (
            f"innodb_flush_log_at_trx_commit is {flush}: a crash loses the jobs that were accepted in its last second",
            "Set innodb_flush_log_at_trx_commit=1 in the server's configuration.",
        )
    if logged and str(logging).upper() == "STATEMENT":
        yield (
            "binlog_format is STATEMENT, under which the server refuses every write at READ COMMITTED",
            "Set binlog_format=ROW (or MIXED) in the server's configuration.",
        )
    narrow = _narrow_columns(connection, studio_columns)
    if narrow:
        yield (
            f"emoji, perhaps more, do not fit into {', '.join(narrow)}: a job whose username or campaign has one is refused",
            "The studio may change that: ALTER TABLE … CONVERT TO CHARACTER SET utf8mb4.",
        )


def _narrow_columns(connection: Connection, studio_columns: Collection[str]) -> list[str]:
    asked = (
        "SELECT table_name, column_name, character_set_name FROM information_schema.columns "
        "WHERE table_schema = DATABASE() AND character_set_name NOT IN ('utf8mb4', 'utf16', 'utf32', 'utf16le', 'gb18030')"
    )
    found = connection.execute(text(asked)).all()
    wanted = {each.lower() for each in studio_columns}
    return sorted(f"{table}.{column} ({name})" for table, column, name in found if f"{table}.{column}".lower() in wanted)
