"""Submit, status, active and sweep on a ledger with 100,000 finished jobs, and on one with 10,000 waiting ones, beside an empty
one. `benchmarks/growth.py --rows 1000000` measures a million, and shows the plans; that takes minutes to fill.

    python benchmarks/growth_figures.py --rounds 5
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parents[1] / "tests")]

from databases import Databases
from figures import Figure, compare, say
from growth import LIVE, Ledger, timed
from ncr_upload.domain.jobs import NewJob

KINDS = ("sqlite", "postgresql")
FINISHED, WAITING = 100_000, 10_000
BATCHES = 5
CALLS = ("submit", "status", "active", "sweep")
CALLS_PER_ROUND = 10


def measure(_place: Any, rounds: int) -> Iterator[Figure]:
    """Of the four pairs (two databases, two kinds of growth), the one with the largest ratio stands for the figure."""
    databases, found = Databases(durable=True), dict[str, list[Figure]]()
    try:
        with tempfile.TemporaryDirectory(prefix="ncr-growth-") as folder:
            for kind in KINDS:
                for figure in _measure_on(kind, Path(folder), databases, rounds * CALLS_PER_ROUND):
                    print(f"    {kind:11} {figure.peer:60} {figure.name:14} × {figure.ratio:.2f}", flush=True)
                    found.setdefault(figure.name, []).append(figure)
    finally:
        databases.close()
    for figures in found.values():
        yield max(figures, key=lambda figure: figure.ratio)


def _measure_on(kind: str, folder: Path, databases: Databases, calls: int) -> Iterator[Figure]:
    ledgers = {}
    for which in ("empty", "finished", "waiting"):
        place = folder / f"{kind}-{which}"
        place.mkdir()
        ledgers[which] = Ledger(databases.create(kind, place))
    ledgers["finished"].fill(FINISHED)
    for ledger in ledgers.values():
        ledger.settle()
    _let_wait(ledgers["waiting"])
    for ledger in ledgers.values():
        ledger.rest()
    grown = {"finished": f"{FINISHED:,} finished", "waiting": f"{WAITING:,} waiting"}
    for name in CALLS:
        times = _in_turns({which: getattr(ledger, name) for which, ledger in ledgers.items()}, calls)
        for ledger in ledgers.values():
            ledger.withdraw()
        for which, words in grown.items():
            peer = f"{kind}: the empty ledger, beside {words} jobs"
            yield compare(f"growth.{name}", peer, times[which], times["empty"])


def _let_wait(ledger: Ledger) -> None:
    """Half of them in batches, of which a few at a time are released, and half on their own."""
    for number in range(BATCHES):
        jobs = [NewJob(f"held-{number}-{each}", "ann", "spring") for each in range(WAITING // 2 // BATCHES)]
        ledger.submissions.accept(jobs, batch_id=f"waiting-{number}", release=5)
    jobs = [NewJob(f"due-{each}", "ann", "spring") for each in range(WAITING // 2)]
    ledger.submissions.accept(jobs, batch_id=None, release=len(jobs))
    ledger.queue.waiting = LIVE + len(jobs) + 5 * BATCHES


def _in_turns(calls: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Milliseconds."""
    names, times = list(calls), {name: list[float]() for name in calls}
    for turn in range(count + 5):
        for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
            seconds = timed(calls[name])
            if turn >= 5:
                times[name].append(seconds * 1000)
    return times


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--rounds", type=int, default=5)
    options = asked.parse_args()
    for figure in measure(None, options.rounds):
        print(say(figure), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
