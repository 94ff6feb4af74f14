"""What all workers share of a destination: never more connections than may be, and bytes at one pace. On every database."""

from __future__ import annotations

import threading
import time

import pytest
from sqlalchemy import Engine

from fault_table import fault
from ncr_upload.adapters.sql.sharing import SqlSharing

PLACE, OTHER = "partner@host:22:/", "partner@other:22:/"
LEASE = 60.0


@pytest.fixture
def sharing(engine: Engine) -> SqlSharing:
    return SqlSharing(engine)


def test_of_many_workers_at_once_no_more_get_a_connection_than_may(sharing: SqlSharing) -> None:
    got: list[int | None] = []
    start = threading.Barrier(8)

    def take(number: int) -> None:
        start.wait()
        got.append(sharing.take_connection(PLACE, f"holder-{number}", 3, 0, LEASE))

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(slot for slot in got if slot is not None) == [0, 1, 2]
    assert got.count(None) == 5


def test_what_is_given_back_is_free_and_another_destination_is_another_matter(sharing: SqlSharing) -> None:
    assert [sharing.take_connection(PLACE, "a", 2, 0, LEASE) for _ in range(3)] == [0, 1, None]
    assert sharing.take_connection(OTHER, "b", 1, 0, LEASE) == 0
    sharing.release_connections("a", 1)
    assert sharing.take_connection(PLACE, "c", 2, 0, LEASE) == 1
    sharing.release_connections("a")
    assert sharing.take_connection(PLACE, "d", 2, 0, LEASE) == 0
    assert sharing.take_connection(OTHER, "d", 1, 0, LEASE) is None


def test_who_leaves_some_to_others_gets_none_of_the_last(sharing: SqlSharing) -> None:
    assert sharing.take_connection(PLACE, "a", 3, 0, LEASE) == 0
    assert sharing.take_connection(PLACE, "a", 3, 1, LEASE) == 1
    assert sharing.take_connection(PLACE, "a", 3, 1, LEASE) is None
    assert sharing.take_connection(PLACE, "b", 3, 0, LEASE) == 2


@pytest.mark.parametrize("before", [2, 6])
def test_a_limit_that_is_changed_holds_for_what_is_taken_from_then_on(sharing: SqlSharing, before: int) -> None:
    for number in range(before):
        assert sharing.take_connection(PLACE, f"holder-{number}", before, 0, LEASE) == number
    taken = [sharing.take_connection(PLACE, "later", 4, 0, LEASE) for _ in range(5)]
    assert taken == ([2, 3, None, None, None] if before == 2 else [None] * 5)


@fault(
    "Worker: killed while it holds connections to a limited destination",
    injector="a lease that nobody renews",
    invariants="LR",
    outcome="the connections are free for others when the lease ends",
)
def test_a_connection_whose_holder_died_is_free_after_its_lease(sharing: SqlSharing) -> None:
    assert sharing.take_connection(PLACE, "dead", 1, 0, 1.0) == 0
    assert sharing.take_connection(PLACE, "next", 1, 0, LEASE) is None
    assert sharing.renew_connections("dead", 1, 1.0)
    time.sleep(1.5)
    assert not sharing.renew_connections("dead", 1, LEASE), "nobody may think that it still has what others may take"
    assert sharing.take_connection(PLACE, "next", 1, 0, LEASE) == 0
    assert sharing.renew_connections("next", 1, LEASE)
    sharing.release_connections("dead")
    assert sharing.take_connection(PLACE, "third", 1, 0, LEASE) is None


def test_bytes_are_booked_one_after_another_by_whoever_asks(sharing: SqlSharing) -> None:
    """Each may begin when all before it have had their time; what nobody used is not saved up."""
    waits: list[float] = []
    began = time.monotonic()

    def book() -> None:
        waits.extend(sharing.book_bytes(PLACE, 1000, 500) for _ in range(3))

    threads = [threading.Thread(target=book) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    assert max(waits) == pytest.approx(22, abs=took + 0.2), "eleven before it, two seconds each"
    asked_at = time.monotonic()
    assert sharing.book_bytes(OTHER, 1000, 500) == 0
    wait = sharing.book_bytes(OTHER, 1, 1000)
    assert wait <= 2 + 0.01
    assert wait > 2 - (time.monotonic() - asked_at) - 0.01, "and less by what has passed since the first was booked"
    time.sleep(2.2)
    assert sharing.book_bytes(OTHER, 1000, 500) == 0
