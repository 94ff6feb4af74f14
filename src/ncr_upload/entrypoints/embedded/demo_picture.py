"""The demo as a picture: the lines that a reader wants to see first, exported as an SVG."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

_COLUMNS = 108
_MAX_LIKE = 3
_FONT_FACE = re.compile(r"@font-face \{.*?\n    \}\n", re.DOTALL)


class Picture:
    """Record lines and save them as an SVG. A line that is too long ends in an ellipsis."""

    def __init__(self) -> None:
        self._console = Console(
            record=True, file=StringIO(), width=_COLUMNS, force_terminal=True, color_system="truecolor", highlight=False
        )
        self._steps: set[tuple[str, str]] = set()
        self.line("$ make demo", "bold")

    def line(self, text: str = "", style: str = "") -> None:
        """Add one line."""
        self._console.print(Text(text, style), no_wrap=True, overflow="ellipsis", crop=True)

    def step(self, status: str, stage: str, text: str) -> None:
        """Add the line of a job's status, once."""
        if (status, stage) not in self._steps:
            self._steps.add((status, stage))
            self.line(text)

    def forget_steps(self) -> None:
        """Show the steps of the next job again."""
        self._steps.clear()

    def tree(self, lines: Iterable[str]) -> None:
        """Add a tree of files; of many files in one folder, the first are shown."""
        for line in _shorten(lines):
            self.line(f"  {line}")

    def save(self, path: Path) -> None:
        """Write the SVG. It names no font of another host, so that it looks the same without the internet."""
        drawn = self._console.export_svg(title="make demo", unique_id="demo")
        path.write_text(_FONT_FACE.sub("", drawn))


def _shorten(lines: Iterable[str]) -> Iterator[str]:
    left_out, depth = 0, 0
    shown = 0
    for line in [*lines, "/"]:
        if line.endswith("/"):
            if left_out:
                yield f"{' ' * depth}… and {left_out} more"
            shown = left_out = 0
        elif shown >= _MAX_LIKE:
            left_out, depth = left_out + 1, len(line) - len(line.lstrip())
            continue
        else:
            shown += 1
        if line != "/":
            yield line
