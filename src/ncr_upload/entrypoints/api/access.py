"""Who may call: whoever has the key, and without one whom API_ANONYMOUS allows.

`loopback` means a caller on this machine itself: its address is a loopback one, no proxy has passed the request on, and the
Host it asked for is a loopback name. The last keeps out web pages that rebind their own name to 127.0.0.1.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from functools import lru_cache

from fastapi import Depends
from fastapi.security import APIKeyHeader
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from ncr_upload.entrypoints.api.problems import problem
from ncr_upload.entrypoints.settings import Anonymous, Settings

HEADER = "X-API-Key"
KEY_NAME = HEADER.lower().encode()
PASSED_ON = frozenset({b"forwarded", b"via", b"x-real-ip"})
OPEN_PATHS = frozenset({"/", "/livez", "/readyz", "/health", "/docs", "/redoc", "/openapi.json"})
OPEN_FOLDER = "/docs-assets/"

documented = Depends(APIKeyHeader(name=HEADER, auto_error=False, description="The value of API_KEY."))
"""Shows the key in the OpenAPI document; the check itself is in `Access`, before any body is read."""


class Access:
    """Answers 401 to whoever may not call. Open to all: the probes, `/`, `/health` in short, and the documentation."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._key = settings.api_key.get_secret_value().encode() if settings.api_key else None
        self._anonymous = settings.api_anonymous

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        allowed = self.allows(scope)
        scope.setdefault("state", {})["allowed"] = allowed
        if allowed or scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDER):
            await self._app(scope, receive, send)
            return
        refusal = problem(
            "unauthorized",
            f"This request needs the API key; without it, API_ANONYMOUS={self._anonymous} lets in {_WHO[self._anonymous]}.",
            headers={"WWW-Authenticate": "APIKey"},
            next_step=f"Send the header {HEADER} with the value of API_KEY."
            if self._key
            else f"Set API_KEY where the API runs, restart it, and send the key as {HEADER}.",
        )
        await refusal(scope, receive, send)

    def allows(self, scope: Scope) -> bool:
        """Whether this caller may see and do everything."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]  # names are in lower case, by ASGI
        if self._key is not None:
            sent = next((value for name, value in headers if name == KEY_NAME), b"")
            if hmac.compare_digest(sent, self._key):
                return True
        if self._anonymous is Anonymous.LOOPBACK:
            client = scope.get("client")
            return client is not None and _is_loopback(client[0]) and not _is_passed_on(headers) and _asks_loopback(headers)
        return self._anonymous is Anonymous.ALL


_WHO = {Anonymous.LOOPBACK: "callers on the same machine only", Anonymous.NONE: "nobody", Anonymous.ALL: "everybody"}


def is_allowed(connection: HTTPConnection) -> bool:
    """What `Access` found about this request, for the routes that are open in short only."""
    return bool(connection.state.allowed)


@lru_cache(maxsize=1024)
def _is_loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        return parsed.ipv4_mapped.is_loopback
    return parsed.is_loopback


def _is_passed_on(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name in PASSED_ON or name.startswith(b"x-forwarded") for name, _ in headers)


def _asks_loopback(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    hosts = [value for name, value in headers if name == b"host"]
    return len(hosts) == 1 and _is_loopback_host(hosts[0])


@lru_cache(maxsize=1024)
def _is_loopback_host(sent: bytes) -> bool:
    host = sent.decode("latin-1").strip().lower()
    name = host[1 : host.find("]")] if host.startswith("[") else host.rsplit(":", 1)[0]
    return name == "localhost" or _is_loopback(name)
