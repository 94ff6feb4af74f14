"""Exchange one HTTP request and its answer over kept connections of urllib3, following nothing.

Blocking, for threads. A proxy named by HTTP_PROXY, HTTPS_PROXY or ALL_PROXY is used unless NO_PROXY names the host.
urllib3's pools are not used: they neither show a connection before its answer has begun, which a cancellation must close,
nor tell whether it was a kept one, which a server may have closed meanwhile.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException, IncompleteRead, RemoteDisconnected
from threading import Event, Lock
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from urllib3 import HTTPResponse
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError
from urllib3.util import make_headers

from ncr_upload.domain.redirects import Origin, Target

MAX_IDLE_CONNECTIONS = 64
MAX_IDLE_SECONDS = 60
MAX_DISCARDED_BYTES = 64 * 1024
TRANSPORT_ERRORS = (OSError, ValueError)
"""What an exchange raises; the last for a socket that was closed under a read, and for what cannot be sent."""

CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")


class AnswerCut(ConnectionResetError):
    """The server closed the connection before the answer was complete."""


class AnswerMalformed(OSError):
    """What came is not HTTP/1.1, or not within the bounds."""


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
                # Not SSLSocket.shutdown (nor HTTPResponse's), which takes the TLS state away under the thread that reads.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


@dataclass(slots=True)
class Reply:
    """An answer whose body has not been read. Call `finish` or `close`."""

    connections: Connections
    origin: Origin
    connection: HTTPConnection
    response: HTTPResponse

    @property
    def status(self) -> int:
        return self.response.status

    def header(self, name: str) -> str:
        return self.response.headers.get(name, "")

    def read(self, limit: int) -> bytes:
        """Return the next bytes of the body, at most `limit`; none at its end. Raises TRANSPORT_ERRORS."""
        with _translated():
            # Of a body in chunks what has come: its reader would hold a chunk of any size in memory.
            return self.response.read1(limit) if self.response.chunked else self.response.read(limit)

    def finish(self) -> None:
        """Keep the connection for the next request if the body has been read. After an interim answer more is to come."""
        if self.status >= 200 and self.response.closed and not self.connection.is_closed:
            self.connections.put_back(self.origin, self.connection)
        else:
            self.close()

    def close(self) -> None:
        self.response.close()
        self.connection.close()

    def read_rest(self, limit: int = MAX_DISCARDED_BYTES) -> bytes:
        """Return at most `limit` bytes of the body, then finish."""
        content = b""
        try:
            while len(content) < limit and (read := self.read(limit - len(content))):
                content += read
            return content
        finally:
            self.finish()


@dataclass(slots=True)
class Connections:
    """Connections to every origin that is asked, idle ones kept for a while."""

    connect_seconds: float
    read_seconds: float
    _idle: dict[Origin, list[tuple[float, HTTPConnection]]] = field(default_factory=dict)
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

    def put_back(self, origin: Origin, connection: HTTPConnection) -> None:
        with self._lock:
            idle = self._idle.setdefault(origin, [])
            if len(idle) < MAX_IDLE_CONNECTIONS:
                idle.append((time.monotonic(), connection))
                return
        connection.close()

    def _take(self, origin: Origin) -> HTTPConnection | None:
        while True:
            with self._lock:
                idle = self._idle.get(origin)
                if not idle:
                    return None
                since, connection = idle.pop()
            if time.monotonic() - since <= MAX_IDLE_SECONDS and connection.is_connected:
                return connection
            connection.close()

    def _send(
        self, method: str, target: Target, headers: Mapping[str, str], connection: HTTPConnection, cancellation: Cancellation
    ) -> Reply:
        cancellation.watch(connection.sock)
        path, sent = target.path, {"user-agent": "ncr-upload", **headers}
        proxy = self._proxy(target.origin) if target.origin.scheme == "http" else None
        if proxy is not None:
            path, sent = f"{target.origin}{path}", sent | _login(proxy)
        try:
            with _translated():
                connection.request(method, path, headers=sent, preload_content=False, decode_content=False)
                response = connection.getresponse()
            _refuse_unclear(response)
            return Reply(self, target.origin, connection, response)
        except BaseException:
            connection.close()
            raise

    def _connect(self, origin: Origin) -> HTTPConnection:
        proxy = self._proxy(origin)
        host, port = _address(proxy) if proxy else (origin.host, origin.port)
        connection = HTTPConnection(host, port, timeout=self.connect_seconds)
        if origin.scheme == "https":
            connection = HTTPSConnection(host, port, timeout=self.connect_seconds, ssl_context=self._tls_context())
            if proxy:
                connection.set_tunnel(origin.host, origin.port, headers=_login(proxy))
        try:
            with _translated():
                connection.connect()
        except BaseException as error:
            connection.close()
            if proxy and isinstance(error, OSError) and not isinstance(error, ssl.SSLError | TimeoutError):
                raise ProxyRefused from None
            raise
        connection.timeout = self.read_seconds
        return connection

    def _proxy(self, origin: Origin) -> str | None:
        """Return the proxy's URL, as the environment named it when the origin was first asked."""
        if origin not in self._proxies:
            self._proxies[origin] = _proxy_for(origin)
        return self._proxies[origin]

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            context = ssl.create_default_context()
            paths = ssl.get_default_verify_paths()
            if paths.cafile is None and paths.capath is None:  # a Python that was built for another machine
                for bundle in filter(os.path.exists, CA_BUNDLES):
                    context.load_verify_locations(bundle)
            self._tls = context
        return self._tls


@contextmanager
def _translated() -> Iterator[None]:
    """Raise as TRANSPORT_ERRORS what urllib3 and http.client raise: the cause that urllib3 wraps, or what it says of HTTP."""
    try:
        yield
    except (HTTPError, HTTPException) as error:
        cause: BaseException = error
        while isinstance(cause, HTTPError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, IncompleteRead | RemoteDisconnected):
            raise AnswerCut from None
        raise (cause if isinstance(cause, TRANSPORT_ERRORS) else AnswerMalformed) from None


def _refuse_unclear(response: HTTPResponse) -> None:
    """Refuse where servers and proxies have differed: two values of a header that decides, or two lengths of the body."""
    headers = response.headers
    if any(len(set(headers.getlist(name))) > 1 for name in ("content-length", "transfer-encoding", "location")):
        raise AnswerMalformed("two different headers")
    if "transfer-encoding" in headers and (not response.chunked or "content-length" in headers):
        raise AnswerMalformed("the length of the body is unclear")


def _proxy_for(origin: Origin) -> str | None:
    proxies = getproxies_environment()
    proxy = proxies.get(origin.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(origin.host_header) or _is_in_network(origin, proxies.get("no", "")):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _is_in_network(origin: Origin, no_proxy: str) -> bool:
    """Return whether NO_PROXY names a network (10.0.0.0/8) that the host's address is in."""
    for entry in no_proxy.split(","):
        with suppress(ValueError):
            if ipaddress.ip_address(origin.host) in ipaddress.ip_network(entry.strip(), strict=False):
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
    return make_headers(proxy_basic_auth=f"{unquote(parts.username)}:{unquote(parts.password or '')}")
