"""Real disks that are small."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parts import miss


@contextmanager
def small_disk(at: Path, size: str, *, files: int = 0) -> Iterator[None]:
    """A tmpfs of this size, holding at most so many files and folders if given."""
    options = f"size={size}" + (f",nr_inodes={files}" if files else "")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", at], capture_output=True, text=True)
    if mounted.returncode:
        miss(f"no small disk can be mounted here (root can): {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", at], check=True)


def open_files(folder: Path) -> list[Path]:
    """What this process has open below the folder. What is unlinked is found by the name it had."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.append(descriptor.readlink())
    return [path for path in found if folder in path.parents]
