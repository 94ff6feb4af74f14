"""A destination that refuses every job is parked: its jobs wait, and one worker at a time probes it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from ncr_upload.application.ports import Dropoff, Parking
from ncr_upload.application.views import iso_time
from ncr_upload.domain.errors import Deferred, DeliveryError, DestinationParked, StillParked, Unavailable
from ncr_upload.domain.jobs import Problem
from ncr_upload.domain.parking import Parked
from ncr_upload.domain.retries import ErrorClass
from ncr_upload.domain.text import REASONS, bound_text

log = logging.getLogger(__name__)

PROBE_TIMEOUT_SECONDS = 20.0
HOLD_SECONDS = 60.0
"""How long a worker has for its probe before another takes it."""

LOOK_AGAIN_SECONDS = 60.0
"""How long after the next probe a waiting job looks for itself, should nobody have told it how the probe went."""


@dataclass(frozen=True, slots=True)
class ParkingOptions:
    """The operator's settings: PROBE_SECONDS, PARK_HOURS."""

    probe_seconds: float
    park_seconds: float


def require_open(parking: Parking, destination: str) -> None:
    """Raises `StillParked` while the destination is parked."""
    parked = parking.find_parked(destination)
    if parked is not None:
        raise StillParked(parked.code, tell_parked(parked), parked.next_step)


def tell_parked(parked: Parked) -> str:
    """Since when, why, and what is known of the next probe."""
    return (
        f"the destination {parked.destination} is parked since {iso_time(parked.since)} because "
        f"{bound_text(parked.message, REASONS)}; next probe at {iso_time(parked.probe_at)}, in {parked.seconds_to_probe:.0f} s"
    )


def park(parking: Parking, destination: str, failure: DestinationParked, options: ParkingOptions) -> Parked | None:
    """Note what has been found, once for all jobs; None if the destination has been healed meanwhile."""
    if isinstance(failure, StillParked):
        return parking.find_parked(destination)
    parked, new = parking.park(destination, _problem(failure), options.probe_seconds)
    if new:
        log.warning("destination_parked: %s. %s", tell_parked(parked), parked.next_step)
    return parked


def probe_destination(parking: Parking, dropoff: Dropoff, options: ParkingOptions) -> None:
    """If a probe is due and nobody else takes it, probe; then the jobs that wait go on, or wait for the next probe."""
    destination = dropoff.destination
    if not parking.take_probe(destination, HOLD_SECONDS):
        return
    before = parking.find_parked(destination)
    try:
        asyncio.run(_probe(dropoff, before.code if before is not None else ""))
    except DeliveryError as error:
        log.debug("destination_still_parked: %s: %s", destination, error.message)
        problem, found = _problem(error), ""
        if before is not None and isinstance(error, Deferred | Unavailable):
            # The server was not asked, or did not answer: what it was parked for may still be so, and must be tried again.
            problem = Problem(before.code, ErrorClass.PARKED.value, before.message, before.next_step)
            found = f"; the last probe failed: {error.message}" if isinstance(error, Unavailable) else ""

        def tell(parked: Parked) -> str:
            return f"{ErrorClass.PARKED.value}: {tell_parked(parked)}{found}. {parked.next_step} (no attempt counted)"

        parking.stay_parked(
            destination,
            problem,
            tell=tell,
            wait_seconds=LOOK_AGAIN_SECONDS,
            park_seconds=options.park_seconds,
        )
        return
    message = f"the destination {destination} works again"
    if before is not None:
        message += f"; it was parked since {iso_time(before.since)} because {bound_text(before.message, REASONS)}"
    count = parking.heal(destination, message)
    log.info("destination_recovered: %s; %d jobs go on", message, count)


async def _probe(dropoff: Dropoff, parked_for: str) -> None:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_SECONDS), dropoff.session() as session:
            await session.probe(parked_for)
    except TimeoutError:
        raise Unavailable(
            "sftp_unreachable",
            f"{dropoff.destination} did not finish a probe within {PROBE_TIMEOUT_SECONDS:g} s",
            "It is probed again; see whether the server is up.",
        ) from None


def _problem(error: DeliveryError) -> Problem:
    return Problem(error.code, ErrorClass.PARKED.value, error.message, error.next_step)
