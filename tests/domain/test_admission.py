"""Whether there is room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncr_upload.domain.admission import (
    AdmissionLimits,
    Admit,
    Defer,
    decide,
    find_misfit,
    plan_capacity,
    recommend_concurrency,
)

GIB = 1024**3
LIMITS = AdmissionLimits(max_memory_percent=80, spare_disk_bytes=1000)


@pytest.mark.parametrize("percent", [0.0, 79.9, 80.0])
def test_memory_up_to_the_limit_admits(percent: float) -> None:
    assert decide(memory_used_percent=percent, limits=LIMITS) == Admit()


def test_memory_over_the_limit_defers_and_says_when_to_ask_again() -> None:
    answer = decide(memory_used_percent=80.1, limits=LIMITS)
    assert isinstance(answer, Defer)
    assert answer.code == "memory_short"
    assert "80.1 %" in answer.reason
    assert "MAX_MEMORY_USAGE_PERCENT=80 " in answer.reason
    assert answer.retry_after_seconds > 0


def test_a_fractional_limit_is_taken_as_it_is() -> None:
    limits = AdmissionLimits(max_memory_percent=0.5)
    assert decide(memory_used_percent=0.5, limits=limits) == Admit()
    answer = decide(memory_used_percent=0.6, limits=limits)
    assert isinstance(answer, Defer)
    assert "MAX_MEMORY_USAGE_PERCENT=0.5 " in answer.reason


@pytest.mark.parametrize(("free", "admitted"), [(6000, True), (5999, False), (0, False), (None, True)])
def test_a_job_needs_its_bytes_of_disk_and_some_to_spare(free: int | None, admitted: bool) -> None:
    answer = decide(memory_used_percent=10, limits=LIMITS, free_disk_bytes=free, needed_disk_bytes=5000)
    assert isinstance(answer, Admit) is admitted
    if isinstance(answer, Defer):
        assert answer.code == "disk_short"
        assert "5000 bytes" in answer.reason
        assert f"only {free} are free" in answer.reason


def concurrency(used_bytes: int, total_bytes: int = 4 * GIB, configured: int = 8, child_bytes: int = GIB // 4) -> int:
    return recommend_concurrency(
        used_bytes=used_bytes,
        total_bytes=total_bytes,
        max_memory_percent=75,
        child_bytes=child_bytes,
        configured=configured,
    )


@pytest.mark.parametrize(
    ("used_bytes", "children"), [(0, 8), (GIB, 8), (GIB + 1, 7), (2 * GIB, 4), (3 * GIB - 1, 1), (3 * GIB, 1), (4 * GIB, 1)]
)
def test_as_many_children_are_recommended_as_fit_below_the_limit(used_bytes: int, children: int) -> None:
    assert concurrency(used_bytes) == children


def test_where_memory_is_not_known_the_setting_stands() -> None:
    assert concurrency(0, total_bytes=0) == 8
    assert concurrency(0, child_bytes=0) == 8


@given(st.integers(0, 2**44), st.integers(0, 2**44), st.integers(1, 64))
def test_the_recommendation_is_at_least_one_and_at_most_the_setting(used: int, total: int, configured: int) -> None:
    assert 1 <= concurrency(used, total, configured) <= configured


@pytest.mark.parametrize(("needed", "fits"), [(0, True), (9000, True), (9001, False)])
def test_a_job_larger_than_the_whole_disk_never_fits(needed: int, fits: bool) -> None:
    misfit = find_misfit(needed, total_disk_bytes=10_000, limits=LIMITS)
    assert (misfit is None) is fits
    assert misfit is None or str(needed) in misfit.reason


@pytest.mark.parametrize(
    ("used_gib", "resident_gib", "free_disk", "capacity"),
    [(2, 0, 10**9, 4), (6, 0, 10**9, 1), (6, 2, 10**9, 2), (6.5, 0, 10**9, 0), (2, 0, 999, 0)],
)
def test_a_worker_short_of_memory_or_disk_has_room_for_fewer_jobs_or_none(
    used_gib: float, resident_gib: float, free_disk: int, capacity: int
) -> None:
    found = plan_capacity(
        used_bytes=int(used_gib * GIB),
        total_bytes=8 * GIB,
        limits=LIMITS,
        child_bytes=GIB,
        configured=4,
        resident_bytes=int(resident_gib * GIB),
        free_disk_bytes=free_disk,
    )
    assert found == capacity
