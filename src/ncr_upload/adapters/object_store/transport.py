"""Exchange one HTTP request and its answer over pooled connections, following nothing.

Blocking, for threads. A proxy named by HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is used unless NO_PROXY names the host.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import select
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event, Lock
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment

from ncr_upload.adapters.object_store.http1 import Connection, Response
from ncr_upload.domain.redirects import Origin, Target

MAX_IDLE_CONNECTIONS = 64
MAX_IDLE_SECONDS = 60
MAX_DISCARDED_BYTES = 64 * 1024
TRANSPORT_ERRORS = (OSError, ValueError)
"""What a connection raises; the last for a socket that was closed under a read, and for what cannot be sent."""

CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")


class ProxyRefused(OSError):
    """The proxy that the environment names does not lead on, or is not an http:// one."""


class Cancelled(Exception):
    """The caller no longer waits for this transfer."""


class Cancellation:
    """Ends a transfer from another thread: wakes it from its sleep, and closes the connection under its read."""

    def __init__(self) -> None:
        self._is_set = Event()
        self._lock = Lock()
        self._socket: socket.socket | None = None

    def cancel(self) -> None:
        self._is_set.set()
        with self._lock:
            self._shut_down()

    def watch(self, connection: socket.socket | None) -> None:
        """Name the connection to close on a cancellation; None while there is none."""
        with self._lock:
            self._socket = connection
            if self._is_set.is_set():
                self._shut_down()

    def sleep(self, seconds: float) -> None:
        if self._is_set.wait(seconds):
            raise Cancelled

    def check(self) -> None:
        if self._is_set.is_set():
            raise Cancelled

    def _shut_down(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # closed already
                # Not SSLSocket.shutdown, which takes the TLS state away under the thread that reads.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


@dataclass(slots=True)
class Reply:
    """An answer whose body has not been read. Call `finish` or `close`."""

    connections: Connections
    origin: Origin
    connection: Connection
    response: Response

    @property
    def status(self) -> int:
        return self.response.status

    def header(self, name: str) -> str:
        return self.response.headers.get(name.lower(), "")

    def finish(self) -> None:
        """Keep the connection for the next request if the body has been read."""
        if self.response.is_complete and self.response.keeps_connection:
            self.connections.put_back(self.origin, self.connection)
        else:
            self.close()

    def close(self) -> None:
        self.connection.close()

    def read_rest(self, limit: int = MAX_DISCARDED_BYTES) -> bytes:
        """Return at most `limit` bytes of the body, then finish."""
        try:
            return self.response.read(limit)
        finally:
            self.finish()


@dataclass(slots=True)
class Connections:
    """Connections to every origin that is asked, idle ones kept for a while."""

    connect_seconds: float
    read_seconds: float
    _idle: dict[Origin, list[tuple[float, Connection]]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)
    _tls: ssl.SSLContext | None = None
    _proxies: dict[Origin, str | None] = field(default_factory=dict)

    def exchange(self, method: str, target: Target, headers: Mapping[str, str], cancellation: Cancellation) -> Reply:
        """Send a request without a body and wait for the head of its answer. Raises TRANSPORT_ERRORS.

        A kept connection may have been closed by the server meanwhile: the request is then sent over a new one.
        """
        kept = self._take(target.origin)
        if kept is not None:
            try:
                return self._send(method, target, headers, kept, cancellation)
            except ConnectionError:
                cancellation.check()
        return self._send(method, target, headers, self._connect(target.origin), cancellation)

    def put_back(self, origin: Origin, connection: Connection) -> None:
        with self._lock:
            idle = self._idle.setdefault(origin, [])
            if len(idle) < MAX_IDLE_CONNECTIONS:
                idle.append((time.monotonic(), connection))
                return
        connection.close()

    def _take(self, origin: Origin) -> Connection | None:
        while True:
            with self._lock:
                idle = self._idle.get(origin)
                if not idle:
                    return None
                since, connection = idle.pop()
            if time.monotonic() - since <= MAX_IDLE_SECONDS and not _has_input(connection):
                return connection
            connection.close()

    def _send(
        self, method: str, target: Target, headers: Mapping[str, str], connection: Connection, cancellation: Cancellation
    ) -> Reply:
        cancellation.watch(connection.sock)
        try:
            proxy = self._proxy(target.origin) if target.origin.scheme == "http" else None
            if proxy is None:
                connection.send(method, target.path, headers)
            else:
                connection.send(method, f"{target.origin}{target.path}", {**headers, **_login(proxy)})
            return Reply(self, target.origin, connection, connection.receive(method))
        except BaseException:
            connection.close()
            raise

    def _connect(self, origin: Origin) -> Connection:
        proxy = self._proxy(origin)
        connected = socket.create_connection(
            _address(proxy) if proxy else (origin.host, origin.port), timeout=self.connect_seconds
        )
        try:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if origin.scheme == "https":
                if proxy:
                    _open_tunnel(Connection(connected), origin, proxy)
                connected = self._tls_context().wrap_socket(connected, server_hostname=origin.host)
            connected.settimeout(self.read_seconds)
        except BaseException:
            connected.close()
            raise
        return Connection(connected)

    def _proxy(self, origin: Origin) -> str | None:
        """Return the proxy's URL, as the environment named it when the origin was first asked."""
        if origin not in self._proxies:
            self._proxies[origin] = _proxy_for(origin)
        return self._proxies[origin]

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            context = ssl.create_default_context()
            context.set_alpn_protocols(["http/1.1"])
            paths = ssl.get_default_verify_paths()
            if paths.cafile is None and paths.capath is None:  # a Python that was built for another machine
                for bundle in filter(os.path.exists, CA_BUNDLES):
                    context.load_verify_locations(bundle)
            self._tls = context
        return self._tls


def _open_tunnel(connection: Connection, origin: Origin, proxy: str) -> None:
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    address = f"{host}:{origin.port}"
    connection.send("CONNECT", address, {"host": address, **_login(proxy)})
    status = connection.receive("HEAD").status  # a tunnel's bytes follow, no body
    if not 200 <= status < 300 or connection.has_read_ahead:
        raise ProxyRefused


def _has_input(connection: Connection) -> bool:
    """Return whether an idle connection has been closed by the server, or holds bytes that nobody asked for."""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return connection.has_read_ahead or bool(poll.poll(0))


def _proxy_for(origin: Origin) -> str | None:
    proxies = getproxies_environment()
    proxy = proxies.get(origin.scheme) or proxies.get("all")
    if not proxy or _is_exempt(origin, proxies.get("no", "")):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _is_exempt(origin: Origin, no_proxy: str) -> bool:
    """Return whether NO_PROXY names the host, a domain it is in, or a network (10.0.0.0/8) that its address is in."""
    for entry in no_proxy.lower().split(","):
        name = entry.strip().removeprefix("*").removeprefix(".")
        if entry.strip() == "*" or (name and name in (origin.host, origin.host_header)):
            return True
        if name and origin.host.endswith(f".{name}"):
            return True
        with suppress(ValueError):
            if ipaddress.ip_address(origin.host) in ipaddress.ip_network(name, strict=False):
                return True
    return False


def _address(proxy: str) -> tuple[str, int]:
    parts = urlsplit(proxy)
    if parts.scheme != "http" or not parts.hostname:
        raise ProxyRefused
    return parts.hostname, parts.port or 80


def _login(proxy: str) -> dict[str, str]:
    parts = urlsplit(proxy)
    if parts.username is None:
        return {}
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return {"proxy-authorization": f"Basic {base64.b64encode(login).decode()}"}
