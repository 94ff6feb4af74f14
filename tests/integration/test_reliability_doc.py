"""docs/reliability.md held against the tests it names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fault_table import INVARIANTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text()
WAYS = PAGE.partition("## Ways this job goes wrong")[2]
ROWS = [line for line in WAYS.splitlines() if line.startswith("| ") and not line.startswith("| Way ")]
DEFINED = re.compile(r"^(?:async )?def (test_\w+)", re.MULTILINE)
TESTS = {name for path in (ROOT / "tests").rglob("test_*.py") for name in DEFINED.findall(path.read_text())}


@pytest.mark.timeout(300)
def test_the_table_of_faults_is_what_the_markers_say() -> None:
    command = [sys.executable, str(ROOT / "scripts/reliability_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, f"{done.stderr[-2000:]}\nrun `make docs` (or {sys.executable} scripts/reliability_table.py)"


def test_every_promise_is_told_and_held_by_some_fault() -> None:
    told = re.findall(r"^\| ([A-Z]) \| ", PAGE, re.M)
    assert told == list(INVARIANTS)
    held = "".join(re.findall(r"^\|[^|]*\|[^|]*\| ([A-Z]+) \|", PAGE, re.M))
    assert set(held) == set(INVARIANTS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:60])
def test_every_way_it_goes_wrong_has_its_tests(row: str) -> None:
    wrong, done, tests = (cell.strip() for cell in row.strip("|").split("|"))
    named = re.findall(r"`(test_\w+)`", tests)
    assert wrong
    assert done
    assert named
    assert [name for name in named if name not in TESTS] == [], "renamed or gone: name the test that has its promise now"
