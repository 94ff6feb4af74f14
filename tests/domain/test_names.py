"""What callers may name things."""

from __future__ import annotations

import pytest

from ncr_upload.domain.names import check_job_id, check_label


@pytest.mark.parametrize("job_id", ["a", "12345", "your-job-id", "A_b.c-9", "-", "_x", "a..b", "x" * 128])
def test_a_job_id_of_plain_characters_is_taken_as_it_is(job_id: str) -> None:
    assert check_job_id(job_id) == job_id


@pytest.mark.parametrize(
    "job_id",
    [
        "",
        ".",
        "..",
        ".hidden",
        "x" * 129,
        "a b",
        "a/b",
        "12/../x",
        "a\\b",
        "a\n",
        "\na",
        "a\x00",
        "é",
        "٣",
        "a%2fb",
        "a;b",
        "😀",
    ],
)
def test_any_other_job_id_is_refused_saying_what_one_is(job_id: str) -> None:
    with pytest.raises(ValueError, match="1 to 128 letters, digits"):
        check_job_id(job_id)


@pytest.mark.parametrize(
    "label", ["a", "Jane Doe", "Frühling/Sommer 2026", "春の新作", "O'Neill <jane@example.com>", "🛋", "x" * 128]
)
def test_a_printable_label_is_taken_as_it_is(label: str) -> None:
    assert check_label(label) == label


@pytest.mark.parametrize(
    "label", ["", " ", "   ", "x" * 129, "a\nb", "a\tb", "a\x00", "a\x7f", "a\u2028b", "a\u202eb", "\ud800", "a\x1b[0m"]
)
def test_a_label_that_is_empty_long_or_not_printable_is_refused(label: str) -> None:
    with pytest.raises(ValueError, match="1 to 128 printable characters"):
        check_label(label)
