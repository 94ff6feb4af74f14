"""Whether a part answers, asked the way its clients would. Each probe is quick, raises nothing and says yes or no."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Awaitable, Callable
from typing import Any

from ncr_upload.entrypoints.embedded.sockets import LOOPBACK

Probe = Callable[[], Awaitable[bool]]

_PROBE_SECONDS = 2.0


def answers_http(port: int, path: str, *statuses: int) -> Probe:
    """An HTTP GET is answered with one of the statuses."""

    async def probe() -> bool:
        answer = await asyncio.to_thread(get_json, port, path)
        return answer is not None and answer[0] in statuses

    return probe


def reports(port: int, path: str, *, part: str, state: str) -> Probe:
    """The JSON object at `path` says `state` of the part, whatever the HTTP status."""

    async def probe() -> bool:
        answer = await asyncio.to_thread(get_json, port, path)
        return answer is not None and isinstance(answer[1], dict) and answer[1].get(part) == state

    return probe


def answers_ping(port: int, password: str) -> Probe:
    """Redis takes the password and has its data loaded."""

    async def probe() -> bool:
        return await _exchange(port, f"AUTH {password}\r\nPING\r\n".encode(), b"+OK\r\n+PONG\r\n")

    return probe


def greets_with(port: int, greeting: bytes) -> Probe:
    """The server speaks first, and so."""

    async def probe() -> bool:
        return await _exchange(port, b"", greeting)

    return probe


async def _exchange(port: int, request: bytes, answer: bytes) -> bool:
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            reader, writer = await asyncio.open_connection(LOOPBACK, port)
            try:
                writer.write(request)
                return await reader.readexactly(len(answer)) == answer
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return False


def get_json(port: int, path: str) -> tuple[int, Any] | None:
    """Status and JSON body (None when it is not JSON) of a GET; None when nothing answers."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=_PROBE_SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    try:
        return response.status, json.loads(body)
    except ValueError:
        return response.status, None
