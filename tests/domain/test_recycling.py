"""A worker child is replaced for what it holds now, and never after every job."""

from __future__ import annotations

import pytest

from ncr_upload.domain.recycling import must_recycle


@pytest.mark.parametrize(
    ("first", "now", "recycled"),
    [(100, 150, False), (100, 200, False), (100, 201, True), (250, 250, False), (250, 375, False), (250, 376, True)],
)
def test_a_child_goes_when_it_has_grown_beyond_the_limit_and_not_for_being_born_above_it(
    first: int, now: int, recycled: bool
) -> None:
    assert must_recycle(first, now, limit_kb=200) is recycled
