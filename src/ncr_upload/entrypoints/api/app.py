"""Puts the API together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import anyio.to_thread
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from ncr_upload.application.api_ports import ApiPorts
from ncr_upload.application.crash_points import Reach, pass_by
from ncr_upload.application.doorbell import Doorbell
from ncr_upload.application.monitoring import MemoryWatch
from ncr_upload.application.recovery import ReleaseLimits
from ncr_upload.application.submissions import SubmitLimits, SubmitPorts, submit_each
from ncr_upload.domain.admission import AdmissionLimits
from ncr_upload.entrypoints.api import job_routes, metrics, monitoring_routes
from ncr_upload.entrypoints.api.access import HEADER, Access
from ncr_upload.entrypoints.api.bodies import BodyLimit
from ncr_upload.entrypoints.api.context import Context
from ncr_upload.entrypoints.api.docs import complete_openapi, serve_docs
from ncr_upload.entrypoints.api.middleware import RequestLog
from ncr_upload.entrypoints.api.problems import render_problems
from ncr_upload.entrypoints.api.status_first import StatusFirst
from ncr_upload.entrypoints.secrets import make_redactor
from ncr_upload.entrypoints.settings import Settings

LAST_RINGS_SECONDS = 2.0

DESCRIPTION = """\
Delivers 3D product assets: finds a job's files, fetches them, lays them out, has them validated and delivers them over SFTP.

Send a job to `/process-job`, follow it at `/job-status/{task_id}`. Errors are `application/problem+json` with a stable
`code`. Callers on the same machine need no key unless API_ANONYMOUS says so; others send `X-API-Key`.
"""


def create_app(ports: ApiPorts, settings: Settings, reach: Reach = pass_by) -> FastAPI:
    """The API on these ports. Nothing is connected until the first request."""
    doorbell = Doorbell(ports.queue, ports.board, reach)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(_watch_memory(ports, settings))
        yield
        watching.cancel()
        await anyio.to_thread.run_sync(doorbell.close, LAST_RINGS_SECONDS)

    app = FastAPI(
        title=monitoring_routes.NAME,
        version=monitoring_routes.VERSION,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # looked for at each request; `/metrics` is our own
    )
    submits = SubmitPorts(ports.ledger, ports.recovery, ports.reports, ports.host, doorbell)
    release = ReleaseLimits(settings.batch_size, settings.memory_check_interval)
    limits = SubmitLimits(AdmissionLimits(settings.max_memory_usage_percent), release)
    redactor = make_redactor(settings)
    app.state.context = Context(ports, settings, submits, limits, partial(submit_each, ports=submits, limits=limits), redactor)
    app.include_router(job_routes.lean)
    app.include_router(job_routes.router)
    app.include_router(monitoring_routes.router)
    app.include_router(metrics.router)
    serve_docs(app)
    complete_openapi(app)
    render_problems(app, redactor)
    _add_middleware(app, ports, settings)
    return app


async def _watch_memory(ports: ApiPorts, settings: Settings) -> None:
    watch = MemoryWatch(settings.max_memory_usage_percent)
    while True:
        watch.look(ports.host)
        await asyncio.sleep(settings.memory_check_interval)


def _add_middleware(app: FastAPI, ports: ApiPorts, settings: Settings) -> None:
    """Innermost first: a request meets them from the last to the first."""
    app.add_middleware(BodyLimit)
    app.add_middleware(StatusFirst, ports=ports)
    app.add_middleware(Access, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=[HEADER, "Content-Type", "Idempotency-Key"],
            expose_headers=["Retry-After"],
        )
    app.add_middleware(RequestLog)
