"""The bundled validator beside a worker that was given no VALIDATOR_API_URL."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

import httpx
import structlog

from ncr_upload.entrypoints.embedded import launch
from ncr_upload.entrypoints.embedded.sockets import LOOPBACK, find_free_port
from ncr_upload.entrypoints.settings import Settings

log = structlog.get_logger("ncr.validator")
READY_SECONDS = 20.0
RESTART_SECONDS = 1.0
NOT_STARTED = 2
NOT_STARTED_SECONDS = 10.0


class BundledValidator:
    """One validator process on loopback, with a key of its own; started again whenever it ends, gone with the worker.

    What it prints goes to this process's log. Its engine is fetched by npm (held against a hash) where it is missing.
    """

    def __init__(self) -> None:
        self._port = find_free_port(set())
        self._key = secrets.token_urlsafe(24)

    def start(self) -> dict[str, str]:
        """Start it, give it READY_SECONDS to get ready, and return the settings that lead to it."""
        threading.Thread(target=self._keep, name="validator", daemon=True).start()
        self._wait_until_ready()
        return {
            "VALIDATOR_API_URL": f"http://{LOOPBACK}:{self._port}/validate",
            "VALIDATOR_API_KEY": self._key,
            "VALIDATOR_API_KEY_HEADER": "X-API-Key",
        }

    def _keep(self) -> None:
        # The process dies with the thread that started it, so this thread lives as long as the worker.
        while True:
            log.info("bundled_validator_starts", port=self._port)
            code = self._run("serve", "--host", LOOPBACK, "--port", str(self._port))
            log.warning("bundled_validator_ended", exit_code=code, next_step="It is started again; the lines before say why.")
            if code == NOT_STARTED and self._run("fetch-engine") != 0:
                time.sleep(NOT_STARTED_SECONDS)
            time.sleep(RESTART_SECONDS)

    def _run(self, *arguments: str) -> int:
        wrapper = [sys.executable, "-I", "-S", str(Path(launch.__file__)), str(os.getpid())]
        process = subprocess.Popen(  # noqa: S603 - our own
            [*wrapper, sys.executable, "-m", "ncr_validator", *arguments],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,  # Ctrl-C is the worker's, which finishes its jobs and needs the validator for them
        )
        threading.Thread(target=_log_lines, args=(process.stdout,), name="validator-log", daemon=True).start()
        return process.wait()

    def _environment(self) -> dict[str, str]:
        """Without the service's settings: a program that opens strangers' files has no use for its secrets."""
        kept = {name: value for name, value in os.environ.items() if name.lower() not in Settings.model_fields}
        search = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        return kept | {"VALIDATOR_API_KEY": self._key, "PYTHONPATH": search}

    def _wait_until_ready(self) -> None:
        address = f"http://{LOOPBACK}:{self._port}/healthz"
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            try:
                if httpx.get(address, timeout=2, trust_env=False).status_code == httpx.codes.OK:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        log.warning("bundled_validator_not_ready", next_step="Jobs are tried again until it is; the lines before say why.")


def _log_lines(lines: IO[str]) -> None:
    for line in lines:
        log.info("bundled_validator", line=line.rstrip())
