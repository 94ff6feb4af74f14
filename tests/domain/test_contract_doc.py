"""docs/contract.md, held against the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ncr_upload.domain.layout import plan_layout
from ncr_upload.domain.packages import SourceFile
from ncr_upload.entrypoints.settings import Settings

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs/contract.md").read_text()
EXAMPLES = re.findall(r"^\| (\d) \|.*\| `([^`]+)` \| `([^`]+)` \|$", DOC, re.MULTILINE)
REFERENCE = re.compile(r"docs/contract\.md, section (\d)")
SOURCES = [path for folder in ("src", "tests") for path in (ROOT / folder).rglob("*.py")]


def test_every_rule_of_the_layout_has_its_example() -> None:
    assert [rule for rule, _, _ in EXAMPLES] == [str(number) for number in range(1, 10)]


@pytest.mark.parametrize(("rule", "source", "target"), EXAMPLES, ids=lambda value: value)
def test_the_example_of_a_rule_is_what_the_layout_does(rule: str, source: str, target: str) -> None:
    (planned,) = plan_layout([SourceFile(source, "2026-11-01 10:00:00")], "SKU1").files
    assert planned.target == target


def test_every_section_that_is_referred_to_is_there() -> None:
    sections = set(re.findall(r"^## (\d)\. ", DOC, re.MULTILINE))
    referred = {number for path in SOURCES for number in REFERENCE.findall(path.read_text())}
    assert referred
    assert referred <= sections


def test_no_reference_leads_out_of_the_repository() -> None:
    lost = [str(path) for path in SOURCES if re.search(r"\bDESIGN [0-9]", path.read_text())]
    assert lost == []


def test_the_rule_that_is_called_the_default_is_the_default() -> None:
    assert f"`{Settings.model_fields['file_selection'].default}` (default)" in DOC


def test_every_code_of_the_doc_is_one_that_the_code_raises() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "src/ncr_upload").rglob("*.py"))
    codes = set(
        re.findall(
            r"^\| `([a-z_]+)` \| ", DOC.partition("Refused before any download")[2].partition("**The zip")[0], re.MULTILINE
        )
    )
    assert len(codes) == 5
    assert {code for code in codes if f'"{code}"' not in text} == set()
