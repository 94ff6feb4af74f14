"""The peak memory of a worker's child, for jobs of 15 MB to 5 GiB."""

from __future__ import annotations

import os
from collections.abc import Iterator

from datasets import FIVE_GIB, MANY_SMALL, ONE_HUGE, PACKAGE
from figures import Figure, compare
from place import MB, Place, know_hashes, peak_bytes, warm_worker

PROMISED_MB = 150


def measure(place: Place, _rounds: int) -> Iterator[Figure]:
    """Each job in a child of its own, that has delivered two small jobs before; once each, since a peak does not vary as time
    does."""
    peaks_mb = []
    for number, data in enumerate((MANY_SMALL, PACKAGE, ONE_HUGE, FIVE_GIB)):
        know_hashes(place, data)
        with warm_worker(place, place.loopback, 10 + number, {}) as worker:
            before = peak_bytes(worker.child()) / MB
            cost = worker.deliver(data)
            peaks_mb.append(peak_bytes(worker.child()) / MB)
        print(
            f"    {data.name:12} {data.bytes / MB:7.0f} MB: {before:.0f} MB before, {peaks_mb[-1]:.0f} MB at most, "
            f"{cost.wall_seconds:.1f} s (load {os.getloadavg()[0]:.1f})",
            flush=True,
        )
    yield compare("memory.peak_mb", f"what is promised ({PROMISED_MB} MB)", [max(peaks_mb)], [PROMISED_MB])
    yield compare("memory.growth", "the smallest job's", [max(peaks_mb)], [min(peaks_mb)])
