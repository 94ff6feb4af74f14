"""A package delivered again with one texture of 36 changed, beside its full delivery."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from datasets import CHANGED, PACKAGE
from deliveries import take_turns, walls
from fault_proxy import fault_proxy
from figures import Figure, compare
from place import MB, Cost, Place, know_hashes


def measure(place: Place, rounds: int) -> Iterator[Figure]:
    """A proxy that does nothing but count stands before the SFTP server: all that was sent there, SSH's own bytes too. The full
    delivery begins with an empty cache of downloads, the other with what it has left there."""
    know_hashes(place, PACKAGE, CHANGED)
    with fault_proxy(("127.0.0.1", place.sftp.login.port), own_process=True) as counter:
        worker = place.worker(replace(place.loopback, name="counted", sftp_port=counter.port))
        sent: list[int] = []
        number = 0

        def full() -> Cost:
            nonlocal number
            number += 1
            return worker.deliver(PACKAGE, job_id=f"again-{number}", keep=True)

        def again() -> Cost:
            before = counter.count()["up"]
            cost = worker.deliver(CHANGED, job_id=f"again-{number}", cached=True)
            sent.append(counter.count()["up"] - before)
            return cost

        fulls, agains = [], []
        for _ in range(min(rounds, 5)):
            fulls += walls(take_turns(1, {"full": full})["full"])
            agains += walls(take_turns(1, {"again": again})["again"])
    changed_bytes = next(size for key, size in CHANGED.files if key not in PACKAGE.keys)
    sent_mb, changed_mb = [count / MB for count in sent], [changed_bytes / MB] * len(sent)
    yield compare("redelivery.bytes", "the changed file's size", sent_mb, changed_mb)
    yield compare("redelivery.wall", "our own full delivery", agains, fulls)
