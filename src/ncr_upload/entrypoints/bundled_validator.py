"""The bundled validator beside a worker that was given no VALIDATOR_API_URL."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import structlog

from ncr_upload.entrypoints.embedded import launch

log = structlog.get_logger("ncr.validator")
RESTART_SECONDS = 1.0


class BundledValidator:
    """One validator process on loopback, with a key of its own; started again whenever it ends, gone with the worker."""

    def __init__(self) -> None:
        self._port = _free_port()
        self._key = secrets.token_urlsafe(24)

    def start(self) -> dict[str, str]:
        """Start it; returns the settings that lead to it."""
        threading.Thread(target=self._keep, name="validator", daemon=True).start()
        return {"VALIDATOR_API_URL": f"http://127.0.0.1:{self._port}/validate", "VALIDATOR_API_KEY": self._key}

    def _keep(self) -> None:
        # The process dies with the thread that started it, so this thread lives as long as the worker.
        command = [sys.executable, "-m", "ncr_validator", "serve", "--host", "127.0.0.1", "--port", str(self._port)]
        wrapper = [sys.executable, "-I", "-S", str(Path(launch.__file__)), str(os.getpid())]
        search = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "VALIDATOR_API_KEY": self._key, "PYTHONPATH": search}
        while True:
            log.info("bundled_validator_starts", port=self._port)
            code = subprocess.run([*wrapper, *command], env=environment, check=False).returncode  # noqa: S603 - our own
            log.warning("bundled_validator_ended", exit_code=code, next_step="It is started again; its log says why it ended.")
            time.sleep(RESTART_SECONDS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
