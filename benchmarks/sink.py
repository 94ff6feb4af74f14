"""A validator that reads the whole body and answers "Valid": the same for our side and the baseline, as cheap as can be.

python benchmarks/sink.py        prints "listening on PORT"; ends by a signal
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

BUFFER_BYTES = 1024 * 1024
BODY = b'{"data": [{"result": "Valid"}]}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


def serve(connection: socket.socket) -> None:
    """Requests on one connection, one after the other."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    source = Source(connection)
    with suppress(OSError, ValueError), connection:
        while source.line():
            headers = dict(_headers(source))
            if headers.get("expect"):
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            if headers.get("transfer-encoding") == "chunked":
                while size := int(source.line(), 16):
                    source.skip(size + 2)
                source.line()
            else:
                source.skip(int(headers.get("content-length", 0)))
            connection.sendall(ANSWER)


class Source:
    """What comes on a connection. Raises `ValueError` when it ends within what is asked for."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._held = b""
        self._nothing = bytearray(BUFFER_BYTES)

    def line(self) -> bytes:
        """Without its end; empty at the end of all."""
        while b"\n" not in self._held:
            more = self._connection.recv(4096)
            if not more:
                return b""
            self._held += more
        line, _, self._held = self._held.partition(b"\n")
        return line.strip()

    def skip(self, count: int) -> None:
        """The kernel drops it (MSG_TRUNC, tcp(7)): nothing is copied."""
        held = self._held[:count]
        self._held = self._held[len(held) :]
        left = count - len(held)
        while left:
            dropped = self._connection.recv_into(self._nothing, min(left, BUFFER_BYTES), socket.MSG_TRUNC)
            if not dropped:
                raise ValueError("the body was cut")
            left -= dropped


def _headers(source: Source) -> list[tuple[str, str]]:
    found = []
    while line := source.line():
        name, _, value = line.decode("latin-1").partition(":")
        found.append((name.lower(), value.strip()))
    return found


def main() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        print(f"listening on {listener.getsockname()[1]}", flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
