"""A few keep-alive connections, each sending its next request as soon as it has its answer. Light, so that what is measured is
the server."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import uvloop


@dataclass
class Load:
    """`seconds` in all, of each request in `latencies`; the answers' bodies, as they came."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    @property
    def p99_ms(self) -> float:
        return 1000 * sorted(self.latencies)[int(0.99 * len(self.latencies))]


def post(path: str, body: Any) -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


def send(port: int, requests: Iterable[bytes], status: int, *, connections: int) -> Load:
    """Raises `AssertionError` at an answer of another status."""
    waiting, load = deque(requests), Load()

    async def run() -> None:
        began = time.perf_counter()
        await asyncio.gather(*(_talk(port, waiting, load, b"HTTP/1.1 %d " % status) for _ in range(connections)))
        load.seconds = time.perf_counter() - began

    uvloop.run(run())
    return load


async def _talk(port: int, waiting: deque[bytes], load: Load, expected: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while waiting:
        request = waiting.popleft()
        began = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(size)
        load.latencies.append(time.perf_counter() - began)
        assert head.startswith(expected), head + body
        load.bodies.append(body)
    writer.close()
