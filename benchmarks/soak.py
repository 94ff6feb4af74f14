"""Five hundred small jobs in batches through the whole embedded stack, while the memory of API and worker comes and goes.

API and worker share a real memory group of the kernel; a process in it takes enough memory to be over
MAX_MEMORY_USAGE_PERCENT and gives it back, over and over, until all jobs have ended. The caller waits out each 503 as told.
Every job must end `completed`, and nothing may be left in the work folder, in staging or in Redis.

    python benchmarks/soak.py --jobs 500 --out soak.json        (root, for the memory group; else --steady: no pressure)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
from redis import Redis
from sqlalchemy import Engine, text

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parents[1] / "tests")]

from cgroups import MB, MemoryGroup, memory_group
from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.entrypoints.embedded.product import Product, make_product
from ncr_upload.entrypoints.embedded.samples import place_product
from ncr_upload.entrypoints.embedded.studio import Listed, add_job
from running_stack import RunningStack, start_stack, stop_stack

GROUP = 3000 * MB
BALLOON = 2550 * MB
SETTINGS = {
    "MAX_MEMORY_USAGE_PERCENT": "80",
    "MEMORY_CHECK_INTERVAL": "2",
    "BATCH_SIZE": "5",
    "JOB_EXPIRE_HOURS": "0.002",
    "LOG_LEVEL": "WARNING",
}
HOUR = 3600


@dataclass
class Watch:
    """Peak RSS of every process of the stack, by what it is, and how much was over the limit."""

    pids: dict[str, int]
    peaks: dict[str, int] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    _known: dict[int, str] = field(default_factory=dict)

    def look(self, root: psutil.Process) -> None:
        names = {pid: name for name, pid in self.pids.items()} | {root.pid: "ncr dev"}
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                name = names.get(process.pid) or f"child of {names.get(process.ppid(), process.name())}"
                if process.pid not in self._known:
                    self.seen[name] += 1
                name = self._known.setdefault(process.pid, name)
                self.peaks[name] = max(self.peaks.get(name, 0), process.memory_info().rss)


@contextmanager
def repeated(seconds: float, call: Any) -> Iterator[None]:
    """Call it again and again from a thread."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(seconds):
            with suppress(psutil.Error):
                call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def flickering(group: MemoryGroup, on_seconds: float, off_seconds: float) -> Iterator[Counter[str]]:
    """The group is over its limit for `on_seconds`, then not for `off_seconds`, and so on."""
    done, told = threading.Event(), Counter[str]()

    def run() -> None:
        while not done.wait(off_seconds):
            with group.holding(BALLOON):
                told["times"] += 1
                done.wait(on_seconds)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield told
    finally:
        done.set()
        thread.join()


def small_product() -> Product:
    product = make_product("studio/SOAK-1", "SOAK-1", seed=11)
    key = product.main_model
    return replace(product, files={key: product.files[key]}, targets={key: product.targets[key]})


def send(client: httpx.Client, job_ids: list[str], told: Counter[str]) -> str:
    """The batch's id; a 503 is waited out as it says."""
    body = [{"job_id": job_id, "username": "soak", "campaign": "soak"} for job_id in job_ids]
    while True:
        answer = client.post("/process-batch", json=body)
        if answer.status_code == 202:
            return str(answer.json()["batch_id"])
        assert answer.status_code == 503, answer.text
        told["refused_503"] += 1
        time.sleep(float(answer.headers["Retry-After"]))


def wait_for_end(engine: Engine, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        counts = read_counts(engine)
        print("  " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items())), flush=True)
        if not {"pending", "processing", "validation_passed", "uploading"} & set(counts):
            return
        time.sleep(10)


def read_counts(engine: Engine) -> dict[str, int]:
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT status, COUNT(*) FROM ncr_jobs GROUP BY status")).all()
    return {str(status): int(count) for status, count in rows}


def read_history(engine: Engine) -> dict[str, int]:
    """How often jobs were deferred for memory, how many of them, and what was delivered or tried twice."""
    queries = {
        "deferrals": "SELECT COUNT(*) FROM ncr_events WHERE message LIKE '%waiting for memory%'",
        "jobs_deferred": "SELECT COUNT(DISTINCT task_id) FROM ncr_events WHERE message LIKE '%waiting for memory%'",
        "attempts_above_one": "SELECT COUNT(*) FROM ncr_jobs WHERE attempt > 1",
        "delivered_twice": "SELECT COUNT(*) FROM job_details WHERE upload_count > 1 AND campaign = 'soak'",
    }
    with engine.connect() as connection:
        return {name: int(connection.execute(text(query)).scalar_one()) for name, query in queries.items()}


def find_leftovers(stack: RunningStack) -> dict[str, int]:
    """What is still there; waited for, since the last cleaning and the fading of the last status take seconds."""

    def look() -> dict[str, int]:
        with Redis.from_url(stack.endpoints["redis"]["url"]) as client:
            keys = [key.decode() for key in client.scan_iter() if not key.startswith(b"_kombu.binding")]
        work, staging = stack.state_dir / "work", Path(stack.endpoints["sftp"]["root"]) / ".ncr-staging"
        left = {"redis_keys": len(keys), **dict.fromkeys(keys[:20], 1)}
        for name, folder in (("work_dir", work), ("staging", staging)):
            left[name] = sum(1 for path in folder.iterdir() if not path.name.startswith(".")) if folder.exists() else 0
        return left

    deadline = time.monotonic() + 120
    while any((left := look()).values()) and time.monotonic() < deadline:
        time.sleep(2)
    return left


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    with ExitStack() as running:
        stack = start_stack(folder / "stack", environment=SETTINGS)
        running.callback(stop_stack, stack)
        endpoints = stack.endpoints
        engine = open_engine(endpoints["database"]["url"], pool_size=2)
        running.callback(engine.dispose)
        product = small_product()
        place_product(endpoints["s3"], engine, "soak-0", product, campaign="soak")
        for number in range(1, options.jobs):
            list_again(engine, f"soak-{number}", product)
        watch, told = Watch(endpoints["pids"]), Counter[str]()
        root = psutil.Process(stack.process.pid)
        running.enter_context(repeated(0.5, lambda: watch.look(root)))
        pressure = Counter[str]()
        if not options.steady:
            group = running.enter_context(memory_group(GROUP))
            for name in ("api", "worker"):
                main = psutil.Process(endpoints["pids"][name])
                for each in (main, *main.children(recursive=True)):
                    group.add(each.pid)
            pressed = ExitStack()
            pressure = pressed.enter_context(flickering(group, options.on, options.off))
            running.push(pressed)
        began = time.monotonic()
        client = running.enter_context(stack.client())
        job_ids = [f"soak-{number}" for number in range(options.jobs)]
        batches = []
        for start in range(0, options.jobs, options.batch):
            batches.append(send(client, job_ids[start : start + options.batch], told))
            time.sleep(options.pause)
        wait_for_end(engine, options.limit)
        seconds = time.monotonic() - began
        if not options.steady:
            pressed.close()
        statuses = Counter(client.get(f"/batch-status/{batch_id}?limit=1").json()["status"] for batch_id in batches)
        return {
            "jobs": options.jobs,
            "batches": dict(statuses),
            "seconds": round(seconds, 1),
            "load": os.getloadavg()[0],
            "memory_group": None if options.steady else group.source,
            "over_the_limit_times": pressure["times"],
            "refused_503": told["refused_503"],
            "statuses": read_counts(engine),
            **read_history(engine),
            "peak_rss_mb": {name: round(peak / MB, 1) for name, peak in sorted(watch.peaks.items())},
            "processes": dict(sorted(watch.seen.items())),
            "left": find_leftovers(stack),
        }


def list_again(engine: Engine, job_id: str, product: Product) -> None:
    """Another job with the same files, which are in storage already."""
    now = datetime.now(UTC).replace(tzinfo=None, microsecond=0)
    add_job(engine, job_id, product.sku, [Listed(key, now) for key in product.files], campaign="soak")


def tell(found: dict[str, Any]) -> None:
    print(f"\n{found['jobs']} jobs in {found['seconds']} s: {found['statuses']}; batches: {found['batches']}")
    print(f"memory over the limit {found['over_the_limit_times']} times ({found['memory_group'] or 'no pressure'})")
    print(f"batches refused for now: {found['refused_503']} times; jobs that waited for memory: {found['jobs_deferred']}")
    print(f"({found['deferrals']} times); jobs that needed a second attempt: {found['attempts_above_one']}")
    for name, peak in found["peak_rss_mb"].items():
        print(f"  {name:24} {peak:8.1f} MB at most, of {found['processes'][name]} process(es)")
    print(f"left behind: {found['left']}")


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--jobs", type=int, default=500)
    asked.add_argument("--batch", type=int, default=50, help="jobs in a batch")
    asked.add_argument("--pause", type=float, default=4, help="seconds between two batches, so that some meet a full memory")
    asked.add_argument("--on", type=float, default=10, help="seconds over the limit")
    asked.add_argument("--off", type=float, default=15, help="seconds below it")
    asked.add_argument("--limit", type=float, default=HOUR, help="seconds until it is given up")
    asked.add_argument("--steady", action="store_true", help="no memory pressure")
    asked.add_argument("--out", type=Path)
    options = asked.parse_args()
    with tempfile.TemporaryDirectory(prefix="ncr-soak-") as folder:
        found = soak(options, Path(folder))
    tell(found)
    if options.out:
        options.out.write_text(json.dumps(found, indent=2))
    good = found["statuses"] == {"completed": options.jobs} and not found["delivered_twice"] and not any(found["left"].values())
    return int(not good)


if __name__ == "__main__":
    raise SystemExit(main())
