"""Chaos: the real processes, faults by seed, an observer at the destination, and a judge.

Each trial places a few jobs (small and larger products, re-deliveries, batches, invalid products, missing objects,
cancels, impatient callers), makes one to three faults while they run, lets them heal, and then holds what is found at the
destination, in the studio's tables, in the ledger and on the disks against what was asked for:

  lost               accepted and not ended as it had to, or ended without what that end means
  duplicated         published or recorded more than once
  partially visible  the observer saw a final folder that held no whole version of its job
  stuck              not ended within the bound after every fault had healed
  leaked             workspaces (not the cache of downloads), staging folders, leases, temporary files, Redis keys without an
                     expiry, once all is quiet
  previous lost      a delivery that was whole under its final name went, in part or all, before the next one was whole there

Where the destination copies folders in place of renaming them, a part of a package may be visible for a while.

It ends with 0 only if all six are 0. The seed is printed first; the same seed gives the same jobs and the same faults at
the same places of the schedule (processes keep their own timing, so a rare race may need several runs).

  python tests/chaos/run.py                                ten minutes, every database (MySQL where it is)
  python tests/chaos/run.py --seed 7 --trials 30           30 trials, however long they take
  python tests/chaos/run.py --seed 7 --only postgresql:12  one trial of that run again, alone
  python tests/chaos/run.py --faults '^sftp|publish'       a hunt in one place
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chaos.rounds import Plan, run_plan
from chaos.stack import DATABASES
from parts import find

DEFAULT_SECONDS = 600.0


def main() -> int:
    arguments = _parse()
    plan = Plan(
        seed=arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(2**31),
        databases=arguments.databases,
        seconds=arguments.seconds if arguments.seconds or arguments.trials or arguments.only else DEFAULT_SECONDS,
        trials=arguments.trials,
        only=arguments.only,
        faults=arguments.faults,
        sabotage=arguments.sabotage,
    )
    say(f"seed {plan.seed}; again: make chaos SEED={plan.seed}")
    began = time.monotonic()
    try:
        report = asyncio.run(run_plan(plan, say))
    except (KeyboardInterrupt, asyncio.CancelledError):
        say(f"interrupted; again: make chaos SEED={plan.seed}")
        return 130
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    say(
        f"{report['trials']} trials, {report['jobs']} jobs, {sum(report['faults'].values())} faults in "
        f"{time.monotonic() - began:.0f} s: " + ", ".join(f"{name} {report[name]}" for name in JUDGED)
    )
    for failure in report["failures"]:
        say(f"FAILED {json.dumps(failure, indent=2)}")
    if not report["ok"]:
        say(f"again: make chaos SEED={plan.seed}   (details in {arguments.json}, logs in {report['logs']})")
    return 0 if report["ok"] else 1


JUDGED = ("lost", "duplicated", "partially_visible", "stuck", "leaked", "previous_lost")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="draws everything; default: a new one, printed first")
    parser.add_argument("--seconds", type=float, help=f"for the whole run (default {DEFAULT_SECONDS:.0f}, unless --trials)")
    parser.add_argument("--trials", type=int, help="so many in all, shared among the databases")
    parser.add_argument(
        "--databases",
        type=_databases,
        default=_databases_here(),
        help=f"of {','.join(DATABASES)}, by commas (default: all here)",
    )
    parser.add_argument("--only", type=_one, metavar="DATABASE:TRIAL", help="that trial of the seed's run, alone")
    parser.add_argument("--faults", default="", metavar="REGEX", help="only those: 'crash at publish|^sftp' (default: all)")
    parser.add_argument("--json", type=Path, default=Path("chaos.json"), help="where the report goes (default: chaos.json)")
    parser.add_argument("--sabotage", action="store_true", help="take a file out of each delivery, to see the run fail")
    return parser.parse_args()


def _databases_here() -> tuple[str, ...]:
    """MySQL is not everywhere."""
    return DATABASES if find("ncr-mysqld") else DATABASES[:-1]


def _databases(text: str) -> tuple[str, ...]:
    named = tuple(text.split(","))
    if unknown := set(named) - set(DATABASES):
        raise argparse.ArgumentTypeError(f"no such database: {', '.join(sorted(unknown))}")
    return named


def _one(text: str) -> tuple[str, int]:
    database, _, number = text.partition(":")
    return _databases(database)[0], int(number)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
