"""The state of the service: what it is, probes, health, memory, workers."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from ncr_upload import __version__
from ncr_upload.application import queries
from ncr_upload.application.health import ServiceState, check_health, check_ready
from ncr_upload.domain.errors import Unavailable
from ncr_upload.entrypoints.api import models
from ncr_upload.entrypoints.api.access import documented, is_allowed
from ncr_upload.entrypoints.api.context import In, now
from ncr_upload.entrypoints.api.problems import ProblemFound, document

NAME = "NCR Upload API"
VERSION = __version__

router = APIRouter(tags=["Monitoring"])


@router.get("/", response_model=models.About, responses=document(), summary="What this is")
async def about(request: Request) -> dict[str, Any]:
    """Name, version and where to read on."""
    root = request.scope.get("root_path", "").rstrip("/")
    links = {"docs": "/docs", "redoc": "/redoc", "openapi": "/openapi.json", "health": "/health"}
    return {
        "name": NAME,
        "version": VERSION,
        "status": "running",
        "links": {name: f"{root}{path}" for name, path in links.items()},
    }


@router.get("/livez", response_model=models.Alive, responses=document(), summary="Is the process alive?")
async def livez() -> dict[str, str]:
    """Answers as long as this process does; asks no other part."""
    return {"status": "ok", "timestamp": now()}


@router.get("/readyz", response_model=models.Alive, responses=document("unavailable"), summary="Can it accept jobs?")
async def readyz(api: In) -> dict[str, str]:
    """200 when jobs can be accepted, which needs the database only; else 503. 503 too while this process is being stopped."""
    if api.leaving.is_set():
        raise Unavailable("leaving", "this process is being stopped", "Ask another one; what is sent here still works.")
    await check_ready(api.ports)
    return {"status": "ok", "timestamp": now()}


@router.get(
    "/health",
    response_model=models.HealthView,
    response_model_exclude_unset=True,
    responses=document() | {503: {"description": "Unhealthy: no job can be accepted.", "model": models.HealthView}},
    summary="State of the service and its parts",
    dependencies=[documented],
)
async def health(
    request: Request,
    response: Response,
    api: In,
    deep: Annotated[bool, Query(description="Ask the object storage, the destination and the validator too.")] = False,
) -> dict[str, Any]:
    """Redis, database and workers. 503 only when no job can be accepted, that is without the database; without Redis or
    workers the state is `degraded` and jobs are kept until they are back. Without access, the state of each part is told
    but not what is wrong with it, and `deep` is refused."""
    allowed = is_allowed(request)
    if deep and not allowed:
        raise ProblemFound("unauthorized", "deep=true needs the API key.", next_step="Send it as X-API-Key.")
    found = await check_health(api.ports, deep=deep)
    if found.state is ServiceState.UNHEALTHY:
        response.status_code = 503
        response.headers["Retry-After"] = "5"
    told: dict[str, Any] = {"status": found.state}
    told |= {part: "unavailable" if part in found.problems else "connected" for part in found.parts}
    if allowed:
        errors = {part: api.redactor.redact_error(error) for part, error in found.problems.items()}
        told["problems"] = {part: f"{error.message}. {error.next_step}" for part, error in errors.items()}
    return told | {"timestamp": now()}


@router.get(
    "/memory-stats",
    response_model=models.MemoryView,
    responses=document(),
    summary="Memory and what it allows",
    dependencies=[documented],
)
async def memory_stats(api: In) -> dict[str, Any]:
    """Memory of this process and of the container (or host), whether a job sent now would be accepted, and what the workers
    said of their hosts last."""
    told = await queries.read_memory(
        api.ports,
        api.limits.admission,
        child_bytes=api.settings.celery_worker_max_memory_per_child * 1024,
        configured_concurrency=api.settings.celery_worker_concurrency,
        report_seconds=api.settings.memory_check_interval,
    )
    return told | {"timestamp": now()}


@router.get(
    "/celery-stats",
    response_model=models.CeleryView,
    responses=document(),
    summary="Workers and queues",
    dependencies=[documented],
)
async def celery_stats(api: In) -> dict[str, Any]:
    """What the workers do and how many messages wait. Answers in under 3 s, with no worker alive too."""
    told = await queries.read_workers(api.ports)
    return told | {"workers": sorted(told["stats"]), "timestamp": now()}
