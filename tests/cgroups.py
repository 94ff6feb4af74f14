"""Real memory groups: a limit by the kernel, for processes of a test."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from parts import miss

MB = 1024 * 1024
V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")
BALLOON = """
import mmap, os, sys
open(sys.argv[1], "w").write(str(os.getpid()))
size = int(sys.argv[2])
held = mmap.mmap(-1, size)
for place in range(0, size, 4096):
    held[place] = 1
print("full", flush=True)
sys.stdin.read()
"""
CACHE = """
import os, sys
open(sys.argv[1], "w").write(str(os.getpid()))
with open(sys.argv[3], "wb") as file:
    for _ in range(int(sys.argv[2]) // 2**20):
        file.write(bytes(2**20))
"""


@dataclass(frozen=True)
class MemoryGroup:
    folder: Path
    source: str
    """As `Memory.source` says it."""

    def add(self, pid: int) -> None:
        """The process; its children to come are in the group too."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """A process of the group holds so many bytes."""
        command = [sys.executable, "-c", BALLOON, str(self.folder / "cgroup.procs"), str(size)]
        balloon = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert balloon.stdin is not None
        assert balloon.stdout is not None
        try:
            assert balloon.stdout.readline() == b"full\n"
            yield
        finally:
            balloon.kill()
            balloon.wait()
            balloon.stdin.close()
            balloon.stdout.close()

    def write_file(self, path: Path, size: int) -> None:
        """A process of the group writes it, so that its page cache is the group's."""
        command = [sys.executable, "-c", CACHE, str(self.folder / "cgroup.procs"), str(size), str(path)]
        subprocess.run(command, check=True)


@contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """A group with this many bytes; a test is missed where none can be made (it takes root and a writable mount)."""
    name = f"ncr-test-{uuid.uuid4().hex[:8]}"
    if (V1 / "memory.limit_in_bytes").exists():
        group, limit_file = MemoryGroup(V1 / name, "cgroup1"), "memory.limit_in_bytes"
    else:
        group, limit_file = MemoryGroup(V2 / name, "cgroup2"), "memory.max"
    try:
        if group.source == "cgroup2":
            (V2 / "cgroup.subtree_control").write_text("+memory")
        group.folder.mkdir()
        (group.folder / limit_file).write_text(str(limit))
    except OSError as error:
        with suppress(OSError):
            group.folder.rmdir()
        miss(f"no memory group can be made here ({error}): it takes root and a writable /sys/fs/cgroup")
    try:
        yield group
    finally:
        _remove(group.folder)


def _remove(folder: Path) -> None:
    """Its processes have ended, or go back to the group around it."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for pid in (folder / "cgroup.procs").read_text().split():
            with suppress(OSError):
                (folder.parent / "cgroup.procs").write_text(pid)
        with suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.1)
