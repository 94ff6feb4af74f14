"""How uploads share a channel: what is under way is bounded, for a channel, a connection and a session, and a silent server is
given up."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from ncr_upload.adapters.sftp_dropoff import track as module
from ncr_upload.adapters.sftp_dropoff.remote import at_most
from ncr_upload.adapters.sftp_dropoff.track import FILES_AT_ONCE, LINK_BYTES, Flow, Signal, Track
from ncr_upload.domain.errors import Unavailable

pytestmark = pytest.mark.anyio


class Wire:
    """Of a `Remote`: answers come when a test sets them."""

    def __init__(self) -> None:
        self.answers: list[asyncio.Future[Any]] = []

    def write(self, handle: bytes, block: memoryview, offset: int) -> asyncio.Future[Any]:
        self.answers.append(asyncio.get_running_loop().create_future())
        return self.answers[-1]

    def check(self, answer: asyncio.Future[Any]) -> None:
        answer.result()


class Allowance:
    is_paced = False

    def __init__(self) -> None:
        self.paced: list[int] = []

    async def pace(self, count: int) -> None:
        self.paced.append(count)


class Place:
    def __init__(self, link_bytes: int = 100, all_bytes: int = 150) -> None:
        self.flow = Flow(all_bytes)
        self.allowance = Allowance()
        self.link_bytes = link_bytes

    def track(self, max_write_len: int = 0, timeout_seconds: float = 1) -> tuple[Track, Wire]:
        """In a connection of its own."""
        wire = Wire()

        def class_of(error: BaseException, doing: str) -> Unavailable:
            return Unavailable("sftp_unreachable", f"lost while it was to {doing}", "It is tried again.")

        remote: Any = SimpleNamespace(
            wire=wire,
            timeout_seconds=timeout_seconds,
            channel=SimpleNamespace(limits=SimpleNamespace(max_write_len=max_write_len)),
            class_of=class_of,
        )
        return Track(remote, Flow(self.link_bytes), self.flow, self.allowance), wire  # type: ignore[arg-type]


async def waits(work: Any) -> asyncio.Task[Any]:
    task = asyncio.create_task(work)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()
    return task


def write(track: Track, size: int) -> asyncio.Future[Any]:
    return track.write(b"handle", memoryview(bytes(size)), 0)


def answer(track: Track, written: asyncio.Future[Any], size: int, error: Exception | None = None) -> None:
    if error is None:
        written.set_result(None)
    else:
        written.set_exception(error)
    track.heard(written, size)


async def test_jobs_after_the_first_failure_are_not_even_made() -> None:
    """Or Python would warn of coroutines that nobody awaited."""
    made: list[int] = []

    async def job(number: int) -> None:
        raise ValueError(number)

    def make(number: int) -> Coroutine[Any, Any, None]:
        made.append(number)
        return job(number)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="0"):
            await at_most(3, (make(number) for number in range(10)))
        gc.collect()
    assert made == [0, 1, 2]
    assert [str(each.message) for each in warned if each.category is RuntimeWarning] == []


async def test_a_signal_wakes_all_who_wait_and_none_who_come_later() -> None:
    signal = Signal()
    waiting = [asyncio.create_task(signal.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    signal.fire()
    await asyncio.wait_for(asyncio.gather(*waiting[1:]), 5)
    later = await waits(signal.wait())
    signal.fire()
    await asyncio.wait_for(later, 5)


async def test_bytes_in_a_connection_wait_until_earlier_ones_are_acknowledged() -> None:
    track, _ = Place(100, 1000).track()
    written = write(track, 80)
    await asyncio.wait_for(track.have_room(20), 5)
    waiting = await waits(track.have_room(21))
    answer(track, written, 80)
    await asyncio.wait_for(waiting, 5)


async def test_a_block_larger_than_the_bound_goes_alone() -> None:
    track, _ = Place(100, 150).track()
    await asyncio.wait_for(track.have_room(5000), 5)
    written = write(track, 5000)
    waiting = await waits(track.have_room(1))
    answer(track, written, 5000)
    await asyncio.wait_for(waiting, 5)


async def test_the_bytes_of_all_connections_together_are_bounded() -> None:
    place = Place(100, 150)
    (first, _), (second, _) = place.track(), place.track()
    written = write(first, 100)
    await asyncio.wait_for(second.have_room(50), 5)
    waiting = await waits(second.have_room(51))
    answer(first, written, 100)
    await asyncio.wait_for(waiting, 5)
    assert place.flow.bytes == 0


async def test_a_write_that_fails_gives_its_room_back_and_says_why() -> None:
    place = Place()
    track, _ = place.track()
    written = write(track, 100)
    with pytest.raises(Unavailable, match="said no"):
        answer(track, written, 100, Unavailable("sftp_failure", "said no", "It is tried again."))
    assert place.flow.bytes == 0
    await asyncio.wait_for(track.have_room(100), 5)


@pytest.mark.parametrize(
    ("max_write_len", "most", "expected"), [(32768, 10**6, 32768), (10**6, 500, 500), (0, 10**9, LINK_BYTES)]
)
async def test_a_block_is_what_the_server_takes_at_once(max_write_len: int, most: int, expected: int) -> None:
    track, _ = Place().track(max_write_len)
    assert track.block_bytes(most) == expected


@pytest.mark.parametrize(("count", "size"), [(FILES_AT_ONCE, 1), (1, LINK_BYTES), (1, 10 * LINK_BYTES)])
async def test_so_many_files_are_open_in_a_channel_and_no_more(count: int, size: int) -> None:
    track, _ = Place().track()
    for _ in range(count):
        await asyncio.wait_for(track.have_room_for_a_file(), 5)
        track.take(size)
    waiting = await waits(track.have_room_for_a_file())
    track.give_back(size)
    await asyncio.wait_for(waiting, 5)


@pytest.mark.parametrize("is_paced", [True, False])
async def test_bytes_are_booked_where_a_rate_is_set(is_paced: bool) -> None:
    place = Place()
    place.allowance.is_paced = is_paced
    track, _ = place.track()
    await track.have_room(7)
    assert place.allowance.paced == ([7] if is_paced else [])


async def test_a_server_that_acknowledges_nothing_for_the_time_out_is_given_up() -> None:
    track, _ = Place().track(timeout_seconds=0.4)
    write(track, 10)
    with pytest.raises(Unavailable, match="take what was written"):
        await asyncio.wait_for(track.watch(), 20)


async def test_a_channel_without_bytes_under_way_is_not_given_up() -> None:
    """Nor is one that acknowledges now and then."""
    track, wire = Place(1000, 1000).track(timeout_seconds=0.6)
    watching = asyncio.create_task(track.watch())
    await asyncio.sleep(1)
    write(track, 10)
    for _ in range(4):
        await asyncio.sleep(0.2)
        write(track, 10)
        answer(track, wire.answers.pop(0), 10)
    assert not watching.done()
    watching.cancel()


def test_the_bounds_hold_for_the_memory_of_a_worker() -> None:
    assert LINK_BYTES <= module.ALL_BYTES <= 16 * 1024 * 1024
