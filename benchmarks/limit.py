"""How far a whole job is from what this machine can do at all with its bytes."""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Iterator

import peers
from datasets import BUCKET, ONE_FILE, PACKAGE, place_data
from deliveries import take_turns, walls
from figures import Figure, compare
from place import Cost, Place, know_hashes


def measure(place: Place, rounds: int) -> Iterator[Figure]:
    """The larger of: one file of the package's size sent by OpenSSH's `sftp`, and SHA-256 with CRC-32 of as many bytes."""
    know_hashes(place, PACKAGE)
    worker, folder = place.worker(place.loopback), place_data() / BUCKET / ONE_FILE.sku
    sides = {
        "ours": lambda: worker.deliver(PACKAGE),
        "raw sftp": lambda: peers.openssh_upload(place, place.loopback, ONE_FILE, folder),
        "hashes": hash_once,
    }
    runs = take_turns(rounds, sides)
    limit = max(("raw sftp", "hashes"), key=lambda side: sum(walls(runs[side])))
    yield compare("limit.package", f"{limit} of as many bytes", walls(runs["ours"]), walls(runs[limit]))


def hash_once() -> Cost:
    sha256, crc32 = hashlib.sha256(), 0
    began, used = time.perf_counter(), time.process_time()
    for key, _ in ONE_FILE.files:
        with (place_data() / BUCKET / key).open("rb") as file:
            while chunk := file.read(1024 * 1024):
                sha256.update(chunk)
                crc32 = zlib.crc32(chunk, crc32)
    return Cost(time.perf_counter() - began, time.process_time() - used)
