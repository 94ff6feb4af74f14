"""The one table from what the three databases and their drivers say to what it means here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from ncr_upload.domain.text import QUOTE, bound_line


class Failure(StrEnum):
    """What an error of the database means; the value is the code that callers see."""

    SCHEMA = "database_schema"
    LOGIN = "database_login_refused"
    TLS = "database_tls"
    PRIVILEGE = "database_denied"
    FULL = "database_full"
    READ_ONLY = "database_read_only"
    CONTENDED = "database_contended"
    """A deadlock or a lost race: the whole transaction may be tried again at once."""
    CONNECTIONS = "database_connections"
    PACKET = "database_packet"
    SETTING = "database_setting"
    TEXT = "database_text"
    """What is stored there is not text: only a database in SQL_ASCII takes any bytes."""
    ROW = "database_row_refused"
    """The values or the table's rules are at fault: the very same row is refused each time."""
    UNAVAILABLE = "database_unavailable"


SIGNALLED = "45000"
"""SQLSTATE of MySQL where a trigger of the studio's refuses with an error number of its own."""


@dataclass(frozen=True, slots=True)
class _Signs:
    """SQLSTATEs of PostgreSQL, error numbers of MySQL and MariaDB, error names of SQLite; text where there is no more."""

    states: frozenset[str] = frozenset()
    numbers: frozenset[int] = frozenset()
    names: frozenset[str] = frozenset()
    text: re.Pattern[str] | None = field(default=None)

    def shown_by(self, cause: object, text: str) -> bool:
        number = next(iter(getattr(cause, "args", ())), None)
        state = getattr(cause, "sqlstate", None)
        if isinstance(number, int):
            if number in self.numbers or (state == SIGNALLED and state in self.states):
                return True
        elif state is not None:
            return state in self.states
        if getattr(cause, "sqlite_errorname", None) in self.names:
            return True
        return self.text is not None and self.text.search(text) is not None


def _text(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


_REFUSED_ROWS = frozenset(
    {
        *(1048, 1264, 1265, 1292, 1300, 1364, 1366, 1406, 1411, 1525, 1690, 3140, 3988),  # values
        *(1062, 1169, 1216, 1217, 1451, 1452, 1557, 1586, 3819, 4025),  # keys and constraints
        *(1288, 1348, 1369, 1393, 1394, 1423, 1471),  # views
        *(1526, 1748, 1906, 3105),  # partitions, generated columns
        *(1242, 1305, 1442, 1643, 1644),  # triggers
        *(1267,),  # a comparison with a character that the column's character set lacks
    }
)
_TABLE: tuple[tuple[Failure, _Signs], ...] = (
    (
        Failure.LOGIN,
        _Signs(
            frozenset({"28P01", "28000", "3D000"}),
            frozenset({1044, 1045, 1049, 1698}),
            text=_text(
                r"password authentication failed|no password supplied|pg_hba\.conf|(role|database) \".*\" does not exist"
            ),
        ),
    ),
    (Failure.TLS, _Signs(numbers=frozenset({2026}), text=_text(r"certificate|\bSSL\b|\bTLS\b"))),
    (
        Failure.SCHEMA,
        _Signs(
            frozenset({"42P01", "42703"}), frozenset({1146, 1054}), text=_text(r"no such (table|column)|has no column named")
        ),
    ),
    (Failure.PRIVILEGE, _Signs(frozenset({"42501"}), frozenset({1142, 1143, 1227}))),
    (
        Failure.FULL,
        _Signs(frozenset({"53100"}), frozenset({1021, 1114}), frozenset({"SQLITE_FULL"}), _text(r"no space left|errcode: 28")),
    ),
    (Failure.READ_ONLY, _Signs(frozenset({"25006"}), frozenset({1290, 1792, 1836}), text=_text(r"readonly database"))),
    (Failure.CONTENDED, _Signs(frozenset({"40001", "40P01"}), frozenset({1213, 1020}))),
    (
        Failure.CONNECTIONS,
        _Signs(
            frozenset({"53300"}),
            frozenset({1040, 1203, 1226}),
            text=_text(r"too many (clients|connections)|remaining connection slots|no more connections allowed"),
        ),
    ),
    (Failure.PACKET, _Signs(numbers=frozenset({1153, 1301}), text=_text(r"max_allowed_packet"))),
    (Failure.SETTING, _Signs(numbers=frozenset({1175, 1665}))),
    (Failure.TEXT, _Signs(frozenset({"22021"}))),
    (Failure.ROW, _Signs(frozenset({"44000", "428C9", "42804", "55000", SIGNALLED}), _REFUSED_ROWS)),
)


def find_failure(error: SQLAlchemyError) -> Failure | None:
    """What the error means; None for what is a bug of ours."""
    if isinstance(error, PoolTimeoutError):
        return Failure.UNAVAILABLE
    if not isinstance(error, DBAPIError):
        return None
    cause, text = error.orig, cause_of(error)
    for failure, signs in _TABLE:
        if signs.shown_by(cause, text):
            return failure
    if isinstance(error, IntegrityError | DataError) or _is_raised_by_a_function(cause):
        return Failure.ROW
    if isinstance(error, ProgrammingError) and not error.connection_invalidated:
        return Failure.ROW if getattr(getattr(cause, "diag", None), "context", None) else None
    return Failure.UNAVAILABLE


def _is_raised_by_a_function(cause: object) -> bool:
    """Return whether PostgreSQL has this from a function, as a rule a trigger of the studio's. It may raise any SQLSTATE; of
    those that the standard leaves to others PostgreSQL itself uses a few classes."""
    state = getattr(cause, "sqlstate", None)
    if not isinstance(state, str) or isinstance(next(iter(getattr(cause, "args", ())), None), int):
        return False
    return state[:2] in _CLASSES_OF_FUNCTIONS or (state[0] in "56789IJKLMNOPQRSTUVWXYZ" and state[:2] not in _OWN_CLASSES)


_CLASSES_OF_FUNCTIONS = frozenset({"09", "27", "2F", "38", "39", "P0"})
_OWN_CLASSES = frozenset({"53", "54", "55", "57", "58", "72", "XX"})


def cause_of(error: SQLAlchemyError) -> str:
    """The driver's own words, one line. They may name host, database and user; the redactor sees to passwords."""
    cause = getattr(error, "orig", None)
    lines = str(cause if cause is not None else error).strip().splitlines()
    return bound_line(lines[0], QUOTE) if lines else type(error).__name__


NEXT_STEPS = {
    Failure.SCHEMA: "If its name begins with ncr_, run `ncr db upgrade` with this release; else it is the studio's: see that "
    "DATABASE_URL names the studio's database.",
    Failure.LOGIN: "Correct DB_USER, DB_PASSWORD and DB_NAME (or DATABASE_URL), or let that user in from this host.",
    Failure.TLS: "See DB_SSL_MODE and that DB_SSL_CA holds the certificate authority of the server's certificate.",
    Failure.PRIVILEGE: "Grant DB_USER SELECT, INSERT, UPDATE and DELETE on the studio's and the ncr_* tables (and CREATE for "
    "`ncr db upgrade`).",
    Failure.FULL: "Make room for the database; the service tries again by itself.",
    Failure.READ_ONLY: "Let the service write there: a replica, a read-only server or a folder without the right to write "
    "cannot hold the ledger.",
    Failure.CONTENDED: "Nothing to do: it is tried again.",
    Failure.CONNECTIONS: "Allow the service more connections there (max_connections, and the user's own limit), or run fewer "
    "API and worker processes; the service tries again by itself.",
    Failure.PACKET: "Set max_allowed_packet=16M (or more) in the server's configuration.",
    Failure.SETTING: "Change that setting of the server, or of DB_USER's sessions; `ncr doctor` names what it finds.",
    Failure.TEXT: "The database is in SQL_ASCII, which takes any bytes: have the program that wrote that text write it anew in "
    "UTF-8.",
    Failure.ROW: "Compare the table with what the service writes (docs/database.md): a column may be too short, demand a "
    "value it is not given, or lack utf8mb4.",
    Failure.UNAVAILABLE: "Check that it runs, is reachable, has room, and that DB_USER may read and write; the service tries "
    "again by itself.",
}
