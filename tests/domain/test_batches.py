"""Batches: who may start, and what has become of the whole."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncr_upload.domain.batches import (
    BatchLoad,
    BatchStatus,
    Share,
    WorkerRoom,
    estimate_remaining,
    percentage,
    plan_room,
    release_next,
    roll_up,
)
from ncr_upload.domain.jobs import LIVE, TERMINAL, Stage, Status, progress_percent

S = Status


@pytest.mark.parametrize(
    ("in_flight", "held", "released"), [(0, 10, 5), (3, 10, 2), (5, 10, 0), (7, 10, 0), (0, 2, 2), (4, 0, 0), (0, 0, 0)]
)
def test_a_batch_is_filled_up_to_its_size(in_flight: int, held: int, released: int) -> None:
    answer = release_next([BatchLoad("b", in_flight, held)], batch_size=5)
    assert answer == ({"b": released} if released else {})


def test_each_batch_has_its_own_share() -> None:
    loads = [BatchLoad("big", 5, 9000), BatchLoad("small", 0, 2), BatchLoad("new", 0, 9)]
    assert release_next(loads, batch_size=5) == {"small": 2, "new": 5}


def test_little_room_goes_to_the_batches_with_the_fewest_jobs_in_flight() -> None:
    loads = [BatchLoad("a", 3, 9), BatchLoad("b", 0, 9), BatchLoad("c", 1, 9)]
    for order in permutations(loads):
        assert release_next(order, batch_size=5, room=3) == {"b": 2, "c": 1}


@pytest.mark.parametrize("room", [0, -1])
def test_without_room_nothing_is_released(room: int) -> None:
    assert release_next([BatchLoad("a", 0, 9)], batch_size=5, room=room) == {}


@given(
    st.lists(
        st.builds(BatchLoad, st.uuids().map(str), st.integers(0, 9), st.integers(0, 20)),
        max_size=6,
        unique_by=lambda load: load.batch_id,
    ),
    st.integers(1, 8),
    st.none() | st.integers(0, 20),
)
def test_neither_batch_size_nor_room_nor_what_is_held_is_ever_exceeded_or_left_unused(loads, batch_size, room) -> None:
    released = release_next(loads, batch_size=batch_size, room=room)
    for load in loads:
        count = released.get(load.batch_id, 0)
        assert count <= load.held
        assert count == 0 or load.in_flight + count <= batch_size
    could = sum(min(load.held, max(0, batch_size - load.in_flight)) for load in loads)
    assert sum(released.values()) == (could if room is None else min(could, room))


@pytest.mark.parametrize(
    ("counts", "status"),
    [
        ({S.PENDING: 3}, BatchStatus.PENDING),
        ({S.PENDING: 2, S.COMPLETED: 1}, BatchStatus.PROCESSING),
        ({S.PENDING: 2, S.PROCESSING: 1}, BatchStatus.PROCESSING),
        ({S.UPLOADING: 1, S.FAILED: 9}, BatchStatus.PROCESSING),
        ({S.COMPLETED: 3}, BatchStatus.COMPLETED),
        ({S.COMPLETED: 3, S.FAILED: 0}, BatchStatus.COMPLETED),
        ({S.COMPLETED: 2, S.FAILED: 1}, BatchStatus.COMPLETED_WITH_ERRORS),
        ({S.COMPLETED: 2, S.VALIDATION_FAILED: 1}, BatchStatus.COMPLETED_WITH_ERRORS),
        ({S.COMPLETED: 2, S.CANCELLED: 1}, BatchStatus.COMPLETED_WITH_ERRORS),
        ({S.FAILED: 3}, BatchStatus.FAILED),
        ({S.VALIDATION_FAILED: 3}, BatchStatus.FAILED),
        ({S.FAILED: 1, S.CANCELLED: 2}, BatchStatus.FAILED),
        ({S.CANCELLED: 3}, BatchStatus.CANCELLED),
    ],
)
def test_a_batch_rolls_up_from_its_jobs(counts: dict[Status, int], status: BatchStatus) -> None:
    assert roll_up(counts) is status
    assert roll_up(counts, idle_seconds=300, timeout_seconds=300) is status


@pytest.mark.parametrize("status", sorted(LIVE))
def test_a_batch_with_live_jobs_and_no_movement_is_stalled(status: Status) -> None:
    assert roll_up({status: 1, S.COMPLETED: 5}, idle_seconds=300.1, timeout_seconds=300) is BatchStatus.STALLED


@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_a_batch_that_has_ended_is_never_stalled(status: Status) -> None:
    assert roll_up({status: 1}, idle_seconds=1e9, timeout_seconds=300) is not BatchStatus.STALLED


@pytest.mark.parametrize("counts", [{}, {S.PENDING: 0}])
def test_a_batch_without_jobs_does_not_exist(counts: dict[Status, int]) -> None:
    with pytest.raises(ValueError, match="at least one job"):
        roll_up(counts)


@pytest.mark.parametrize(
    ("counts", "percent"),
    [
        ({}, 0.0),
        ({S.PENDING: 3}, 0.0),
        ({S.PENDING: 2, S.COMPLETED: 1}, 33.3),
        ({S.PENDING: 1, S.FAILED: 1, S.VALIDATION_FAILED: 1, S.CANCELLED: 1}, 75.0),
        ({S.PENDING: 1, S.COMPLETED: 9_999}, 99.9),
        ({S.COMPLETED: 10_000}, 100.0),
    ],
)
def test_without_sizes_the_percentage_counts_jobs_and_is_100_only_when_all_have_ended(
    counts: dict[Status, int], percent: float
) -> None:
    assert percentage(Share(status, Stage.QUEUED, count) for status, count in counts.items()) == percent


def test_a_job_weighs_what_its_bytes_weigh_and_one_of_unknown_size_what_the_others_do_on_average() -> None:
    large, small = Share(S.COMPLETED, Stage.DONE, 1, 1, 900), Share(S.PENDING, Stage.QUEUED, 1, 1, 100)
    assert percentage([large, small]) == 90.0
    assert percentage([large, small, Share(S.PENDING, Stage.QUEUED, 2)]) == 45.0


def test_a_running_job_counts_with_the_part_of_it_that_is_through() -> None:
    running = Share(S.UPLOADING, Stage.UPLOAD, 1, 1, 100)
    assert percentage([running, Share(S.PENDING, Stage.QUEUED, 1, 1, 100)]) == progress_percent(Stage.UPLOAD) / 2


@given(st.lists(st.builds(Share, st.sampled_from(Status), st.sampled_from(Stage), st.integers(1, 9), st.just(0), st.just(0))))
def test_the_percentage_is_100_exactly_when_all_jobs_have_ended(shares: list[Share]) -> None:
    ended = bool(shares) and all(share.status in TERMINAL for share in shares)
    assert (percentage(shares) == 100) == ended
    assert 0 <= percentage(shares) <= 100


@pytest.mark.parametrize(
    ("percent", "elapsed", "remaining"), [(0, 10, None), (50, 10, 10), (90, 9, 1), (100, 9, 0), (5, 0, None)]
)
def test_the_rest_of_a_batch_is_taken_to_go_at_the_pace_so_far(percent: float, elapsed: float, remaining: float | None) -> None:
    assert estimate_remaining(percent, elapsed) == remaining


@pytest.mark.parametrize(
    ("workers", "in_flight", "room"),
    [
        ([], 7, None),
        ([WorkerRoom(4, 4)], 7, None),
        ([WorkerRoom(2, 4)], 0, 2),
        ([WorkerRoom(2, 4), WorkerRoom(4, 4)], 5, 1),
        ([WorkerRoom(0, 4)], 0, 0),
        ([WorkerRoom(0, 4)], 3, 0),
    ],
)
def test_workers_short_of_memory_or_disk_get_no_more_batch_jobs_than_they_can_bear(
    workers: list[WorkerRoom], in_flight: int, room: int | None
) -> None:
    assert plan_room(workers, in_flight=in_flight) == room
