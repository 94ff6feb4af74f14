#!/usr/bin/env python3
"""Draws the fault table of docs/reliability.md from the `@fault` markers of the tests; with --check it only compares."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/reliability.md"
BEGIN = "<!-- faults: written by scripts/reliability_table.py -->"
END = "<!-- end of faults -->"
HEAD = "| Fault | Injector | Holds | What happens | Test |\n|---|---|---|---|---|\n"

Row = tuple[str, str, str, str]
"""Fault, injector, invariants, outcome."""


class Collector:
    """What pytest finds in the tests, without running any."""

    def __init__(self) -> None:
        self.tests: dict[Row, set[str]] = {}
        self.names: set[str] = set()

    def pytest_collection_modifyitems(self, items: Sequence[pytest.Item]) -> None:
        for item in items:
            name = getattr(item, "originalname", item.name)
            self.names.add(name)
            for mark in item.iter_markers("fault"):
                row = (mark.args[0], mark.kwargs["injector"], mark.kwargs["invariants"], mark.kwargs["outcome"])
                self.tests.setdefault(row, set()).add(f"`{name}`")


def collect() -> Collector:
    found = Collector()
    options = ["--collect-only", "-qq", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    with redirect_stdout(StringIO()) as told:
        status = pytest.main([*options, str(ROOT / "tests")], plugins=[found])
    if status != pytest.ExitCode.OK:
        raise SystemExit(f"{told.getvalue()[-3000:]}\nthe tests cannot be collected ({status!r})")
    return found


def draw(tests: dict[Row, set[str]]) -> str:
    """One line for each fault; those of one part stand together."""
    lines = [
        f"| {' | '.join(cell.replace('|', '/') for cell in row)} | {', '.join(sorted(tests[row]))} |" for row in sorted(tests)
    ]
    return f"{BEGIN}\n{HEAD}{chr(10).join(lines)}\n{END}"


def main(arguments: Sequence[str]) -> int:
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    drawn = before + draw(collect().tests) + after
    if drawn == page:
        return 0
    if "--check" in arguments:
        sys.stderr.write(f"{PAGE.relative_to(ROOT)} is not what the tests say: run `make docs`\n")
        return 1
    PAGE.write_text(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
