"""Every figure beside its peer's, side by side in one run: results.json, and the charts and the table of docs/performance.md.

    python benchmarks/run.py                     all groups (`make bench`)
    python benchmarks/run.py --only package      one (`make bench ONLY=package`); `--only wan`: all that begin so

Where a round takes long, fewer than `--rounds` are made: each figure says how many (`runs`).
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parents[1] / "tests")]

import psutil

import api_rates
import charts
import deliveries
import growth_figures
import limit
import memory
import overhead
import peers
import redelivery
import uploads
from figures import RESULTS, Figure, merge_results, say
from place import Place, open_place

Group = Callable[[Place, int], Iterable[Figure]]
GROUPS: dict[str, Group] = {
    "package": deliveries.measure_package,
    "many_small": deliveries.measure_many_small,
    "one_huge": deliveries.measure_one_huge,
    "upload.cpu": uploads.measure_cpu,
    "redelivery": redelivery.measure,
    "memory": memory.measure,
    "api": api_rates.measure,
    "overhead": overhead.measure,
    "growth": growth_figures.measure,
    "limit": limit.measure,
    "wan.package": deliveries.measure_wan_package,
    "wan.many_small": deliveries.measure_wan_many_small,
    "wan.one_huge": deliveries.measure_wan_one_huge,
    "upload.wan": uploads.measure_wan,
}
WAITING = ("wan.package", "wan.many_small", "wan.one_huge", "upload.wan")
"""Measured at the same time, each side over a WAN of its own: all that they use of the machine is a part of it."""


_writing = threading.Lock()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "rclone": peers.rclone_version(),
        "openssh": peers.openssh_version(),
    }


def chosen(only: str | None) -> list[str]:
    """The groups to be measured. Raises `SystemExit` for a name that is none."""
    names = [name for name in GROUPS if only is None or name == only or name.startswith(f"{only}.")]
    if not names:
        raise SystemExit(f"no group is called '{only}'; there are {', '.join(GROUPS)}")
    return names


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--only", metavar="GROUP")
    asked.add_argument("--rounds", type=int, default=5, help="how often each pair is measured where a round is short (5)")
    asked.add_argument("--results", type=Path, default=RESULTS, help="written after each group; others' figures stay in it")
    options = asked.parse_args()
    names = chosen(options.only or None)
    began = time.monotonic()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="ncr-bench-") as folder, open_place(Path(folder)) as place:
        for name in (name for name in names if name not in WAITING):
            figures += measure(name, place, options.rounds, options.results)
        with ThreadPoolExecutor(len(WAITING)) as threads:
            waiting = [name for name in names if name in WAITING]
            for found in threads.map(lambda name: measure(name, place, options.rounds, options.results), waiting):
                figures += found
    if options.results == RESULTS:
        charts.draw()
    print(f"\n{time.monotonic() - began:.0f} s in all")
    for figure in figures:
        print(say(figure))
    return 0


def measure(name: str, place: Place, rounds: int, results: Path) -> list[Figure]:
    """One group, written to `results` as soon as it is whole."""
    load, began = os.getloadavg()[0], time.monotonic()
    print(f"\n{name}", flush=True)
    found = []
    for figure in GROUPS[name](place, rounds):
        print(f"  {say(figure)}", flush=True)
        found.append(figure)
    told = {"at": deliveries.now(), "seconds": round(time.monotonic() - began, 1), "load_before": round(load, 1)}
    with _writing:
        merge_results(found, machine(), name, told, results)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
