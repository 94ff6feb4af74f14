"""What follows a failed attempt."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncr_upload.domain.errors import CancelRequested, Deferred, DestinationParked, LeaseLost, Rejected, Unavailable
from ncr_upload.domain.retries import ErrorClass, GiveUp, Retry, RetryLimits, classify, plan_retry

LIMITS = RetryLimits(max_attempts=5, base_seconds=4, max_seconds=300)
SPENDING = [ErrorClass.TRANSIENT, ErrorClass.UNKNOWN]
WAITING = [ErrorClass.PARKED, ErrorClass.DEFERRED]


@pytest.mark.parametrize(
    ("error", "error_class"),
    [
        (Rejected("object_missing", "m", "n"), ErrorClass.REJECTED),
        (Unavailable("sftp_down", "m", "n"), ErrorClass.TRANSIENT),
        (DestinationParked("disk_full", "m", "n"), ErrorClass.PARKED),
        (Deferred("memory_short", "m", "n"), ErrorClass.DEFERRED),
        (KeyError("x"), ErrorClass.UNKNOWN),
        (MemoryError(), ErrorClass.UNKNOWN),
        (OSError(28, "disk full"), ErrorClass.UNKNOWN),
        (ExceptionGroup("g", [Rejected("a", "m", "n")]), ErrorClass.UNKNOWN),
    ],
)
def test_every_error_has_its_class(error: Exception, error_class: ErrorClass) -> None:
    assert classify(error) is error_class


@pytest.mark.parametrize("order", [LeaseLost("task-1", 3), CancelRequested("task-1")])
def test_an_order_to_stop_is_never_unforeseen_and_spends_no_further_attempt(order: Exception) -> None:
    plan = plan_retry(classify(order), 1, LIMITS, 0.5)
    assert classify(order) is not ErrorClass.UNKNOWN
    assert isinstance(plan, GiveUp) or not plan.spend_attempt


def test_a_rejected_job_is_never_tried_again() -> None:
    assert plan_retry(ErrorClass.REJECTED, 1, LIMITS, 0.0, retry_after_seconds=5) == GiveUp("it cannot succeed as it stands")


def test_a_transient_error_is_retried_until_the_last_attempt() -> None:
    plans = [plan_retry(ErrorClass.TRANSIENT, attempt, LIMITS, 0.0) for attempt in range(1, 7)]
    assert [isinstance(plan, Retry) for plan in plans] == [True] * 4 + [False] * 2


@pytest.mark.parametrize(("max_attempts", "tries"), [(5, 3), (50, 3), (2, 2), (1, 1)])
def test_an_unknown_error_gets_three_tries_at_most(max_attempts: int, tries: int) -> None:
    limits = RetryLimits(max_attempts, 1, 10)
    plans = [plan_retry(ErrorClass.UNKNOWN, attempt, limits, 0.0) for attempt in range(1, tries + 1)]
    assert [isinstance(plan, GiveUp) for plan in plans] == [False] * (tries - 1) + [True]


@pytest.mark.parametrize("error_class", SPENDING)
def test_a_failed_attempt_is_spent(error_class: ErrorClass) -> None:
    plan = plan_retry(error_class, 1, LIMITS, 0.0)
    assert isinstance(plan, Retry)
    assert plan.spend_attempt


@pytest.mark.parametrize("error_class", WAITING)
@pytest.mark.parametrize("attempt", [1, 5, 1000])
def test_a_parked_or_deferred_job_waits_on_and_spends_nothing(error_class: ErrorClass, attempt: int) -> None:
    plan = plan_retry(error_class, attempt, LIMITS, 0.0)
    assert plan == plan_retry(error_class, 1, LIMITS, 0.0)
    assert isinstance(plan, Retry)
    assert not plan.spend_attempt
    assert plan.delay_seconds > 0


def test_the_delay_doubles_up_to_the_limit() -> None:
    limits = RetryLimits(50, 4, 60)
    plans = [plan_retry(ErrorClass.TRANSIENT, attempt, limits, 0.0) for attempt in (1, 2, 3, 4, 5, 6, 49)]
    assert [plan.delay_seconds for plan in plans if isinstance(plan, Retry)] == [2, 4, 8, 16, 30, 30, 30]


def test_jitter_spreads_the_delay_over_its_upper_half() -> None:
    delays = [plan_retry(ErrorClass.TRANSIENT, 2, LIMITS, jitter) for jitter in (0.0, 0.5, 0.999)]
    assert [plan.delay_seconds for plan in delays if isinstance(plan, Retry)] == pytest.approx([4, 6, 7.996])


@pytest.mark.parametrize(
    ("asked", "delay"), [(None, 2), (0, 2), (1, 2), (120, 120), (86_400, 300), (-5, 2), (math.inf, 300), (math.nan, 2)]
)
def test_a_wish_to_retry_later_is_honoured_up_to_the_limit(asked: float | None, delay: float) -> None:
    assert plan_retry(ErrorClass.TRANSIENT, 1, LIMITS, 0.0, retry_after_seconds=asked) == Retry(delay, spend_attempt=True)


@pytest.mark.parametrize(("attempt", "jitter"), [(0, 0.5), (-1, 0.5), (1, 1.0), (1, -0.1)])
def test_an_impossible_attempt_or_jitter_is_an_error(attempt: int, jitter: float) -> None:
    with pytest.raises(ValueError):
        plan_retry(ErrorClass.TRANSIENT, attempt, LIMITS, jitter)


@given(
    st.sampled_from(ErrorClass),
    st.integers(1, 10_000),
    st.builds(RetryLimits, st.integers(1, 10_000), st.floats(0.01, 1000), st.floats(0.01, 10_000)),
    st.floats(0, 1, exclude_max=True),
    st.none() | st.floats(),
)
def test_no_job_ever_waits_beyond_the_limit_or_not_at_all(error_class, attempt, limits, jitter, asked) -> None:
    plan = plan_retry(error_class, attempt, limits, jitter, asked)
    assert isinstance(plan, GiveUp) or 0 < plan.delay_seconds <= limits.max_seconds
