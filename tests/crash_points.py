"""The crash points of the pipeline, as the code names them."""

from __future__ import annotations

import re
from pathlib import Path

import ncr_upload

_REACHED = re.compile(r"""reach\(\s*["']([a-z_]+:[a-z_]+)["']\s*\)""")


def find_crash_points() -> list[str]:
    """Every point that some code reaches, by name."""
    folder = Path(next(iter(ncr_upload.__path__)))
    texts = (path.read_text() for path in sorted(folder.rglob("*.py")))
    return sorted({point for text in texts for point in _REACHED.findall(text)})
