"""The machine: memory of this container where there is one, else of the host; free disk.

What counts as used is what cannot be given back at once: the kernel drops inactive file cache before it kills anything, so
it is taken off (`memory.current − inactive_file`, the kernel's cgroup-v2 and cgroup-v1 memory documents).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ncr_upload.application.ports import Memory
from ncr_upload.domain.errors import Unavailable


@dataclass(frozen=True, slots=True)
class _Flavour:
    """Where one version of cgroups keeps its figures."""

    source: str
    mount: str
    limit: str
    usage: str
    cache: str


CGROUP2 = _Flavour("cgroup2", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
CGROUP1 = _Flavour("cgroup1", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


class MachineHost:
    """`Host` on this machine. `root` is where `/proc` and `/sys` are found."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def memory(self) -> Memory:
        """See `Host.memory`. Of nested groups with a limit, the one closest to it counts."""
        host = psutil.virtual_memory()
        for flavour, group in ((CGROUP2, self._group("")), (CGROUP1, self._group("memory"))):
            limited = self._limited(flavour, group, host.total) if group is not None else []
            if limited:
                return max(limited, key=lambda memory: memory.used_percent)
        return Memory(used=host.total - host.available, total=host.total, source="host")

    def process_memory(self, *, children: bool = False) -> int:
        """See `Host.process_memory`."""
        own = psutil.Process(os.getpid())
        return sum(_resident(each) for each in (own, *(own.children(recursive=True) if children else ())))

    def free_disk(self, path: Path) -> int:
        """See `Host.free_disk`. A folder that is yet to be made counts as its nearest parent."""
        return int(self._disk(path).free)

    def total_disk(self, path: Path) -> int:
        """See `Host.total_disk`."""
        return int(self._disk(path).total)

    def _disk(self, path: Path) -> Any:
        place = path.absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        try:
            return psutil.disk_usage(str(place))
        except OSError as error:
            raise Unavailable(
                "disk_unreadable",
                f"the free space of {place} cannot be read: {error.strerror}",
                "Check WORK_DIR and that this user may read it.",
            ) from error

    def _group(self, controller: str) -> Path | None:
        """This process's group for the controller, relative to the mount; the unified hierarchy for ''."""
        try:
            lines = (self._root / "proc/self/cgroup").read_text().splitlines()
        except OSError:
            return None
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                return Path(*(part for part in path.split("/") if part not in ("", "..")))
        return None

    def _limited(self, flavour: _Flavour, group: Path, host_total: int) -> list[Memory]:
        """Memory of this process's group and those around it, of each that has a limit.

        Inside a container the mount often starts at the container's own group while the path is the host's, so folders
        of the path that are not there are passed over.
        """
        mount = self._root / flavour.mount
        folders = [mount / group, *(mount / parent for parent in group.parents)]
        found = (_read(flavour, folder, host_total) for folder in dict.fromkeys(folders))
        return [memory for memory in found if memory is not None]


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _read(flavour: _Flavour, folder: Path, host_total: int) -> Memory | None:
    """None where there is no limit: 'max', one above what the machine has (cgroup1's "none" is near 2**63), or no files."""
    try:
        limit = (folder / flavour.limit).read_text().strip()
        used = int((folder / flavour.usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not limit.isdecimal() or not 0 < int(limit) <= host_total:
        return None
    return Memory(used=max(0, used - int(stat.get(flavour.cache, 0))), total=int(limit), source=flavour.source)
