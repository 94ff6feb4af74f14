"""docs/glossary.md held against the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs/glossary.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| Term ")
]


def test_every_term_is_told_once_in_one_line() -> None:
    terms = [row[0] for row in ROWS]
    assert len(terms) > 50
    assert sorted(set(terms)) == sorted(terms)
    assert all(len(row) == 3 and all(row) for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_term_lives_where_the_glossary_says(row: list[str]) -> None:
    places = re.findall(r"`([^`]+)`(?: \(`([^`]+)`\))?", row[2])
    assert places
    for path, name in places:
        place = ROOT / path if path.startswith(("src/", "docs/")) else ROOT / "src/ncr_upload" / path
        assert place.exists(), path
        if name:
            assert re.search(rf"\b{name.split('.')[-1]}\b", place.read_text()), f"{name} is not in {path}"
