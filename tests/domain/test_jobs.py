"""Statuses, stages and progress."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncr_upload.domain.jobs import LIVE, PROGRESS_SPAN, TERMINAL, TRANSITIONS, Stage, Status, may_follow, progress_percent

STAGES = list(Stage)


def test_the_public_statuses_are_those_callers_know() -> None:
    assert {status.value for status in Status} == {
        *("pending", "processing", "validation_passed", "uploading"),
        *("completed", "validation_failed", "failed", "cancelled"),
    }


def test_every_status_is_either_live_or_terminal_and_has_its_moves() -> None:
    assert LIVE | TERMINAL == set(Status) == set(TRANSITIONS)
    assert not LIVE & TERMINAL


@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_nothing_follows_a_terminal_status(status: Status) -> None:
    assert not any(may_follow(status, then) for then in Status)


@pytest.mark.parametrize("status", sorted(LIVE))
def test_every_live_status_can_fail_and_be_cancelled_and_reach_completion(status: Status) -> None:
    assert may_follow(status, Status.FAILED)
    assert may_follow(status, Status.CANCELLED)
    reached, before = {status}, set()
    while reached != before:
        before = set(reached)
        reached |= {then for now in before for then in TRANSITIONS[now]}
    assert Status.COMPLETED in reached


@pytest.mark.parametrize("status", sorted(LIVE - {Status.PENDING, Status.PROCESSING}))
def test_a_task_whose_worker_died_can_be_taken_up_again(status: Status) -> None:
    assert may_follow(status, Status.PROCESSING)


@pytest.mark.parametrize("status", sorted(LIVE - {Status.PENDING}))
def test_an_attempt_that_failed_can_be_put_back_to_wait(status: Status) -> None:
    assert may_follow(status, Status.PENDING)


@pytest.mark.parametrize("status", [Status.PENDING, Status.VALIDATION_PASSED, Status.UPLOADING])
def test_a_no_from_the_validator_comes_only_while_processing(status: Status) -> None:
    assert not may_follow(status, Status.VALIDATION_FAILED)
    assert may_follow(Status.PROCESSING, Status.VALIDATION_FAILED)


def test_a_pending_task_is_not_delivered_without_being_processed() -> None:
    assert not may_follow(Status.PENDING, Status.COMPLETED)
    assert not may_follow(Status.PENDING, Status.UPLOADING)


def test_the_stages_share_out_the_whole_progress_without_gap_or_overlap() -> None:
    assert list(PROGRESS_SPAN) == STAGES
    assert all(PROGRESS_SPAN[before][1] == PROGRESS_SPAN[after][0] for before, after in pairwise(STAGES))
    assert progress_percent(Stage.QUEUED) == 0
    assert progress_percent(Stage.DONE) == 100


@given(
    st.integers(0, 2**40),
    st.lists(st.tuples(st.sampled_from(STAGES), st.integers(0, 2**41)), min_size=2, max_size=9).map(
        lambda moments: sorted(moments, key=lambda moment: (STAGES.index(moment[0]), moment[1]))
    ),
)
def test_progress_never_goes_back_and_stays_within_0_and_100(total_bytes: int, moments: list[tuple[Stage, int]]) -> None:
    percents = [progress_percent(stage, done_bytes, total_bytes) for stage, done_bytes in moments]
    assert percents == sorted(percents)
    assert all(0 <= percent <= 100 for percent in percents)


def test_a_stage_without_bytes_stands_at_its_start() -> None:
    assert progress_percent(Stage.DOWNLOAD) == progress_percent(Stage.DOWNLOAD, 0, 100) == 5
    assert progress_percent(Stage.DOWNLOAD, 50, 100) == 25
    assert progress_percent(Stage.DOWNLOAD, 200, 100) == 45
