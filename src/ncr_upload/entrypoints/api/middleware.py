"""What every request passes through: the log line and the answer to a crash."""

from __future__ import annotations

import logging
import time
import uuid

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ncr_upload.entrypoints.api.problems import internal_problem

CALLER_GONE = 499
"""As other servers log a caller that hung up before it had sent everything; nobody is answered."""

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
        except ClientDisconnect:
            status = CALLER_GONE
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
