"""Starts `ncr dev` as a person would, and reads what it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from ncr_upload.entrypoints.embedded.endpoints import Endpoints, read_endpoints
from parts import require
from patience import until
from servers import free_port

__all__ = [
    "ENDED",
    "NCR",
    "RunningStack",
    "follow",
    "free_port",
    "read_json",
    "run_stack",
    "start_stack",
    "stop_stack",
    "until",
]

START_SECONDS = 90
NCR = (sys.executable, "-m", "ncr_upload.entrypoints.cli")
ENDED = {"completed", "validation_failed", "failed", "cancelled"}


@dataclass
class RunningStack:
    process: subprocess.Popen[bytes]
    endpoints_file: Path
    state_dir: Path
    output: Path
    family: set[psutil.Process] = field(default_factory=set)

    @property
    def endpoints(self) -> Endpoints:
        return read_endpoints(self.endpoints_file)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.endpoints["api"]["url"], timeout=15, trust_env=False)

    def note_family(self) -> None:
        """Remember every process that the stack has now."""
        self.family = set(psutil.Process(self.process.pid).children(recursive=True))

    def survivors(self) -> list[str]:
        return [str(member) for member in self.family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]


def start_stack(folder: Path, *options: str, environment: Mapping[str, str] | None = None) -> RunningStack:
    """Returns once the endpoints file is there; an early end fails with what was said."""
    folder.mkdir(exist_ok=True)
    endpoints, output = folder / "endpoints.json", folder / "output"
    command = [*NCR, "dev", "--state-dir", str(folder / "state"), "--endpoints", str(endpoints), *(options or ("--port", "0"))]
    with output.open("ab") as out:
        process = subprocess.Popen(command, cwd=folder, env=dict(os.environ) | dict(environment or {}), stdout=out, stderr=out)
    stack = RunningStack(process, endpoints, folder / "state", output)
    try:
        until(lambda: endpoints.exists() or process.poll() is not None, START_SECONDS)
        assert process.poll() is None, output.read_text()
        stack.note_family()
    except BaseException:
        process.kill()
        raise
    return stack


@contextmanager
def run_stack(folder: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[RunningStack]:
    """Run a stack until the block ends."""
    require("rclone")
    stack = start_stack(folder, *options, environment=environment)
    try:
        yield stack
    finally:
        stop_stack(stack)


def stop_stack(stack: RunningStack) -> int:
    stack.process.send_signal(signal.SIGTERM)
    try:
        return stack.process.wait(40)
    finally:
        stack.process.kill()
        stack.process.wait()


def follow(client: httpx.Client, task_id: str, seconds: float = 60) -> dict[str, Any]:
    """The last status of a task."""
    found: dict[str, Any] = {}

    def ended() -> bool:
        response = client.get(f"/job-status/{task_id}")
        assert response.status_code == 200, response.text
        found.update(response.json())
        return found["status"] in ENDED

    until(ended, seconds)
    return found


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
