"""An API that is told to stop serves on until whoever spreads the requests has turned away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from patience import allowed, until
from running_stack import NCR
from servers import free_port

JOB = {"job_id": "job-1", "username": "ann", "campaign": "spring"}
AT_ONCE_SECONDS = 10.0
"""A stop that waits for no drain: uvicorn closes its sockets and Python ends."""


@pytest.fixture
def api(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    port = free_port()
    settings = {
        "API_HOST": "127.0.0.1",
        "API_PORT": str(port),
        "API_DRAIN_SECONDS": getattr(request, "param", "6"),
        "REDIS_PORT": "1",
        "DATABASE_URL": f"sqlite:///{tmp_path}/ncr.db",
        "MAX_MEMORY_USAGE_PERCENT": "99.9",
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*NCR, "api"], cwd=tmp_path, env=dict(os.environ) | settings, stderr=log)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=15, trust_env=False) as client:
        try:
            until(lambda: answers(client), 90)
            yield process, client
        finally:
            process.kill()
            process.wait()


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_after_sigterm_the_api_says_not_ready_and_still_accepts_jobs(
    api: tuple[subprocess.Popen[bytes], httpx.Client], tmp_path: Path
) -> None:
    process, client = api
    process.send_signal(signal.SIGTERM)
    until(lambda: client.get("/readyz").status_code == 503)
    assert client.get("/readyz").json()["code"] == "leaving"
    assert client.post("/process-job", json=JOB).status_code == 202
    assert client.get("/livez").status_code == 200
    assert process.wait(60) == 0
    assert '"drained"' in (tmp_path / "log").read_text()


@pytest.mark.parametrize("api", ["600"], indirect=True)
def test_a_second_sigterm_stops_a_draining_api_at_once(
    api: tuple[subprocess.Popen[bytes], httpx.Client], tmp_path: Path
) -> None:
    process, client = api
    process.send_signal(signal.SIGTERM)
    until(lambda: client.get("/readyz").status_code == 503)
    process.send_signal(signal.SIGTERM)
    process.wait(allowed(AT_ONCE_SECONDS))  # the drain alone would take ten minutes
    assert '"drained"' not in (tmp_path / "log").read_text()


def test_without_a_drain_time_sigterm_stops_the_api_at_once(tmp_path: Path) -> None:
    settings = {"API_HOST": "127.0.0.1", "API_PORT": str(free_port()), "DATABASE_URL": f"sqlite:///{tmp_path}/ncr.db"}
    process = subprocess.Popen([*NCR, "api"], cwd=tmp_path, env=dict(os.environ) | settings, stderr=subprocess.DEVNULL)
    try:
        until(lambda: answers(httpx.Client(base_url=f"http://127.0.0.1:{settings['API_PORT']}", trust_env=False)), 90)
        process.send_signal(signal.SIGTERM)
        process.wait(allowed(AT_ONCE_SECONDS))
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGTERM


TOLD_WHILE_IT_TIDIES = """
import os, signal, weakref
from ncr_upload.entrypoints.programs import end_when_told

class Thing: pass

end_when_told()
thing = Thing()
watched = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
del thing
print("still here")
"""


def test_a_program_that_is_told_to_stop_while_it_starts_does_whatever_python_is_at() -> None:
    done = subprocess.run([sys.executable, "-c", TOLD_WHILE_IT_TIDIES], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
