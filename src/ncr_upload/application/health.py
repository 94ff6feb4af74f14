"""Whether the service can do its work: each part asked at once, none for longer than an answer may take."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum

from ncr_upload.application.api_ports import ApiPorts, Probe
from ncr_upload.application.lanes import Lane
from ncr_upload.domain.errors import DeliveryError, Unavailable

HEALTH_SECONDS = 2.3


class ServiceState(StrEnum):
    """`degraded`: jobs are accepted and kept, but not all of them can be worked on now. `unhealthy`: none is accepted."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"


@dataclass(frozen=True, slots=True)
class Health:
    """`problems` holds what is wrong, by part; a part that is well is not in it."""

    state: ServiceState
    parts: tuple[str, ...]
    problems: dict[str, DeliveryError]


async def check_health(ports: ApiPorts, *, deep: bool) -> Health:
    """The state of Redis, the database and the workers; `deep` asks the outside parts too."""
    probes: dict[str, tuple[Lane, Probe]] = {
        "redis": (ports.lanes.probe("redis"), ports.board.ping),
        "database": (ports.lanes.probe("database"), ports.check_database),
        "worker": (ports.lanes.probe("worker"), lambda: _check_worker(ports)),
    }
    if deep:
        probes |= {part: (ports.lanes.probe(part), probe) for part, probe in ports.deep_probes.items()}
    answers = await asyncio.gather(*(_ask(lane, probe) for lane, probe in probes.values()))
    problems = {part: error for part, error in zip(probes, answers, strict=True) if error is not None}
    return Health(_state_of(problems), tuple(probes), problems)


async def check_ready(ports: ApiPorts) -> None:
    """Raises `Unavailable` when no job can be accepted now. Only the database is needed for that."""
    await ports.lanes.probe("database").run(ports.check_database, HEALTH_SECONDS)


async def _ask(lane: Lane, probe: Probe) -> DeliveryError | None:
    try:
        await lane.run(probe, HEALTH_SECONDS)
    except DeliveryError as error:
        return error
    return None


def _check_worker(ports: ApiPorts) -> None:
    ports.board.ping()  # workers are asked through Redis, and asking takes long without it
    if not ports.queue.is_worker_alive():
        raise Unavailable(
            "no_worker",
            "no worker answered",
            "Start one (python start_worker.py worker) or look at its log; accepted jobs wait for it.",
        )


def _state_of(problems: dict[str, DeliveryError]) -> ServiceState:
    if "database" in problems:
        return ServiceState.UNHEALTHY
    return ServiceState.DEGRADED if problems else ServiceState.HEALTHY
