"""Memory is read where its limit is: the container's group, old or new, else the host."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ncr_upload.adapters.host import MachineHost
from ncr_upload.application.ports import Memory

MB = 1024 * 1024
V1_NO_LIMIT = 9223372036854771712
"""What cgroup1 says for "none": the largest page-aligned 64-bit number."""


def write(root: Path, files: dict[str, object]) -> MachineHost:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return MachineHost(root)


def v2(folder: str, limit: object, used: int, cache: int = 0) -> dict[str, object]:
    place = f"sys/fs/cgroup{folder}"
    stat = f"anon 1\ninactive_file {cache}\nactive_file 5"
    return {f"{place}/memory.max": limit, f"{place}/memory.current": used, f"{place}/memory.stat": stat}


def v1(folder: str, limit: object, used: int, cache: int = 0) -> dict[str, object]:
    place = f"sys/fs/cgroup/memory{folder}"
    stat = f"inactive_file 1\ntotal_inactive_file {cache}"
    return {f"{place}/memory.limit_in_bytes": limit, f"{place}/memory.usage_in_bytes": used, f"{place}/memory.stat": stat}


def test_a_container_is_measured_by_its_group_without_the_cache_that_can_go(tmp_path: Path) -> None:
    host = write(tmp_path, {"proc/self/cgroup": "0::/", **v2("", 512 * MB, 400 * MB, cache=100 * MB)})
    assert host.memory() == Memory(300 * MB, 512 * MB, "cgroup2")


def test_a_nested_group_is_found_by_the_process_own_path(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/system.slice/ncr.service", **v2("/system.slice/ncr.service", 256 * MB, 64 * MB)}
    assert write(tmp_path, files).memory() == Memory(64 * MB, 256 * MB, "cgroup2")


def test_a_limit_on_an_outer_group_counts_when_the_inner_one_has_none(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a/b", **v2("/a/b", "max", 10 * MB), **v2("/a", 100 * MB, 90 * MB)}
    assert write(tmp_path, files).memory() == Memory(90 * MB, 100 * MB, "cgroup2")


def test_of_two_limits_the_closest_to_being_hit_counts(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a/b", **v2("/a/b", 200 * MB, 20 * MB), **v2("/a", 100 * MB, 90 * MB)}
    assert write(tmp_path, files).memory() == Memory(90 * MB, 100 * MB, "cgroup2")


def test_a_path_of_the_host_seen_from_inside_the_container_is_passed_over(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "4:memory:/docker/0123\n0::/", **v1("", 512 * MB, 128 * MB)}
    assert write(tmp_path, files).memory() == Memory(128 * MB, 512 * MB, "cgroup1")


def test_the_old_kind_of_group_is_read_too(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "9:cpu,cpuacct:/x\n4:memory:/jobs", **v1("/jobs", 512 * MB, 400 * MB, cache=100 * MB)}
    assert write(tmp_path, files).memory() == Memory(300 * MB, 512 * MB, "cgroup1")


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/", **v2("", "max", 400 * MB)},
        {"proc/self/cgroup": "4:memory:/", **v1("", V1_NO_LIMIT, 400 * MB)},
        {"proc/self/cgroup": "0::/", **v2("", "nonsense", 400 * MB)},
        {"proc/self/cgroup": "0::/../../etc"},
    ],
)
def test_without_a_limit_the_host_is_measured(tmp_path: Path, files: dict[str, object]) -> None:
    memory = write(tmp_path, files).memory()
    assert (memory.source, memory.total) == ("host", psutil.virtual_memory().total)
    kernel = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    unavailable = memory.total - int(kernel["MemAvailable"].split()[0]) * 1024
    assert memory.used == pytest.approx(unavailable, abs=0.1 * memory.total), "other processes allocate meanwhile"


def test_the_memory_of_a_process_is_what_the_kernel_holds_resident_for_it() -> None:
    host = MachineHost()
    before, block = host.process_memory(), bytearray(b"x") * (64 * MB)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert host.process_memory() == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), abs=16 * MB)
    assert host.process_memory() - before > len(block) / 2


def test_the_memory_with_children_counts_each_child() -> None:
    host = MachineHost()
    program = f"block = bytearray(b'x') * {64 * MB}; print('ready', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        alone, together = host.process_memory(), host.process_memory(children=True)
        child.communicate(b"\n")
    assert together - alone > 64 * MB


def test_the_disk_of_a_folder_that_is_not_made_yet_is_that_of_its_nearest_parent(tmp_path: Path) -> None:
    host, disk = MachineHost(), shutil.disk_usage(tmp_path)
    place = tmp_path / "not" / "made" / "yet"
    assert host.total_disk(place) == disk.total
    assert host.free_disk(place) == pytest.approx(disk.free, abs=max(512 * MB, 0.05 * disk.total))
    assert host.free_disk(Path("/dev/shm/not/made")) == pytest.approx(shutil.disk_usage("/dev/shm").free, abs=64 * MB)
