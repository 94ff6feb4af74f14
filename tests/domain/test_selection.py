"""docs/contract.md, section 1: which files go."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncr_upload.domain.errors import Rejected
from ncr_upload.domain.packages import SourceFile
from ncr_upload.domain.selection import FileSelection, Selection, is_reference_picture, select_files

RULES: list[FileSelection] = ["latest_date", "latest_per_path", "all"]


def select(rows: list[tuple[str, str]], rule: FileSelection = "latest_date") -> Selection:
    return select_files([SourceFile(key, stamp) for key, stamp in rows], rule, job_id="job-7")


def keys(selection: Selection) -> list[str]:
    return [file.key for file in selection.files]


def refusal(rows: list[tuple[str, str]], rule: FileSelection = "latest_date") -> Rejected:
    with pytest.raises(Rejected) as caught:
        select(rows, rule)
    assert caught.value.next_step
    return caught.value


def test_only_files_of_the_newest_date_are_kept_and_the_others_counted() -> None:
    selection = select(
        [
            ("t/old.png", "2026-11-19 23:59:59"),
            ("t/first.png", "2026-11-20 00:00:00"),
            ("t/last.png", "2026-11-20T23:59:59.999999"),
            ("t/older.png", "2025-12-31 12:00:00"),
        ]
    )
    assert keys(selection) == ["t/first.png", "t/last.png"]
    assert (selection.older, selection.reference_pictures) == (2, 0)
    assert "2026-11-20" in selection.summary
    assert "2 older" in selection.summary


def test_all_keeps_every_date() -> None:
    selection = select([("t/a.png", "2026-11-19 10:00:00"), ("t/b.png", "2026-11-20 10:00:00")], "all")
    assert (keys(selection), selection.older) == (["t/a.png", "t/b.png"], 0)


def test_latest_per_path_keeps_a_one_file_fix_together_with_the_rest() -> None:
    rows = [
        ("t/Wood.png", "2026-11-19 10:00:00"),
        ("t/steel.png", "2026-11-19 10:00:00"),
        ("t/wood.png", "2026-11-20 10:00:00"),
    ]
    selection = select(rows, "latest_per_path")
    assert keys(selection) == ["t/steel.png", "t/wood.png"]
    assert selection.older == 1


def test_latest_per_path_keeps_both_of_a_tie_for_the_layout_to_refuse() -> None:
    rows = [("t/Wood.png", "2026-11-20 10:00:00"), ("t/wood.png", "2026-11-20 10:00:00")]
    assert keys(select(rows, "latest_per_path")) == ["t/Wood.png", "t/wood.png"]


@pytest.mark.parametrize("name", ["source_front.jpg", "SOURCE_a.JPEG", "Source_b.Png", "source_.webp", "source_x.y.AVIF"])
@pytest.mark.parametrize("rule", RULES)
def test_reference_pictures_are_left_out_and_counted(name: str, rule: FileSelection) -> None:
    selection = select([(f"refs/{name}", "2026-11-20 10:00:00"), ("t/wood.png", "2026-11-20 10:00:00")], rule)
    assert keys(selection) == ["t/wood.png"]
    assert selection.reference_pictures == 1
    assert "1 reference picture" in selection.summary


@pytest.mark.parametrize(
    "key",
    [
        "source_refs/wood.png",
        "a/source_refs/b/wood.png",
        "t/my_source_wood.png",
        "t/sources_wood.gif",
        "t/source_.tga",
        "t/source_png",
        "t/source.png",
    ],
)
def test_only_a_file_so_named_is_a_reference_picture(key: str) -> None:
    assert not is_reference_picture(key)
    assert keys(select([(key, "2026-11-20 10:00:00")])) == [key]


def test_a_reference_picture_added_later_does_not_make_the_model_old() -> None:
    selection = select([("t/wood.png", "2026-11-19 10:00:00"), ("refs/source_a.jpg", "2026-11-20 10:00:00")])
    assert (keys(selection), selection.older, selection.reference_pictures) == (["t/wood.png"], 0, 1)


def test_a_key_listed_twice_is_one_file_dated_by_its_newest_row() -> None:
    rows = [
        ("t/a.png", "2026-11-18 10:00:00"),
        ("t/a.png", "2026-11-20 10:00:00"),
        ("t/a.png", ""),
        ("t/b.png", "2026-11-20 09:00:00"),
    ]
    for order in permutations(rows):
        selection = select(list(order))
        assert (keys(selection), selection.older) == (["t/a.png", "t/b.png"], 0)
        assert selection.files[0].timestamp == "2026-11-20 10:00:00"


def test_a_job_without_files_is_refused_by_name() -> None:
    refused = refusal([])
    assert refused.code == "no_files"
    assert "'job-7'" in refused.message


def test_a_job_with_nothing_but_reference_pictures_is_refused_saying_so() -> None:
    refused = refusal([("a/source_a.png", ""), ("a/source_b.png", "")], "all")
    assert refused.code == "no_files"
    assert "only 2 reference picture" in refused.message


BAD_STAMPS = [
    "",
    " ",
    "0000-00-00 00:00:00",
    "2026-13-01 10:00:00",
    "20261120",
    "11/20/2026",
    "2026-11-20 25:00:00",
    "None",
    "2026-W47-5",
]


@pytest.mark.parametrize("stamp", BAD_STAMPS)
def test_a_row_without_a_readable_time_is_refused_by_name_where_the_date_decides(stamp: str) -> None:
    refused = refusal([("t/a.png", "2026-11-20 10:00:00"), ("t/b.png", stamp)])
    assert refused.code == "timestamp_invalid"
    assert "'t/b.png'" in refused.message
    assert repr(stamp) in refused.message


@pytest.mark.parametrize("stamp", BAD_STAMPS)
@pytest.mark.parametrize("rule", ["all", "latest_per_path"])
def test_a_row_without_a_readable_time_is_kept_where_no_date_decides(stamp: str, rule: FileSelection) -> None:
    assert keys(select([("t/a.png", "2026-11-20 10:00:00"), ("t/b.png", stamp)], rule)) == ["t/a.png", "t/b.png"]


def test_an_undated_reference_picture_hinders_nothing() -> None:
    assert keys(select([("t/source_a.png", "0000-00-00 00:00:00"), ("t/b.png", "2026-11-20 10:00:00")])) == ["t/b.png"]


@pytest.mark.parametrize(
    "stamp", ["2026-11-20", "2026-11-20 10:00", "2026-11-20T10:00:00Z", "2026-11-20 10:00:00+00", " 2026-11-20 10:00:00.25 "]
)
def test_every_usual_form_of_a_timestamp_has_its_date(stamp: str) -> None:
    assert keys(select([("t/a.png", stamp), ("t/b.png", "2026-11-20 11:00:00"), ("t/c.png", "2026-11-19 10:00:00")])) == [
        "t/a.png",
        "t/b.png",
    ]


@given(
    st.lists(
        st.builds(
            SourceFile,
            st.sampled_from(["t/a.png", "t/A.png", "t/b.png", "x/source_a.png", "c.blend"]),
            st.sampled_from(["2026-11-19 10:00:00", "2026-11-20 10:00:00", "2026-11-20 11:00:00", ""]),
        ),
        max_size=8,
    ),
    st.sampled_from(RULES),
    st.randoms(use_true_random=False),
)
def test_order_changes_nothing_and_every_key_is_kept_or_counted(files, rule, random) -> None:
    def run(rows: list[SourceFile]) -> Selection | str:
        try:
            return select_files(rows, rule, job_id="job-7")
        except Rejected as refused:
            return str(refused)

    shuffled = list(files)
    random.shuffle(shuffled)
    selection = run(files)
    assert run(shuffled) == selection
    if isinstance(selection, Selection):
        assert len({file.key for file in files}) == len(selection.files) + selection.older + selection.reference_pictures
