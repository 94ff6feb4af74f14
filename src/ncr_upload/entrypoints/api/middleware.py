"""What every request passes through: the log line, the answer to a crash, the limit on the body."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from contextlib import suppress

import structlog
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ncr_upload.entrypoints.api.problems import internal_problem, too_large_problem

MAX_BODY_BYTES = 16 * 1024 * 1024
"""Room for 10,000 jobs whose every name is as long as may be, in UTF-8."""
DRAIN_SECONDS = 5.0
QUIET_PATHS = frozenset({"/livez", "/readyz"})
QUIET_PREFIX = "/job-status/"

LOGGER = "ncr.api"
log = structlog.stdlib.get_logger(LOGGER)
_levels = logging.getLogger(LOGGER)


class RequestLog:
    """One log line per request (never its query or headers), and the only place that answers what nobody expected. Probes, and
    statuses that were told, are asked for all the time: those only with LOG_LEVEL=DEBUG."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 0

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(_as_get(scope), receive, watch)
        except Exception:
            reference = uuid.uuid4().hex[:12]
            log.exception("unexpected", reference=reference, method=scope["method"], path=scope["path"])
            if status:
                raise  # half an answer is out: the server must cut the connection
            await internal_problem(reference)(scope, receive, watch)
        finally:
            self._write_line(scope, status, 1000 * (time.perf_counter() - began))

    def _write_line(self, scope: Scope, status: int, duration_ms: float) -> None:
        is_quiet = scope["path"] in QUIET_PATHS or (status == 200 and scope["path"].startswith(QUIET_PREFIX))
        if is_quiet and not _levels.isEnabledFor(logging.DEBUG):
            return
        facts = {"method": scope["method"], "path": scope["path"], "status": status, "duration_ms": round(duration_ms, 1)}
        facts |= {name: scope["state"][name] for name in ("task_id", "batch_id") if name in scope.get("state", {})}
        write = log.debug if is_quiet else log.info
        write("request", **facts)


def _as_get(scope: Scope) -> Scope:
    """A HEAD (most uptime checks) is answered as the GET would be: the server itself leaves out the body."""
    return {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope


class BodyLimit:
    """Refuses a body over `limit_bytes`: by its Content-Length before anything is read, else as soon as it is passed."""

    def __init__(self, app: ASGIApp, limit_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._limit_bytes:
            await _answer_and_drain(too_large_problem(self._limit_bytes), scope, receive, send)
            return
        received = 0

        async def count() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit_bytes:
                raise HTTPException(413, f"The body is larger than {self._limit_bytes} bytes.", {"Connection": "close"})
            return message

        await self._app(scope, count, send)


async def _answer_and_drain(answer: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer before the body is read, then throw away what the caller still sends, for a while: many callers listen only
    once they have sent everything, and would see a reset connection instead of the answer."""

    async def keep_open(message: Message) -> None:
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    await answer(scope, receive, keep_open)
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                continue
    await send({"type": "http.response.body", "body": b"", "more_body": False})
