"""A text from outside is bounded in characters and bytes, can be kept by every database, and says what was cut."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import Problem
from ncr_upload.domain.text import (
    CODE,
    LARGEST_JSON_INTEGER,
    MAX_JSON_VALUES,
    MESSAGE,
    NAME,
    NEXT_STEP,
    PROBLEM,
    QUOTE,
    REASONS,
    STATUS,
    Limit,
    bound_json,
    bound_line,
    bound_text,
    join_bounded,
    nesting_exceeds,
    parse_json,
)

ANY = st.text(st.characters(codec=None) | st.sampled_from("\0\ud800\udfff\n é😀…"), max_size=400)
LIMITS = st.builds(Limit, st.integers(1, 200), st.integers(4, 500))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(ANY, inner, max_size=5),
    max_leaves=30,
)


def is_within(text: str, limit: Limit) -> bool:
    return len(text) <= limit.characters and len(text.encode()) <= limit.bytes and "\0" not in text


@given(ANY, LIMITS)
def test_a_bounded_text_is_within_both_limits_and_stays_as_it_is(text: str, limit: Limit) -> None:
    bounded = bound_text(text, limit)
    assert is_within(bounded, limit)
    assert bound_text(bounded, limit) == bounded


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60))
def test_what_fits_is_not_touched(text: str) -> None:
    assert bound_text(text, Limit(60, 240)) == text


@given(ANY, LIMITS)
def test_a_bounded_line_is_one_line_without_controls(text: str, limit: Limit) -> None:
    bounded = bound_line(text, limit)
    assert is_within(bounded, limit)
    assert bounded == bounded.replace("\x85", "").strip() or "…" in bounded
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202e]", bounded)


def test_what_was_cut_is_said() -> None:
    assert bound_text("A" * 3_145_728, NAME).endswith("A… (3,145,728 characters in all)")
    assert bound_line("\n" * 50 + "A " * 1_000_000, QUOTE).endswith("… (2,000,050 characters in all)")
    assert bound_text("A" * 5, Limit(4, 100)) == "AAA…"
    assert bound_text("😀" * 5, Limit(5, 8)) == "😀…"
    assert bound_text("A" * 5, Limit(2, 2)) == "AA"


@given(st.lists(ANY, max_size=80), st.integers(20, 200))
def test_parts_are_joined_whole_as_far_as_they_fit(parts: list[str], characters: int) -> None:
    limit = Limit(characters, 2 * characters)
    more = "; and 80 more"
    assert is_within(join_bounded(parts, limit), Limit(characters + len(more), 2 * characters + len(more)))


def test_reasons_that_do_not_fit_are_counted() -> None:
    told = join_bounded([f"{number:>4}" + "😀" * 396 for number in range(60)], REASONS)
    assert told.endswith("and 58 more"), told[-40:]


def test_the_limits_grow_so_that_our_own_words_are_never_what_is_cut() -> None:
    inner = [CODE, NAME, QUOTE, REASONS, MESSAGE, PROBLEM, STATUS]
    assert inner == sorted(inner, key=lambda limit: (limit.characters, limit.bytes))
    words = Limit(500, 500)  # class, attempt, next try, the warning that the package may be visible
    assert STATUS.characters >= PROBLEM.characters + NEXT_STEP.characters + words.characters
    assert 4 * STATUS.bytes <= 65_535
    assert MESSAGE.bytes + 1_000 <= PROBLEM.bytes


@pytest.mark.parametrize("text", ["x" * 6_000_000, "😀" * 2_000_000, "\ud800\0" * 1_000_000])
def test_an_error_and_a_problem_are_bounded_where_they_are_made(text: str) -> None:
    error = Unavailable(text, text, text)
    problem = Problem(text, "transient", text, text)
    for each, limit in ((error, MESSAGE), (problem, PROBLEM)):
        assert is_within(each.code, CODE)
        assert is_within(each.message, limit)
        assert is_within(each.next_step, NEXT_STEP)
    assert len(str(error)) < 6_000
    assert error.args == (error.message,)


@given(JSON, st.sampled_from([400, 2_000, 100_000]))
def test_bounded_json_is_what_every_database_takes(value: object, max_bytes: int) -> None:
    bounded = bound_json(value, max_bytes)
    written = json.dumps(bounded, allow_nan=False)
    assert len(written) <= max_bytes
    assert not re.search(r"\\u0000|\\ud[89a-f]", re.sub(r"\\ud[89ab]..\\ud[c-f]..", "", written))
    assert bound_json(bounded, max_bytes) == bounded
    assert all(abs(int(number)) <= LARGEST_JSON_INTEGER for number in numbers(bounded))


def numbers(value: object) -> list[int]:
    match value:
        case bool() | None | str() | float():
            return []
        case int():
            return [value]
        case dict():
            return [found for each in value.values() for found in numbers(each)]
        case list():
            return [found for each in value for found in numbers(each)]
    raise AssertionError(value)


def test_a_verdict_keeps_its_form_and_says_that_it_was_shortened() -> None:
    issues = [{"severity": "error", "message": "😀" * 400} for _ in range(60_000)]
    bounded = bound_json({"data": [{"result": "Invalid", "issues": issues}]}, 60_000)
    assert bounded["data"][0]["result"] == "Invalid"
    assert bounded["ncr_shortened"]
    assert bounded["data"][0]["issues"][0]["message"].endswith("characters in all)")
    small = {"data": [{"result": "Valid", "score": 1.5, "issues": []}]}
    assert bound_json(small, 60_000) == small
    assert bound_json({"n": float("inf"), "m": 10**400, "k": float("nan")}, 9_000)["n"] == "inf"


def test_values_and_levels_are_counted_before_any_is_built() -> None:
    assert parse_json(b'{"data": [{"result": "Valid"}]}') == {"data": [{"result": "Valid"}]}
    for body in (b"[" + b"{}," * MAX_JSON_VALUES + b"{}]", b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 65 + b"1" + b"}" * 65):
        with pytest.raises(ValueError, match="too many values, or nested"):
            parse_json(body)
    assert not nesting_exceeds(b'["[[[[[[\\"[[[[[["]', 2)
    assert not nesting_exceeds(b'"' + b'\\"' * 2_000_000, 2)  # a text that never ends is looked through once
