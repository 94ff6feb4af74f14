"""What all workers, on every host, share of a destination: connections and bytes a second, by the database's clock."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, Engine, and_, case, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from ncr_upload.adapters.sql.engine import translated_errors, whole_transaction
from ncr_upload.adapters.sql.tables import connections, db_now, pace

RACES = 5


class SqlSharing:
    """`Sharing` on SQL."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @whole_transaction
    def take_connection(self, destination: str, holder: str, most: int, leave: int, lease_seconds: float) -> int | None:
        """See `Sharing.take_connection`."""
        with translated_errors(self._engine):
            for _ in range(RACES):
                try:
                    with self._engine.begin() as connection:
                        _make_slots(connection, destination, most)
                        return _take(connection, destination, holder, most, leave, lease_seconds)
                except IntegrityError:
                    continue  # another worker has just made the slots
        return None

    @whole_transaction
    def renew_connections(self, holder: str, count: int, lease_seconds: float) -> bool:
        """See `Sharing.renew_connections`."""
        mine = and_(connections.c.holder == holder, connections.c.lease_until > db_now())
        with translated_errors(self._engine), self._engine.begin() as connection:
            renewed = connection.execute(update(connections).where(mine).values(lease_until=db_now() + lease_seconds))
            return renewed.rowcount >= count

    @whole_transaction
    def release_connections(self, holder: str, slot: int | None = None) -> None:
        """See `Sharing.release_connections`."""
        mine = connections.c.holder == holder
        which = mine if slot is None else and_(mine, connections.c.slot == slot)
        with translated_errors(self._engine), self._engine.begin() as connection:
            connection.execute(update(connections).where(which).values(holder=None, lease_until=0.0))

    @whole_transaction
    def book_bytes(self, destination: str, count: int, bytes_per_second: float) -> float:
        """See `Sharing.book_bytes`."""
        seconds = count / bytes_per_second
        free = case((pace.c.free_at > db_now(), pace.c.free_at), else_=db_now())
        book = update(pace).where(pace.c.destination == destination).values(free_at=free + seconds)
        with translated_errors(self._engine):
            for _ in range(RACES):
                try:
                    with self._engine.begin() as connection:
                        if connection.execute(book).rowcount == 0:
                            connection.execute(insert(pace).values(destination=destination, free_at=db_now() + seconds))
                        begins = select(pace.c.free_at - seconds - db_now()).where(pace.c.destination == destination)
                        return max(0.0, float(connection.execute(begins).scalar_one()))
                except IntegrityError:
                    continue  # another worker has just made the row
        return seconds


def _make_slots(connection: Connection, destination: str, most: int) -> None:
    made = connection.execute(select(func.count()).where(connections.c.destination == destination)).scalar_one()
    rows = [{"destination": destination, "slot": slot, "holder": None, "lease_until": 0.0} for slot in range(made, most)]
    if rows:
        connection.execute(insert(connections), rows)


def _take(connection: Connection, destination: str, holder: str, most: int, leave: int, lease_seconds: float) -> int | None:
    usable = and_(connections.c.destination == destination, connections.c.slot < most)
    held = select(func.count()).where(connections.c.destination == destination, ~_is_free())
    if most - connection.execute(held).scalar_one() <= leave:
        return None
    for slot in (
        connection.execute(select(connections.c.slot).where(usable, _is_free()).order_by(connections.c.slot)).scalars().all()
    ):
        taken = connection.execute(
            update(connections)
            .where(connections.c.destination == destination, connections.c.slot == slot, _is_free())
            .values(holder=holder, lease_until=db_now() + lease_seconds)
        )
        if taken.rowcount == 1:
            return int(slot)
    return None


def _is_free() -> ColumnElement[bool]:
    return or_(connections.c.holder.is_(None), connections.c.lease_until <= db_now())
