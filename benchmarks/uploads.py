"""Only the way to the destination: our SFTP adapter beside OpenSSH's `sftp` and rclone, the same files from this disk.

python benchmarks/uploads.py     (as the benchmark runs it) reads the settings and the package as JSON from standard input,
                                 stages and publishes it as a job does, and prints what that took without the imports
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parents[1] / "tests")]

import peers
from datasets import PACKAGE, DataSet, place_data
from deliveries import at_once, cpus, take_turns, walls
from figures import Figure, compare
from ncr_upload.application.arrivals import Arrival
from ncr_upload.application.ports import LocalFile
from ncr_upload.domain.packages import PackageFile
from ncr_upload.entrypoints.bootstrap.deliveries import make_dropoff
from ncr_upload.entrypoints.settings import Settings
from place import BUCKET, Cost, Place, Route, worker_settings

_names = itertools.count(1)


def measure_wan(place: Place, rounds: int) -> Iterator[Figure]:
    sides = {name: place.wan(f"upload, {name}") for name in ("ours", "openssh", "rclone")}
    runs = at_once("upload", rounds, _sides(place, **sides))
    yield compare("upload.wan.openssh", peers.openssh_name(), walls(runs["ours"]), walls(runs["openssh"]))
    yield compare("upload.wan.rclone", peers.rclone_name(), walls(runs["ours"]), walls(runs["rclone"]))


def measure_cpu(place: Place, rounds: int) -> Iterator[Figure]:
    near = place.loopback
    runs = take_turns(rounds, _sides(place, ours=near, openssh=near, rclone=near))
    yield compare("upload.cpu.openssh", peers.openssh_name(), cpus(runs["ours"]), cpus(runs["openssh"]))


def _sides(place: Place, ours: Route, openssh: Route, rclone: Route) -> dict[str, Callable[[], Cost]]:
    """Each by its route."""
    data, folder = PACKAGE, place_data() / BUCKET / PACKAGE.sku
    return {
        "ours": lambda: our_upload(place, ours, data),
        "openssh": lambda: peers.openssh_upload(place, openssh, data, folder),
        "rclone": lambda: peers.rclone_upload(place, rclone, data, folder),
    }


def our_upload(place: Place, route: Route, data: DataSet) -> Cost:
    """In a process of its own, as the peers are."""
    name = f"upload-{next(_names)}"
    told = {
        "settings": worker_settings(place, route, place.folder, 0),
        "root": str(place_data() / BUCKET),
        "keys": data.keys,
        "name": name,
    }
    cost = peers.run_reporting(Path(__file__), told)
    place.check(name, data)
    place.clear(name)
    return cost


def _local_file(root: Path, key: str) -> LocalFile:
    """With its hash, which a job knows from the download."""
    path, sha256, crc32 = root / key, hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(1024 * 1024):
            sha256.update(chunk)
            crc32 = zlib.crc32(chunk, crc32)
    return LocalFile(PackageFile(key, key, path.stat().st_size, sha256.hexdigest(), crc32, ""), path)


async def _arrived(files: list[LocalFile]) -> AsyncIterator[Arrival]:
    for file in files:
        yield Arrival.of(file)


async def _deliver(settings: Settings, files: list[LocalFile], name: str) -> None:
    async with make_dropoff(settings).session() as destination:
        await destination.adopt(name, 1)
        await destination.stage(name, 1, _arrived(files), lambda _count: None)
        await destination.publish(name, 1, name, lambda: None)
        await destination.discard(name)


def main() -> None:
    told: dict[str, Any] = json.load(sys.stdin)
    settings = Settings(_env_file=None, **{name.lower(): value for name, value in told["settings"].items()})
    files = [_local_file(Path(told["root"]), key) for key in told["keys"]]
    began, used = time.perf_counter(), time.process_time()
    asyncio.run(_deliver(settings, files, told["name"]))
    print(json.dumps({"wall_seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}))


if __name__ == "__main__":
    main()
