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
from place import MB, Cost, Place, Route, know_hashes, s3_client

Runs = dict[str, list[Cost]]


def take_turns(rounds: int, sides: Mapping[str, Callable[[], Cost]]) -> Runs:
    """Each side once a round, each first in turn, so that what else the machine does meets all alike."""
    names, found = list(sides), {name: list[Cost]() for name in sides}
    for turn in range(rounds):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            os.sync()
            found[name].append(_told(name, sides[name]()))
    return found


def at_once(what: str, rounds: int, sides: Mapping[str, Callable[[], Cost]]) -> Runs:
    """All sides of a round at the same time, where they wait for a WAN of their own far more than for a processor."""
    found = {name: list[Cost]() for name in sides}
    with ThreadPoolExecutor(len(sides)) as threads:
        for _ in range(rounds):
            os.sync()
            running = {name: threads.submit(side) for name, side in sides.items()}
            for name, run in running.items():
                found[name].append(_told(f"{what} {name}", run.result()))
    return found


def _told(name: str, cost: Cost) -> Cost:
    load = os.getloadavg()[0]
    print(f"    {name:24} {cost.wall_seconds:8.2f} s  {cost.cpu_seconds:8.2f} CPU s   (load {load:.1f})", flush=True)
    return cost


def walls(costs: list[Cost]) -> list[float]:
    return [cost.wall_seconds for cost in costs]


def cpus(costs: list[Cost]) -> list[float]:
    return [cost.cpu_seconds for cost in costs]


# --- loopback ---------------------------------------------------------------------------------------------------


def measure_package(place: Place, rounds: int) -> Iterator[Figure]:
    return _on_loopback(place, PACKAGE, rounds, baseline_rounds=3)


def measure_many_small(place: Place, rounds: int) -> Iterator[Figure]:
    return _on_loopback(place, MANY_SMALL, rounds, baseline_rounds=3)


def measure_one_huge(place: Place, rounds: int) -> Iterator[Figure]:
    """The baseline takes three quarters of a minute."""
    return _on_loopback(place, ONE_HUGE, rounds, baseline_rounds=1)


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
    return _over_wan(place, PACKAGE, rounds)


def measure_wan_many_small(place: Place, rounds: int) -> Iterator[Figure]:
    return _over_wan(place, MANY_SMALL, rounds)


def measure_wan_one_huge(place: Place, rounds: int) -> Iterator[Figure]:
    return _over_wan(place, ONE_HUGE, rounds)


def _over_wan(place: Place, data: DataSet, rounds: int) -> Iterator[Figure]:
    know_hashes(place, data, PACKAGE)
    routes = {side: place.wan(f"{data.name}, {side}") for side in ("strict", "overlapped", "rclone")}
    strict = place.worker(routes["strict"])
    overlapped = place.worker(routes["overlapped"], STAGE_BEFORE_VERDICT="true")
    sides = {
        "strict": lambda: strict.deliver(data),
        "overlapped": lambda: overlapped.deliver(data),
        "rclone": lambda: peers.rclone_copy(place, routes["rclone"], data),
    }
    tell_wan(place, routes["rclone"])
    runs = at_once(data.name, rounds, sides)
    print(f"    {data.name} strict by stage: {strict.stages()}", flush=True)
    for way in ("strict", "overlapped"):
        yield compare(f"wan.{data.name}.{way}.rclone", peers.rclone_name(), walls(runs[way]), walls(runs["rclone"]))


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
    print(
        f"    the WAN ({route.name}): {asking_ms:.0f} ms to ask, one connection {one:.1f} MB/s, four {four:.1f} MB/s",
        flush=True,
    )


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
