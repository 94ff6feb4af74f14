"""What one worker at a time does for all: probe a parked destination."""

from __future__ import annotations

from enum import StrEnum

from ncr_upload.application.parking import ParkingOptions, probe_destination
from ncr_upload.application.pipeline import PipelinePorts
from ncr_upload.application.ports import Duties, Parking


class Duty(StrEnum):
    """Wire format: the argument of `ncr.run_duty`."""

    PROBE = "probe"


def due_duties(duties: Duties, parking: Parking) -> list[Duty]:  # noqa: ARG001
    """What some worker should be told to look at."""
    return [Duty.PROBE] if parking.probe_due() else []


def run_duty(name: str, ports: PipelinePorts, parking: ParkingOptions) -> None:
    """Do the duty, if it is due and nobody else does it. Raises `DeliveryError`."""
    match name:
        case Duty.PROBE:
            probe_destination(ports.parking, ports.dropoff, parking)
