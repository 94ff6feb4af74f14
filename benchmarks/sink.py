"""A validator that reads the whole body and answers "Valid": the same for our side and the baseline, as cheap as can be.

python benchmarks/sink.py        prints "listening on PORT"; ends by a signal
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import BinaryIO

BUFFER_BYTES = 1024 * 1024
BODY = b'{"data": [{"result": "Valid"}]}'
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


def serve(connection: socket.socket) -> None:
    """Requests on one connection, one after the other."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with suppress(OSError, ValueError), connection, connection.makefile("rb", buffering=BUFFER_BYTES) as source:
        buffer = bytearray(BUFFER_BYTES)
        while source.readline().strip():
            headers = dict(_headers(source))
            if headers.get("expect"):
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            if headers.get("transfer-encoding") == "chunked":
                while size := int(source.readline(), 16):
                    _skip(source, size + 2, buffer)
                source.readline()
            else:
                _skip(source, int(headers.get("content-length", 0)), buffer)
            connection.sendall(ANSWER)


def _headers(source: BinaryIO) -> list[tuple[str, str]]:
    found = []
    while line := source.readline().strip():
        name, _, value = line.decode("latin-1").partition(":")
        found.append((name.lower(), value.strip()))
    return found


def _skip(source: BinaryIO, count: int, buffer: bytearray) -> None:
    """Read so many bytes. Raises `ValueError` when they end before."""
    view = memoryview(buffer)
    while count:
        read = source.readinto(view[: min(count, len(buffer))])  # type: ignore[attr-defined]
        if not read:
            raise ValueError("the body was cut")
        count -= read


def main() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        print(f"listening on {listener.getsockname()[1]}", flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
