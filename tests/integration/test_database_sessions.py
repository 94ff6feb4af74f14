"""The main job where the database's sessions are unlike those of a fresh server, and rows that the studio never takes."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, create_engine, make_url, text

from databases import Databases, Mariadb, prepared
from fault_table import fault
from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.application.attempts import run_task
from ncr_upload.application.crash_points import pass_by
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import NewJob, Stage, Status, Task
from ncr_upload.entrypoints.bootstrap import deliveries
from ncr_upload.entrypoints.bootstrap.doctor import make_checks
from ncr_upload.entrypoints.bootstrap.records import check_database
from ncr_upload.entrypoints.doctor import Finding, State, examine
from ncr_upload.entrypoints.embedded.product import Product
from outcomes import assert_delivered_once
from studio_rows import open_database
from workplace import Workplace

MYSQLS = ("mariadb", "mysql")
AWKWARD = "Zoë O'Neil \\'; \"ü\" %s :x"
"""Every sign that a string literal may stumble over, and letters that latin1 has."""


class Servers:
    """One server of each kind, started when first asked for; MariaDB with what only its start can change."""

    def __init__(self) -> None:
        self._running = ExitStack()
        self._urls: dict[str, str] = {}

    def url(self, kind: str) -> str:
        if kind not in self._urls:
            server = self._running.enter_context(prepared(kind))
            server.more += ["--character-set-server=latin1"] if kind in MYSQLS else []
            if isinstance(server, Mariadb):
                server.more += ["--lower-case-table-names=1", "--skip-character-set-client-handshake", "--log-bin=off"]
            self._urls[kind] = server.start()
        return self._urls[kind]

    def close(self) -> None:
        self._running.close()


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    running = Servers()
    yield running
    running.close()


@dataclass(frozen=True)
class Odd:
    """A database on a server: how it is made, and what is set for its role. Names: {database}, {role}."""

    kind: str
    name: str
    creating: str = ""
    settings: tuple[str, ...] = ()
    global_settings: tuple[tuple[str, str], ...] = ()
    """Of MySQL, which has no settings of a role. Put back afterwards."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


def of_role(**settings: str) -> tuple[str, ...]:
    return tuple(f"ALTER ROLE {{role}} SET {name} = '{value}'" for name, value in settings.items())


def of_database(**settings: str) -> tuple[str, ...]:
    return tuple(f"ALTER DATABASE {{database}} SET {name} = '{value}'" for name, value in settings.items())


def in_encoding(name: str) -> str:
    return f"ENCODING '{name}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"


DATE_STYLES = (
    Odd("postgresql", "German dates", settings=of_database(datestyle="German")),
    Odd("postgresql", "dates as SQL, DMY", settings=of_role(datestyle="SQL, DMY")),
)
NO_UNICODE = (
    Odd("postgresql", "SQL_ASCII", in_encoding("SQL_ASCII"), of_role(client_encoding="SQL_ASCII")),
    Odd("postgresql", "LATIN1", in_encoding("LATIN1"), of_role(client_encoding="LATIN1")),
)
SESSIONS = (
    Odd(
        "postgresql",
        "a role with every setting changed",
        settings=of_role(
            datestyle="Postgres, DMY",
            intervalstyle="sql_standard",
            timezone="Asia/Kolkata",
            standard_conforming_strings="off",
            bytea_output="escape",
            extra_float_digits="-15",
            default_transaction_isolation="serializable",
            default_transaction_deferrable="on",
            lock_timeout="400ms",
            statement_timeout="400ms",
            idle_in_transaction_session_timeout="400ms",
            transform_null_equals="on",
            client_encoding="SJIS",
        ),
    ),
    Odd("postgresql", "READ UNCOMMITTED", settings=of_role(default_transaction_isolation="read uncommitted")),
    Odd("postgresql", "few connections", settings=("ALTER ROLE {role} CONNECTION LIMIT 3",)),
    *(
        odd
        for kind in MYSQLS
        for odd in (
            Odd(
                kind,
                "latin1, ANSI, SERIALIZABLE and short of everything",
                "CHARACTER SET latin1",
                global_settings=(
                    ("sql_mode", "'ANSI,NO_BACKSLASH_ESCAPES,PAD_CHAR_TO_FULL_LENGTH,NO_AUTO_VALUE_ON_ZERO'"),
                    ("tx_isolation" if kind == "mariadb" else "transaction_isolation", "'SERIALIZABLE'"),
                    ("wait_timeout", "2"),
                    ("interactive_timeout", "2"),
                    ("max_allowed_packet", "16384"),
                    ("innodb_lock_wait_timeout", "1"),
                    ("lock_wait_timeout", "1"),
                    ("max_statement_time" if kind == "mariadb" else "max_execution_time", "1"),
                    ("sql_select_limit", "1"),
                    ("sql_safe_updates", "1"),
                    ("completion_type", "2"),
                    ("autocommit", "0"),
                    ("time_zone", "'+05:30'"),
                    ("lc_messages", "'de_DE'"),
                    ("max_user_connections", "4"),
                ),
            ),
            Odd(
                kind,
                "utf8mb3, not strict, READ UNCOMMITTED",
                "CHARACTER SET utf8mb3",
                global_settings=(
                    ("sql_mode", "''"),
                    ("tx_isolation" if kind == "mariadb" else "transaction_isolation", "'READ-UNCOMMITTED'"),
                    ("init_connect", "'SET SESSION sql_mode=ANSI_QUOTES, autocommit=0'"),
                ),
            ),
        )
    ),
)


def make_odd(servers: Servers, odd: Odd, cleaning: ExitStack) -> str:
    """The URL of a database made as told, for a login of its own without any special right."""
    url, name = make_url(servers.url(odd.kind)), f"o{uuid.uuid4().hex[:10]}"
    is_mysql = odd.kind in MYSQLS
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    cleaning.callback(admin.dispose)
    with admin.connect() as connection:
        if is_mysql:
            connection.execute(text(f"CREATE USER {name}@'127.0.0.1'"))
            connection.execute(text(f"CREATE DATABASE {name} {odd.creating}"))
            connection.execute(text(f"GRANT ALL ON {name}.* TO {name}@'127.0.0.1'"))
        else:
            connection.execute(text(f"CREATE ROLE {name} LOGIN"))
            connection.execute(text(f"CREATE DATABASE {name} OWNER {name} {odd.creating}"))
        for statement in odd.settings:
            connection.exec_driver_sql(statement.format(database=name, role=name))
        before = {each: connection.exec_driver_sql(f"SELECT @@GLOBAL.{each}").scalar() for each, _ in odd.global_settings}
    for each, was in before.items():
        cleaning.callback(set_global, admin, each, was if isinstance(was, int | float) else f"'{was or ''}'")
    for each, value in odd.global_settings:
        set_global(admin, each, value)
    return url.set(username=name, database=name).render_as_string(hide_password=False)


def set_global(admin: Engine, name: str, value: object) -> None:
    with admin.connect() as connection:
        connection.exec_driver_sql(f"SET GLOBAL {name} = {value}")
    admin.dispose()  # the next connection begins with it


@pytest.fixture
def cleaning() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def move_to(site: Workplace, url: str) -> None:
    site.engine.dispose()
    site.engine = open_database(url)
    site.change(database_url=SecretStr(url))


def deliver(site: Workplace, job_id: str, username: str, reach: Callable[[str], None] = pass_by) -> Task:
    """One attempt at a job of this user's."""
    ports = site.ports()
    (task,) = ports.submissions.accept([NewJob(job_id, username, "spring")], batch_id=None, release=1)
    run_task(task.task_id, ports, deliveries.make_worker_options(site.settings, "test-worker"), reach)
    found = ports.submissions.task(task.task_id)
    assert found is not None
    return found


def ask_doctor(site: Workplace) -> list[Finding]:
    return examine({"database": make_checks(site.settings)["database"]}, 60)


def run(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


# --- sessions


def assert_delivers(workplace: Workplace, url: str, small: Product, job_id: str) -> None:
    """The main job ends at its first attempt, with the user's name as it was given; and so does the next, on a rested pool."""
    move_to(workplace, url)
    workplace.place(job_id, small)
    assert_delivered_once(workplace, deliver(workplace, job_id, AWKWARD), small, spent=1)
    assert [row["action_by"] for row in workplace.studio_rows("history_log")] == [AWKWARD]
    assert not [finding for finding in ask_doctor(workplace) if finding.state is State.WRONG]


@pytest.mark.parametrize("odd", DATE_STYLES, ids=str)
@fault(
    "Database: dates written in another style",
    injector="ALTER DATABASE, ALTER ROLE: datestyle",
    invariants="LOS",
    outcome="the session is set at connect; delivered at the first attempt",
)
def test_a_date_style_of_the_servers_does_not_reach_the_service(
    servers: Servers, cleaning: ExitStack, workplace: Workplace, small: Product, job_id: str, odd: Odd
) -> None:
    assert_delivers(workplace, make_odd(servers, odd, cleaning), small, job_id)


@pytest.mark.parametrize("odd", NO_UNICODE, ids=str)
@fault(
    "Database: not in UTF-8",
    injector="SQL_ASCII and LATIN1 databases",
    invariants="LOS",
    outcome="delivered at the first attempt; doctor names the encoding",
)
def test_a_database_in_another_encoding_serves_and_doctor_names_it(
    servers: Servers, cleaning: ExitStack, workplace: Workplace, small: Product, job_id: str, odd: Odd
) -> None:
    assert_delivers(workplace, make_odd(servers, odd, cleaning), small, job_id)
    doubts = [finding.told for finding in ask_doctor(workplace) if finding.state is State.DOUBTFUL]
    assert any(odd.name in doubt for doubt in doubts), doubts


@pytest.mark.parametrize("odd", SESSIONS, ids=str)
@fault(
    "Database: unusual settings of server, database or role",
    injector="ALTER ROLE, SET GLOBAL, flags of the server",
    invariants="LOS",
    outcome="the session is set at connect; delivered at the first attempt",
)
def test_the_main_job_runs_whatever_the_sessions_of_the_server_are_like(
    servers: Servers, cleaning: ExitStack, workplace: Workplace, small: Product, job_id: str, odd: Odd
) -> None:
    assert_delivers(workplace, make_odd(servers, odd, cleaning), small, job_id)
