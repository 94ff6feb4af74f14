"""Verdicts, reports and what a file's first bytes tell."""

from __future__ import annotations

import pytest

from ncr_validator.signatures import check_start
from ncr_validator.verdicts import FileReport, Issue, Report, Result, Severity, decide


def issue(severity: Severity, message: str = "") -> Issue:
    return Issue("gltf", "CODE", severity, message, "a.glb")


@pytest.mark.parametrize(
    ("severities", "result"),
    [
        ([], Result.VALID),
        ([Severity.HINT, Severity.INFO], Result.VALID),
        ([Severity.INFO, Severity.WARNING], Result.WARNING),
        ([Severity.WARNING, Severity.ERROR, Severity.HINT], Result.INVALID),
    ],
)
def test_the_worst_issue_decides(severities: list[Severity], result: Result) -> None:
    assert decide(map(issue, severities)) is result


def test_a_report_lists_the_worst_first_and_counts_what_it_leaves_out() -> None:
    issues = [issue(Severity.HINT)] * 3000 + [issue(Severity.ERROR, "x" * 9000)]
    answer = Report("SKU1", (FileReport("a.glb", 1, True, tuple(issues)),), (), {}, "default").to_json()
    assert (answer["result"], answer["counts"]["hints"], answer["counts"]["errors"]) == ("Invalid", 3000, 1)
    assert (answer["issues"][0]["severity"], len(answer["issues"]), answer["issues_omitted"]) == ("error", 2000, 1001)
    assert len(answer["issues"][0]["message"]) == 500


@pytest.mark.parametrize("kind", ["blend", "fbx", "obj", "mtl", "bin", "png", "dat"])
@pytest.mark.parametrize("page", [b"<?xml version='1.0'?><Error>", b"\n <!DOCTYPE html>", b"<html>", b"\xef\xbb\xbf<Error>"])
def test_an_error_page_in_place_of_a_file_is_an_error(kind: str, page: bytes) -> None:
    assert [(one.code, one.severity) for one in check_start(kind, page)] == [("ERROR_PAGE", Severity.ERROR)]


@pytest.mark.parametrize(
    ("kind", "head", "codes"),
    [
        ("blend", b"BLENDER-v402", []),
        ("blend", b"\x28\xb5\x2f\xfd", []),
        ("blend", b"what?", ["FILE_TYPE_MISMATCH"]),
        ("fbx", b"Kaydara FBX Binary  \0", []),
        ("fbx", b"; FBX 7.4.0 project file", []),
        ("obj", b"# chair\nv 0 0 0", []),
        ("obj", b"v 0\0\0", ["FILE_TYPE_MISMATCH"]),
        ("svg", b"<?xml version='1.0'?><svg>", []),
        ("bin", b"\0\1\2", []),
        ("bin", b"", ["EMPTY_FILE"]),
    ],
)
def test_a_start_that_looks_wrong_is_a_warning(kind: str, head: bytes, codes: list[str]) -> None:
    issues = list(check_start(kind, head))
    assert [one.code for one in issues] == codes
    assert {one.severity for one in issues} <= {Severity.WARNING}
