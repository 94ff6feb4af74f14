"""Where the time of one delivery goes.

    python benchmarks/profiling.py package     (`make profile`, `make profile DATA=one_huge`, `DATA=redelivery`)

One job runs through the worker's own code in this process, warmed up by one before, while a thread looks every few milliseconds
at what each other thread does. Told are: how long each stage took (from the job's history), how much CPU time each process
took, and in which functions the worker's threads were when they did not wait. The looking costs some percent itself.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parents[1] / "tests")]

import psutil

from datasets import CHANGED, DATA_SETS, PACKAGE, TINY, DataSet
from ncr_upload.application.attempts import run_task
from ncr_upload.entrypoints.bootstrap.deliveries import make_worker_options, make_worker_ports
from place import Place, WarmWorker, know_hashes, open_place

LOOK_SECONDS = 0.004
WAITING = {
    ("selectors.py", "select"),
    ("threading.py", "wait"),
    ("queue.py", "get"),
    ("thread.py", "_worker"),
    ("_base.py", "result"),
}
"""Functions in which a thread waits for others."""
SHOWN = 25
REDELIVERY = "redelivery"
OURS = f"{os.sep}ncr_upload{os.sep}"


@dataclass
class Looks:
    """How often each thread was seen running, and where."""

    count: int = 0
    threads: Counter[str] = field(default_factory=Counter)
    inner: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By thread and innermost function."""
    within: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By thread and function of ours that it was called from, at whatever depth."""

    def note(self, thread: str, frame: FrameType) -> None:
        if _key(frame) in WAITING:
            return
        self.threads[thread] += 1
        self.inner[thread, _name(frame)] += 1
        seen: set[str] = set()
        at: FrameType | None = frame
        while at is not None:
            if OURS in at.f_code.co_filename:
                seen.add(_name(at))
            at = at.f_back
        for name in seen:
            self.within[thread, name] += 1


def _key(frame: FrameType) -> tuple[str, str]:
    return Path(frame.f_code.co_filename).name, frame.f_code.co_name


def _name(frame: FrameType) -> str:
    place = Path(frame.f_code.co_filename)
    return f"{place.parent.name}/{place.name}:{frame.f_code.co_name}"


def _kind(thread: str) -> str:
    """A thread's name without what tells it from others of its kind."""
    return re.sub(r"[-_](\d+|[0-9a-f-]{36})$", "", thread)


@contextmanager
def looking() -> Iterator[Looks]:
    looks, ended = Looks(), threading.Event()
    lasting = ("MainThread", "receive", "validator", "records")  # of the threads that are there before, those that do the job
    bystanders = {thread.ident for thread in threading.enumerate() if not thread.name.startswith(lasting)}

    def look() -> None:
        while not ended.wait(LOOK_SECONDS):
            looks.count += 1
            names = {thread.ident: _kind(thread.name) for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                if ident not in bystanders:
                    looks.note(names.get(ident, "others"), frame)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    bystanders.add(thread.ident)
    try:
        yield looks
    finally:
        ended.set()
        thread.join()


# --- CPU time by process ----------------------------------------------------------------------------------------


def _all_parts() -> dict[int, tuple[str, float]]:
    """The CPU time so far of each process that takes part, this one included."""
    found = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            command, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:
            continue
        name = _part_name(process.pid, command)
        found[process.pid] = (
            name,
            times.user + times.system + (times.children_user + times.children_system if "sshd" in name else 0),
        )
    return found


def _part_name(pid: int, command: str) -> str:
    if pid == os.getpid():
        return "worker (this process)"
    known = {"serve s3": "S3 server", "sshd": "sshd", "sink.py": "validator (sink)", "valkey": "Redis"}
    return next((name for text, name in known.items() if text in command), "others")


def _used(before: dict[int, tuple[str, float]], after: dict[int, tuple[str, float]]) -> Counter[str]:
    used: Counter[str] = Counter()
    for pid, (name, seconds) in after.items():
        used[name] += seconds - before.get(pid, (name, 0.0))[1]  # type: ignore[assignment]
    return used


# --- one job ----------------------------------------------------------------------------------------------------


def profile(place: Place, data: DataSet, name: str) -> None:
    """One after another like it, from an empty cache of downloads; `REDELIVERY` with what the one before has left there."""
    first, again = (PACKAGE, True) if name == REDELIVERY else (data, False)
    know_hashes(place, first, data, TINY)
    worker = place.worker(place.loopback)
    ports, options = make_worker_ports(worker.settings), make_worker_options(worker.settings, "profile")
    for warming in (TINY, first):
        task = worker.submit(f"profiled-{warming.name}", warming)
        run_task(task.task_id, ports, options)
    if not again:
        worker.empty_cache()
        place.clear(f"profiled-{data.name}")
    task = worker.submit(f"profiled-{data.name}", data)
    before, began = _all_parts(), time.time()
    with looking() as looks:
        run_task(task.task_id, ports, options)
    wall, used = time.time() - began, _used(before, _all_parts())
    place.check(f"profiled-{data.name}", data)
    print(f"\n{name}: {len(data.files)} files, {data.bytes / 1e6:.0f} MB in {wall:.2f} s (load {os.getloadavg()[0]:.1f})")
    tell_stages(worker, task.task_id, began)
    tell_processes(used)
    tell_looks(looks)


def tell_stages(worker: WarmWorker, task_id: str, began: float) -> None:
    print("\nStages, from the history: when each began")
    events = [event for event in worker.submissions.history(task_id) if event.at >= began - 0.01]
    for event, following in zip(events, [*events[1:], None], strict=True):
        took = f"{following.at - event.at:8.3f} s" if following else " " * 10
        print(f"  {event.at - began:8.3f} s  {took}  {event.stage:10} {event.message[:90]}")


def tell_processes(used: Counter[str]) -> None:
    total, cores = sum(used.values()), os.cpu_count() or 1
    print(f"\nCPU seconds by process: {total:.2f} in all, so {total / cores:.2f} s at the least on {cores} cores")
    for name, seconds in used.most_common():
        print(f"  {seconds:8.2f}  {name}")


def tell_looks(looks: Looks) -> None:
    print(f"\nThe worker's threads: share of {looks.count} looks in which each was not waiting")
    for thread, count in looks.threads.most_common():
        print(f"  {count / looks.count:7.1%}  {thread}")
    for title, counted in (("innermost function", looks.inner), ("function of ours, with all it calls", looks.within)):
        print(f"\nBy {title}")
        for (thread, name), count in counted.most_common(SHOWN):
            print(f"  {count / looks.count:7.1%}  {thread:14} {name}")


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    by_name = {data.name: data for data in DATA_SETS if data is not CHANGED} | {REDELIVERY: CHANGED}
    asked.add_argument("data", nargs="?", default="package", choices=by_name)
    options = asked.parse_args()
    with tempfile.TemporaryDirectory(prefix="ncr-profile-") as folder, open_place(Path(folder)) as place:
        profile(place, by_name[options.data], options.data)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
