"""The main job where the database's sessions are unlike those of a fresh server, and rows that the studio never takes."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from zoneinfo import ZoneInfo

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, create_engine, make_url, text

from databases import Mariadb, pooled, prepared
from fault_table import fault
from ledgers import sql_ledger
from ncr_upload.adapters.sql.catalogue import SqlCatalogue
from ncr_upload.adapters.sql.engine import open_engine, translated_errors
from ncr_upload.adapters.sql.session import find_session_doubts
from ncr_upload.application.attempts import run_task
from ncr_upload.application.crash_points import pass_by
from ncr_upload.application.ports import AlreadyLive, CancelAnswer
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import NewJob, Problem, Status, Task
from ncr_upload.entrypoints.bootstrap import deliveries
from ncr_upload.entrypoints.bootstrap.doctor import make_checks
from ncr_upload.entrypoints.doctor import Finding, State, examine
from ncr_upload.entrypoints.embedded.product import Product
from outcomes import assert_delivered_once, assert_failed
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
                server.more += ["--lower-case-table-names=1", "--skip-character-set-client-handshake", "--log-bin=changes"]
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
    put_back = [(each, str(was) if isinstance(was, int | float) else f"'{was or ''}'") for each, was in before.items()]
    cleaning.callback(set_globals, admin, put_back)
    set_globals(admin, odd.global_settings)
    return url.set(username=name, database=name).render_as_string(hide_password=False)


def set_globals(admin: Engine, settings: Sequence[tuple[str, str]]) -> None:
    with admin.connect() as connection:
        for name, value in settings:
            connection.exec_driver_sql(f"SET GLOBAL {name} = {value}")
    admin.dispose()  # the next connection begins with them


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


# --- what no session can change


def test_behind_a_pooler_of_sessions_the_job_runs_and_doctor_names_the_pooler(
    servers: Servers, cleaning: ExitStack, workplace: Workplace, small: Product, job_id: str
) -> None:
    url = cleaning.enter_context(pooled(make_odd(servers, DATE_STYLES[0], cleaning)))
    assert_delivers(workplace, url, small, job_id)
    assert any("pooler" in finding.told for finding in ask_doctor(workplace) if finding.state is State.DOUBTFUL)


@pytest.mark.parametrize("kind", ["postgresql", *MYSQLS])
@fault(
    "Database: no connection left for this user",
    injector="CONNECTION LIMIT, MAX_USER_CONNECTIONS",
    invariants="LA",
    outcome="told by its own code at once; goes on when one is free",
)
def test_a_user_without_a_connection_left_is_told_and_goes_on_when_one_is_free(
    servers: Servers, cleaning: ExitStack, workplace: Workplace, small: Product, job_id: str, kind: str
) -> None:
    limits = {"postgresql": "ALTER ROLE {role} CONNECTION LIMIT 4"}
    limit = limits.get(kind, "ALTER USER {role}@'127.0.0.1' WITH MAX_USER_CONNECTIONS 4")
    move_to(workplace, make_odd(servers, Odd(kind, "", settings=(limit,)), cleaning))
    workplace.place(job_id, small)
    ports = workplace.ports()
    (task,) = ports.submissions.accept([NewJob(job_id, "ann", "spring")], batch_id=None, release=1)
    with ExitStack() as held:
        with pytest.raises(Unavailable) as told:
            hold(workplace.engine, 5, held)
        assert (told.value.code, told.value.retry_after_seconds) == ("database_connections", 5), told.value
    workplace.engine.dispose()
    run_task(task.task_id, ports, deliveries.make_worker_options(workplace.settings, "test-worker"))
    ended = ports.submissions.task(task.task_id)
    assert ended is not None
    assert_delivered_once(workplace, ended, small, spent=1)


def hold(engine: Engine, count: int, held: ExitStack) -> None:
    with translated_errors(engine):
        for _ in range(count):
            held.enter_context(engine.connect())


def test_the_history_shows_what_the_databases_encoding_lacks_as_an_escape(servers: Servers, cleaning: ExitStack) -> None:
    engine = open_database(make_odd(servers, Odd("postgresql", "LATIN1", in_encoding("LATIN1")), cleaning))
    cleaning.callback(engine.dispose)
    ledger = sql_ledger(engine)
    (task,) = ledger.accept("job-1")
    claim, message = ledger.claim(task), "the server said: für 🚀"
    problem = Problem("sftp_error", "transient", message, message)
    ledger.claims.put_back(claim, problem=problem, message=message, delay_seconds=0, spend_attempt=True)
    shown = "the server said: für \\U0001f680"
    found = ledger.submissions.task(task.task_id)
    assert found is not None
    assert (found.message, found.problem and found.problem.message) == (shown, shown)
    assert ledger.submissions.history(task.task_id)[-1].message == shown


def test_text_of_others_that_is_not_utf8_is_refused_by_its_bytes(
    servers: Servers, cleaning: ExitStack, workplace: Workplace, small: Product, job_id: str
) -> None:
    move_to(workplace, make_odd(servers, NO_UNICODE[0], cleaning))
    workplace.place(job_id, small)
    run(workplace.engine, "UPDATE job_files SET file_path = convert_from('\\x636166e9'::bytea, 'SQL_ASCII') || file_path")
    task = deliver(workplace, job_id, "ann")
    assert (task.status, task.problem and task.problem.code, task.attempt) == (Status.FAILED, "database_text", 1), task.message
    assert "0xe9" in task.message


def test_time_with_a_zone_is_the_studios_whatever_the_servers_zone_is(servers: Servers, cleaning: ExitStack) -> None:
    odd = Odd("postgresql", "Tokyo", settings=of_role(timezone="Asia/Tokyo"))
    engine = open_engine(make_odd(servers, odd, cleaning), zone="America/New_York")
    cleaning.callback(engine.dispose)
    run(engine, "CREATE TABLE job_files (job_id TEXT, file_path TEXT, file_type TEXT, timestamp TIMESTAMPTZ)")
    run(engine, "INSERT INTO job_files VALUES ('j', 'a.glb', 'base', '2026-11-01 03:00:00+00')")
    (file,) = SqlCatalogue(engine, ZoneInfo("America/New_York")).list_files("j")
    assert file.timestamp.startswith("2026-10-31 23:00:00")


def test_a_zone_that_the_server_does_not_know_is_a_doubt_of_the_doctors_and_stops_nothing(
    servers: Servers, cleaning: ExitStack
) -> None:
    engine = open_engine(
        make_odd(servers, Odd("postgresql", "", settings=of_role(datestyle="German")), cleaning), zone="No/Where"
    )
    cleaning.callback(engine.dispose)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT current_setting('DateStyle')").scalar_one().startswith("ISO")
        assert any("No/Where" in told for told, _ in find_session_doubts(connection, (), "No/Where"))


@pytest.mark.parametrize("kind", MYSQLS)
def test_a_large_batch_goes_in_statements_as_long_as_the_server_takes(servers: Servers, cleaning: ExitStack, kind: str) -> None:
    small_packets = (("max_allowed_packet", "16384"),)
    engine = open_database(make_odd(servers, Odd(kind, "", global_settings=small_packets), cleaning))
    cleaning.callback(engine.dispose)
    submissions, batch_id = sql_ledger(engine).submissions, str(uuid.uuid4())
    jobs = [NewJob(f"{'job-' * 30}{number:04}", "ann", "spring") for number in range(400)]
    assert len(submissions.accept(jobs, batch_id=batch_id, release=1)) == len(jobs)
    live = submissions.accept(jobs, batch_id=str(uuid.uuid4()), release=1)
    assert len(live) == len(jobs)
    assert all(isinstance(each, AlreadyLive) for each in live)
    assert submissions.cancel_batch(batch_id) == {CancelAnswer.CANCELLED: len(jobs)}
    with pytest.raises(Unavailable) as told, translated_errors(engine):
        run(engine, f"UPDATE ncr_jobs SET message = '{'x' * 20_000}'")
    assert told.value.code == "database_packet", told.value


def test_a_binary_log_that_no_job_could_be_written_into_is_told_by_its_setting(
    servers: Servers, cleaning: ExitStack, workplace: Workplace
) -> None:
    move_to(workplace, make_odd(servers, Odd("mariadb", ""), cleaning))
    url = make_url(servers.url("mariadb"))
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    cleaning.callback(set_globals, admin, [("binlog_format", "'MIXED'")])
    set_globals(admin, [("binlog_format", "'STATEMENT'")])
    workplace.engine.dispose()
    with pytest.raises(Unavailable) as told:
        sql_ledger(workplace.engine).accept("job-1")
    assert told.value.code == "database_setting", told.value
    assert any("binlog_format" in finding.told for finding in ask_doctor(workplace) if finding.state is State.DOUBTFUL)


@pytest.mark.parametrize("kind", MYSQLS)
def test_what_mysqls_settings_do_to_the_service_is_named_by_doctor(
    servers: Servers, cleaning: ExitStack, workplace: Workplace, kind: str
) -> None:
    short = (("max_allowed_packet", "65536"), ("innodb_flush_log_at_trx_commit", "2"))
    move_to(workplace, make_odd(servers, Odd(kind, "", "CHARACTER SET latin1", global_settings=short), cleaning))
    doubts = " ".join(finding.told for finding in ask_doctor(workplace) if finding.state is State.DOUBTFUL)
    for told in ("max_allowed_packet is 65536", "innodb_flush_log_at_trx_commit is 2", "history_log.action_by (latin1)"):
        assert told in doubts
    assert "job_files" not in doubts


# --- rows that the studio's tables never take

ROCKET = "ann 🚀"
NARROW = [
    *((kind, f"ALTER TABLE history_log CONVERT TO CHARACTER SET {name}") for kind in MYSQLS for name in ("latin1", "utf8mb3")),
    ("postgresql", "ALTER TABLE history_log ALTER action_by TYPE VARCHAR(4)"),
]


@pytest.mark.parametrize(("kind", "narrowing"), NARROW)
@fault(
    "SQL: a value that the studio's table cannot hold",
    injector="history_log in latin1 and utf8mb3, a user with an emoji; a short column",
    invariants="LOPRH",
    outcome="rejected at the first attempt naming table, column and value; nothing fetched",
)
def test_a_user_whose_name_the_studios_table_cannot_hold_is_rejected_before_anything_is_fetched(
    servers: Servers, cleaning: ExitStack, workplace: Workplace, small: Product, job_id: str, kind: str, narrowing: str
) -> None:
    move_to(workplace, make_odd(servers, Odd(kind, ""), cleaning))
    workplace.place(job_id, small)
    run(workplace.engine, narrowing)
    task = deliver(workplace, job_id, ROCKET)
    assert_failed(
        workplace, task, "database_row_refused", "rejected", "table history_log", "column action_by", "'ann \\U0001f680'"
    )
    assert task.attempt == 1
    assert not any("downloading" in line for line in workplace.history(task))
    assert deliver(workplace, job_id, "ann").status is Status.COMPLETED


def with_trigger(body: str) -> tuple[str, str]:
    return (
        f"CREATE FUNCTION no_mail() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body} RETURN NEW; END$$",
        "CREATE TRIGGER no_mail BEFORE INSERT ON email FOR EACH ROW EXECUTE FUNCTION no_mail()",
    )


NEVER_TAKEN = {
    "a state of the studio's own": with_trigger("RAISE EXCEPTION 'no mail today' USING ERRCODE = 'MAIL1';"),
    "no data found": with_trigger("RAISE no_data_found USING MESSAGE = 'no mail today';"),
    "an assertion": with_trigger("ASSERT false, 'no mail today';"),
    "a function that is not there": with_trigger("PERFORM mail_today(NEW.sku);"),
    "a view of two tables": (
        "ALTER TABLE email RENAME TO mails",
        "CREATE VIEW email AS SELECT * FROM mails UNION ALL SELECT * FROM mails",
    ),
    "a check": ("ALTER TABLE email ADD CONSTRAINT no_mail CHECK (sku = 'none')",),
}


@pytest.mark.parametrize("refusing", NEVER_TAKEN)
@fault(
    "SQL: the studio's table takes no row, for a reason of its own",
    injector="triggers, a view and a check in PostgreSQL",
    invariants="LOPRH",
    outcome="rejected at the first attempt naming the table; nothing fetched",
)
def test_a_row_that_the_studios_own_rules_refuse_is_rejected_before_anything_is_fetched(
    servers: Servers, cleaning: ExitStack, workplace: Workplace, small: Product, job_id: str, refusing: str
) -> None:
    move_to(workplace, make_odd(servers, Odd("postgresql", ""), cleaning))
    workplace.place(job_id, small)
    run(workplace.engine, *NEVER_TAKEN[refusing])
    task = deliver(workplace, job_id, "ann")
    assert_failed(workplace, task, "database_row_refused", "rejected", "table email")
    assert task.attempt == 1
    assert not any("downloading" in line for line in workplace.history(task))


def at(point: str, engine: Engine, *statements: str) -> Callable[[str], None]:
    return lambda reached: run(engine, *statements) if reached == point else None


def test_a_row_that_is_refused_since_the_job_began_is_rejected_before_the_publish(
    workplace: Workplace, small: Product, job_id: str
) -> None:
    workplace.place(job_id, small)
    change = at("stage:after", workplace.engine, FORBID)
    task = deliver(workplace, job_id, "ann", change)
    workplace.sweep(task)
    assert_failed(workplace, task, "database_row_refused", "rejected", "table email", "no mail today")


FORBID = "CREATE TRIGGER no_mail BEFORE INSERT ON email BEGIN SELECT RAISE(ABORT, 'no mail today'); END"


def test_once_the_package_is_visible_a_refused_row_is_tried_again(workplace: Workplace, small: Product, job_id: str) -> None:
    workplace.place(job_id, small)
    task = deliver(workplace, job_id, "ann", at("publish:after", workplace.engine, FORBID))
    assert (task.status, task.problem and task.problem.error_class) == (Status.PENDING, "transient"), task.message
    assert workplace.delivered(job_id) == small.delivered
    run(workplace.engine, "DROP TRIGGER no_mail")
    workplace.let_time_pass()
    assert_delivered_once(workplace, workplace.attempt(task), small, spent=2)
