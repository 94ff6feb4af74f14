"""One frozen part holds up nobody but its own callers, and those not for long."""

from __future__ import annotations

import asyncio
import threading

import pytest

from fault_table import fault
from ncr_upload.application.lanes import Lane
from ncr_upload.domain.errors import Unavailable


def test_a_call_returns_what_it_returns_and_raises_what_it_raises() -> None:
    async def run() -> None:
        lane = Lane("database", 1)
        assert await lane.run(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await lane.run(lambda: 1 // 0)

    asyncio.run(run())


@fault(
    "API: a part that never answers",
    injector="call that hangs",
    invariants="A",
    outcome="told in time, by name; other parts are asked as ever",
)
def test_a_frozen_part_is_unavailable_by_name_and_another_lane_goes_on() -> None:
    thaw = threading.Event()

    async def run() -> None:
        database, redis = Lane("database", 2), Lane("redis", 1)
        frozen = [asyncio.create_task(database.run(thaw.wait, 0.2)) for _ in range(10)]
        assert await redis.run(lambda: "here") == "here"
        for error in await asyncio.gather(*frozen, return_exceptions=True):
            assert isinstance(error, Unavailable)
            assert error.code == "database_timeout"
            assert "database" in error.message
        thaw.set()

    asyncio.run(run())


def test_a_call_that_could_not_start_in_time_never_runs() -> None:
    thaw, ran = threading.Event(), threading.Event()

    async def run() -> None:
        lane = Lane("database", 1)
        first = asyncio.create_task(lane.run(thaw.wait, 20))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await lane.run(ran.set, 0.05)
        thaw.set()
        await first
        await lane.run(lambda: None)  # whatever waited before it has had its turn

    asyncio.run(run())
    assert not ran.is_set()
