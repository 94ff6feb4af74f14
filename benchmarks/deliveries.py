"""Whole jobs beside rclone's bare copy and the baseline's job, over loopback and over the emulated WAN."""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import peers
from datasets import MANY_SMALL, ONE_HUGE, PACKAGE, DataSet
from figures import Figure, compare
from ncr_upload.entrypoints.settings import Settings
from place import MB, Cost, Place, Route, know_hashes, s3_client

Runs = dict[str, list[Cost]]


def take_turns(rounds: int, sides: Mapping[str, Callable[[], Cost]]) -> Runs:
    """Each side once a round, each first in turn, so that what else the machine does meets all alike."""
    names, found = list(sides), {name: list[Cost]() for name in sides}
    for turn in range(rounds):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            os.sync()
            cost = sides[name]()
            found[name].append(cost)
            print(
                f"    {name:12} {cost.wall_seconds:8.2f} s  {cost.cpu_seconds:8.2f} CPU s   (load {os.getloadavg()[0]:.1f})",
                flush=True,
            )
    return found


def walls(costs: list[Cost]) -> list[float]:
    return [cost.wall_seconds for cost in costs]


def cpus(costs: list[Cost]) -> list[float]:
    return [cost.cpu_seconds for cost in costs]


# --- loopback ---------------------------------------------------------------------------------------------------


def measure_package(place: Place, rounds: int) -> Iterator[Figure]:
    return _on_loopback(place, PACKAGE, rounds, baseline_rounds=2)


def measure_many_small(place: Place, rounds: int) -> Iterator[Figure]:
    return _on_loopback(place, MANY_SMALL, rounds, baseline_rounds=2)


def measure_one_huge(place: Place, rounds: int) -> Iterator[Figure]:
    """A round takes a quarter of a minute, with the baseline a whole one."""
    return _on_loopback(place, ONE_HUGE, min(rounds, 3), baseline_rounds=1)


def _on_loopback(place: Place, data: DataSet, rounds: int, baseline_rounds: int) -> Iterator[Figure]:
    know_hashes(place, data)
    route, worker = place.loopback, place.worker(place.loopback)
    worker.deliver(data)  # warms up caches, for both
    runs = take_turns(rounds, {"ours": lambda: worker.deliver(data), "rclone": lambda: peers.rclone_copy(place, route, data)})
    print(f"    ours by stage: {worker.stages()}", flush=True)
    peer = peers.rclone_name()
    yield compare(f"{data.name}.wall.rclone", peer, walls(runs["ours"]), walls(runs["rclone"]))
    yield compare(f"{data.name}.cpu.rclone", peer, cpus(runs["ours"]), cpus(runs["rclone"]))
    runs = take_turns(
        min(rounds, baseline_rounds),
        {"ours": lambda: worker.deliver(data), "baseline": lambda: peers.baseline(place, route, data)},
    )
    yield compare(
        f"{data.name}.wall.baseline", "boto3, zipfile, requests, paramiko", walls(runs["ours"]), walls(runs["baseline"])
    )


# --- the emulated WAN -------------------------------------------------------------------------------------------


def measure_wan_package(place: Place, rounds: int) -> Iterator[Figure]:
    return _over_wan(place, PACKAGE, min(rounds, 3))


def measure_wan_many_small(place: Place, rounds: int) -> Iterator[Figure]:
    return _over_wan(place, MANY_SMALL, min(rounds, 2))


def measure_wan_one_huge(place: Place, _rounds: int) -> Iterator[Figure]:
    """A round takes two to three minutes."""
    return _over_wan(place, ONE_HUGE, 1)


def _over_wan(place: Place, data: DataSet, rounds: int) -> Iterator[Figure]:
    know_hashes(place, data, PACKAGE)
    route = place.wan()
    tell_wan(place, route)
    strict = place.worker(route)
    sides = {"strict": lambda: strict.deliver(data), "rclone": lambda: peers.rclone_copy(place, route, data)}
    if "stage_before_verdict" in Settings.model_fields:
        overlapped = place.worker(route, STAGE_BEFORE_VERDICT="true")
        sides["overlapped"] = lambda: overlapped.deliver(data)
    else:
        print("    overlapped: not measured, this version cannot stage before the verdict", flush=True)
    runs = take_turns(rounds, sides)
    print(f"    strict by stage: {strict.stages()}", flush=True)
    for way in ("strict", "overlapped"):
        if way in runs:
            peer = peers.rclone_name()
            yield compare(f"wan.{data.name}.{way}.rclone", peer, walls(runs[way]), walls(runs["rclone"]))


def tell_wan(place: Place, route: Route) -> None:
    """What the emulated WAN really gives now: a machine may be too busy to emulate it."""
    key, size = PACKAGE.files[0]
    url = s3_client(place, route).generate_presigned_url("get_object", Params={"Bucket": place.s3.bucket, "Key": key})

    def fetch(_number: int = 0) -> None:
        with urllib.request.urlopen(url) as answer:
            while answer.read(MB):
                pass

    began = time.perf_counter()
    urllib.request.urlopen(urllib.request.Request(route.validator_url, data=b"x")).close()
    asking_ms = (time.perf_counter() - began) * 1000
    began = time.perf_counter()
    fetch()
    one = size / (time.perf_counter() - began) / MB
    began = time.perf_counter()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(fetch, range(4)))
    four = 4 * size / (time.perf_counter() - began) / MB
    print(f"    the WAN: {asking_ms:.0f} ms to ask, one connection {one:.1f} MB/s, four {four:.1f} MB/s", flush=True)


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
