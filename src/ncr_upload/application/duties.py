"""What one worker at a time does for all: probe a parked destination, clean up after what was killed."""

from __future__ import annotations

from enum import StrEnum

from ncr_upload.application.janitor import JanitorOptions, clean
from ncr_upload.application.parking import ParkingOptions, probe_destination
from ncr_upload.application.pipeline import PipelinePorts
from ncr_upload.application.ports import Duties, Parking


class Duty(StrEnum):
    """Wire format: the argument of `ncr.run_duty`, and the name in the ledger."""

    PROBE = "probe"
    JANITOR = "janitor"


def due_duties(duties: Duties, parking: Parking) -> list[Duty]:
    """What some worker should be told to look at. The probe's time is in the record of the parked destination."""
    due = [Duty.PROBE] if parking.probe_due() else []
    return [*due, *(Duty(name) for name in duties.due_duties([Duty.JANITOR]))]


def run_duty(name: str, ports: PipelinePorts, duties: Duties, parking: ParkingOptions, janitor: JanitorOptions) -> None:
    """Do the duty, if it is due and nobody else does it. Raises `DeliveryError`."""
    match name:
        case Duty.PROBE:
            probe_destination(ports.parking, ports.dropoff, parking)
        case Duty.JANITOR if duties.take_duty(name, janitor.every_seconds):
            clean(ports.cleaning, ports.parking, ports.dropoff, janitor)
