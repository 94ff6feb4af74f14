"""A worker child is judged by the memory it holds now; its peak says nothing about what the next job may have."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
from billiard.compat import mem_rss
from ncr_upload.entrypoints.recycling import ChildSize
size = ChildSize(200_000)
size()
held = b"x" * (300_000 * 1024)
held = None
peak_kb, told_kb = mem_rss(), size()
grown = b"x" * (300_000 * 1024)
print(peak_kb > 200_000, told_kb > 200_000, size() > 200_000)
"""


def test_a_large_moment_that_has_passed_does_not_replace_a_child_and_a_large_size_does() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "False", "True"]
