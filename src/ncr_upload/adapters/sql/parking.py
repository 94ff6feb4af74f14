"""The ledger's record of parked destinations, and of duties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, and_, bindparam, case, insert, literal, select, update
from sqlalchemy.exc import IntegrityError

from ncr_upload.adapters.sql.engine import READ_ONLY, redactor_of, translated_errors, whole_transaction
from ncr_upload.adapters.sql.rows import bounded_message, problem_columns
from ncr_upload.adapters.sql.tables import db_now, duties, events, jobs, parked_destinations
from ncr_upload.domain.jobs import Problem
from ncr_upload.domain.parking import FORGOTTEN_SECONDS, Parked, plan_probing

PROBER = "probe"
RACES = 3


class SqlParking:
    """`Parking` on SQL."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @whole_transaction
    def park(self, destination: str, problem: Problem, probe_seconds: float) -> tuple[Parked, bool]:
        """See `Parking.park`."""
        problem = redactor_of(self._engine).redact_problem(problem)
        with translated_errors(self._engine):
            for _ in range(RACES - 1):
                try:
                    return self._park(destination, problem, probe_seconds)
                except IntegrityError:
                    continue  # another worker has just written the first record
            return self._park(destination, problem, probe_seconds)

    def _park(self, destination: str, problem: Problem, probe_seconds: float) -> tuple[Parked, bool]:
        known = select(parked_destinations, db_now().label("now")).where(_is(destination)).with_for_update()
        with self._engine.begin() as connection:
            row = connection.execute(known).one_or_none()
            if row is not None and row.healed_at is None and row.probe_at > row.now - FORGOTTEN_SECONDS:
                return _read(connection, destination), False
            seconds = plan_probing(
                probe_seconds, row.probe_seconds if row else None, row.now - row.healed_at if row and row.healed_at else None
            )
            values: dict[str, Any] = _cause(problem) | {
                "since": db_now(),
                "probe_at": db_now() + seconds,
                "probe_seconds": seconds,
                "probes": 0,
                "healed_at": None,
            }
            if row is None:
                connection.execute(insert(parked_destinations).values(destination=destination, **values))
            else:
                connection.execute(update(parked_destinations).where(_is(destination)).values(**values))
            return _read(connection, destination), True

    def find_parked(self, destination: str) -> Parked | None:
        """See `Parking.find_parked`."""
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            return _find(connection, destination)

    def probe_due(self) -> bool:
        """See `Parking.probe_due`."""
        due = select(parked_destinations.c.destination).where(_is_parked(), parked_destinations.c.probe_at <= db_now()).limit(1)
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            return connection.execute(due).first() is not None

    @whole_transaction
    def take_probe(self, destination: str, hold_seconds: float) -> bool:
        """See `Parking.take_probe`."""
        take = (
            update(parked_destinations)
            .where(_is(destination), _is_parked(), parked_destinations.c.probe_at <= db_now())
            .values(probe_at=db_now() + hold_seconds)
        )
        with translated_errors(self._engine), self._engine.begin() as connection:
            return connection.execute(take).rowcount == 1

    @whole_transaction
    def stay_parked(
        self, destination: str, problem: Problem, *, tell: Callable[[Parked], str], wait_seconds: float, park_seconds: float
    ) -> None:
        """See `Parking.stay_parked`."""
        problem = redactor_of(self._engine).redact_problem(problem)
        again = (
            update(parked_destinations)
            .where(_is(destination), _is_parked())
            .values(
                probe_at=db_now() + parked_destinations.c.probe_seconds,
                probes=parked_destinations.c.probes + 1,
                **_cause(problem),
            )
        )
        with translated_errors(self._engine), self._engine.begin() as connection:
            connection.execute(again)
            parked = _find(connection, destination)
            if parked is None:
                return
            look_at, last_at = parked.probe_at + wait_seconds, jobs.c.created_at + park_seconds
            connection.execute(
                update(jobs)
                .where(*_waiting_for(destination))
                .values(
                    message=bounded_message(self._engine, tell(parked)),
                    claimable_at=case((last_at < look_at, last_at), else_=look_at),
                    **problem_columns(problem),
                )
            )

    @whole_transaction
    def heal(self, destination: str, message: str) -> int:
        """See `Parking.heal`."""
        message = bounded_message(self._engine, message)
        line = select(
            jobs.c.task_id,
            db_now(),
            jobs.c.attempt,
            jobs.c.stage,
            literal("unparked"),
            literal(PROBER),
            literal(message),
        ).where(*_waiting_for(destination))
        columns = ["task_id", "at", "attempt", "stage", "kind", "actor", "message"]
        go_on = (
            update(jobs)
            .where(*_waiting_for(destination))
            .values(message=message, claimable_at=db_now(), waits_for=None, updated_at=db_now(), **problem_columns(None))
        )
        with translated_errors(self._engine), self._engine.begin() as connection:
            connection.execute(update(parked_destinations).where(_is(destination), _is_parked()).values(healed_at=db_now()))
            connection.execute(insert(events).from_select(columns, line))
            return connection.execute(go_on).rowcount


class SqlDuties:
    """`Duties` on SQL."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def due_duties(self, names: Sequence[str]) -> list[str]:
        """See `Duties.due_duties`."""
        resting = select(duties.c.name).where(duties.c.name.in_(names), duties.c.due_at > db_now())
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            not_now = set(connection.execute(resting).scalars())
        return [name for name in names if name not in not_now]

    @whole_transaction
    def take_duty(self, name: str, every_seconds: float) -> bool:
        """See `Duties.take_duty`."""
        take = update(duties).where(duties.c.name == name, duties.c.due_at <= db_now())
        known = select(duties.c.name).where(duties.c.name == name)
        with translated_errors(self._engine):
            try:
                with self._engine.begin() as connection:
                    if connection.execute(take.values(due_at=db_now() + every_seconds)).rowcount == 1:
                        return True
                    if connection.execute(known).first() is not None:
                        return False
                    connection.execute(insert(duties).values(name=name, due_at=db_now() + every_seconds))
                    return True
            except IntegrityError:
                return False


def _is(destination: str) -> ColumnElement[bool]:
    return parked_destinations.c.destination == destination


def _is_parked() -> ColumnElement[bool]:
    probed = parked_destinations.c.probe_at > db_now() - FORGOTTEN_SECONDS
    return and_(parked_destinations.c.healed_at.is_(None), probed)


def _waiting_for(destination: str) -> tuple[ColumnElement[bool], ...]:
    return (jobs.c.waits_for == destination, jobs.c.worker.is_(None), jobs.c.live_job_id.is_not(None))


def _cause(problem: Problem) -> dict[str, Any]:
    return {"code": problem.code, "message": problem.message, "next_step": problem.next_step}


_PARKED = select(parked_destinations, db_now().label("now")).where(
    parked_destinations.c.destination == bindparam("wanted"), _is_parked()
)


def _find(connection: Connection, destination: str) -> Parked | None:
    row = connection.execute(_PARKED, {"wanted": destination}).one_or_none()
    if row is None:
        return None
    seconds = max(0.0, row.probe_at - row.now)
    return Parked(destination, row.since, row.code, row.message, row.next_step, row.probe_at, seconds, row.probes)


def _read(connection: Connection, destination: str) -> Parked:
    parked = _find(connection, destination)
    assert parked is not None
    return parked
