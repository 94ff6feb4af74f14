"""A destination that refuses every job until an operator has mended it, and how often it is asked."""

from __future__ import annotations

from dataclasses import dataclass

RELAPSE_SECONDS = 1800.0
"""A destination parked again within so long of its recovery has not recovered for every job (a large one does not fit)."""

SLOWEST = 16
"""How many times PROBE_SECONDS the slowest probing is apart."""

FORGOTTEN_SECONDS = 3600.0
"""A destination that nobody has probed for so long is no longer taken to be parked. Perhaps no worker has it any more, since
its settings were changed; perhaps no worker ran: then the next job finds out how it is."""


@dataclass(frozen=True, slots=True)
class Parked:
    """One parked destination. `since` and `probe_at` are seconds since the epoch by the ledger's clock, `seconds_to_probe`
    is counted from when it was read; `probes` is how many have failed."""

    destination: str
    since: float
    code: str
    message: str
    next_step: str
    probe_at: float
    seconds_to_probe: float
    probes: int


def plan_probing(base_seconds: float, last_seconds: float | None, healthy_seconds: float | None) -> float:
    """Seconds between the probes of a destination that is being parked. One that was parked before, probed every
    `last_seconds`, and had recovered only `healthy_seconds` ago, is probed half as often each time."""
    if last_seconds is None or healthy_seconds is None or healthy_seconds > RELAPSE_SECONDS:
        return base_seconds
    return min(last_seconds * 2, base_seconds * SLOWEST)
