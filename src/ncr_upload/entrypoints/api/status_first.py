"""The status of a task, told before the router is asked.

Callers poll it, and routing, dependencies and serialisation take three times as long as looking the task up. Only an answer is
given here: unknown ids, other methods and whatever else go on to the route, which reads the same and is what the documentation
shows.
"""

from __future__ import annotations

from pydantic_core import to_json
from starlette.types import ASGIApp, Receive, Scope, Send

from ncr_upload.application import queries
from ncr_upload.application.api_ports import ApiPorts
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.names import ISSUED_ID
from ncr_upload.entrypoints.api.problems import unavailable_problem

PREFIX = "/job-status/"


class StatusFirst:
    def __init__(self, app: ASGIApp, ports: ApiPorts) -> None:
        self._app = app
        self._ports = ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task_id = _asked_for(scope)
        if task_id is None:
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["task_id"] = task_id
        try:
            view = await queries.read_task(self._ports, task_id)
        except Unavailable as error:
            await unavailable_problem(error)(scope, receive, send)
            return
        if view is None:
            await self._app(scope, receive, send)
            return
        body = to_json(view)
        headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _asked_for(scope: Scope) -> str | None:
    """The task id of a request for a status."""
    if scope["type"] != "http" or scope["method"] != "GET" or not scope["path"].startswith(PREFIX):
        return None
    task_id: str = scope["path"][len(PREFIX) :]
    return task_id if ISSUED_ID.fullmatch(task_id) else None
