"""One frozen part holds up nobody but its own callers, and those not for long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from fault_table import fault
from ncr_upload.application.lanes import Lane, SharedLane
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


def test_what_is_asked_while_a_shared_lane_is_busy_is_asked_together_and_each_gets_its_own_answer() -> None:
    calls: list[list[int]] = []
    begun, thaw = threading.Event(), threading.Event()

    def double(numbers: Sequence[int]) -> list[int | Unavailable]:
        calls.append([*numbers])
        begun.set()
        thaw.wait()
        return [Unavailable("odd", "odd", "") if number == 3 else 2 * number for number in numbers]

    async def run() -> None:
        lane: SharedLane[int, int] = SharedLane("database", 1)
        first = asyncio.create_task(lane.run(1, double))
        assert await asyncio.to_thread(begun.wait, 10)
        others = [asyncio.create_task(lane.run(number, double)) for number in (2, 3)]
        await asyncio.sleep(0.01)
        others.append(asyncio.create_task(lane.run(4, double)))
        await asyncio.sleep(0)
        thaw.set()
        one, two, three, four = await asyncio.gather(first, *others, return_exceptions=True)
        assert (one, two, four) == (2, 4, 8)
        assert isinstance(three, Unavailable)

    asyncio.run(run())
    assert calls == [[1], [2, 3, 4]]


def test_an_error_of_a_shared_call_is_everybodys_and_the_next_call_is_made() -> None:
    def invert(numbers: Sequence[int]) -> list[float | Unavailable]:
        return [1 / number for number in numbers]

    async def run() -> None:
        lane: SharedLane[int, float] = SharedLane("database", 1)
        assert await lane.run(1, invert) == 1
        one, two = await asyncio.gather(lane.run(0, invert), lane.run(2, invert), return_exceptions=True)
        assert isinstance(one, ZeroDivisionError)
        assert isinstance(two, ZeroDivisionError)
        assert await lane.run(4, invert) == 0.25

    asyncio.run(run())


def test_a_question_whose_caller_gave_up_is_never_asked() -> None:
    begun, thaw, asked = threading.Event(), threading.Event(), list[str]()

    def wait(names: Sequence[str]) -> list[str | Unavailable]:
        asked.extend(names)
        begun.set()
        thaw.wait()
        return [*names]

    async def run() -> None:
        lane: SharedLane[str, str] = SharedLane("database", 1)
        first = asyncio.create_task(lane.run("first", wait, 20))
        assert await asyncio.to_thread(begun.wait, 10)
        with pytest.raises(Unavailable) as late:
            await lane.run("late", wait, 0.05)
        assert late.value.code == "database_timeout"
        thaw.set()
        assert await first == "first"
        assert await lane.run("next", wait) == "next"

    asyncio.run(run())
    assert asked == ["first", "next"]


def test_what_is_asked_in_one_turn_of_the_loop_is_one_call_though_threads_are_free() -> None:
    calls: list[list[str]] = []

    def answer(names: Sequence[str]) -> list[str | Unavailable]:
        calls.append([*names])
        return [*names]

    async def run() -> None:
        lane: SharedLane[str, str] = SharedLane("database", 2)
        assert await asyncio.gather(*(lane.run(name, answer) for name in ("a", "b", "c"))) == ["a", "b", "c"]
        assert await lane.run("d", answer) == "d"

    asyncio.run(run())
    assert calls == [["a", "b", "c"], ["d"]]
