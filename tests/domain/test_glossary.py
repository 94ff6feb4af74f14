"""docs/glossary.md held against the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
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
        assert not name or name in set(list_definitions(ast.parse(place.read_text()))), f"{path} does not define {name}"


def test_a_name_that_is_only_mentioned_is_not_defined() -> None:
    source = """
import mentioned
class Kept(mentioned.Base):
    FIELD: int
    MEMBER = "mentioned"
    def method(self, mentioned):
        mentioned.attribute = 1
A, B = mentioned.call(c=1)
"""
    assert set(list_definitions(ast.parse(source))) == {"Kept", "Kept.FIELD", "Kept.MEMBER", "Kept.method", "A", "B"}


def list_definitions(body: ast.AST, owner: str = "") -> Iterator[str]:
    """Yield each class, function, method, constant and field of a module, as `Class.member`."""
    for node in ast.iter_child_nodes(body):
        match node:
            case ast.ClassDef(name=name):
                yield owner + name
                yield from list_definitions(node, f"{owner}{name}.")
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield owner + name
            case ast.Assign(targets=targets):
                for target in targets:
                    yield from (owner + each.id for each in ast.walk(target) if isinstance(each, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield owner + name
