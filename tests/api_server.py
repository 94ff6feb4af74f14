"""The API on a real socket, for tests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from ledger_twin import MemoryHost, MemoryJobQueue, MemoryLedger, MemoryStatistics, MemoryStatusBoard, MemoryWorkerReports
from ncr_upload.application.api_ports import ApiPorts, Probe
from ncr_upload.domain.jobs import Claim, Task
from ncr_upload.entrypoints.api.app import create_app
from ncr_upload.entrypoints.api.protocol import ProblemProtocol
from ncr_upload.entrypoints.settings import Settings

JOB: dict[str, Any] = {"job_id": "job-1", "username": "ann", "campaign": "spring", "row_id": 7}
SETTINGS = Settings(_env_file=None, batch_size=2)


def make_ports(
    ledger: Any,
    board: MemoryStatusBoard,
    queue: Any,
    host: MemoryHost,
    queue_name: str,
    check: Probe,
    deep_probes: Mapping[str, Probe],
    recovery: Any = None,
) -> ApiPorts:
    """With nothing known of workers and no figures. The ledger's twin is `Recovery` too."""
    reports, statistics = MemoryWorkerReports(), MemoryStatistics()
    return ApiPorts(ledger, recovery or ledger, board, queue, host, queue_name, check, deep_probes, reports, statistics)


@contextmanager
def serve(app: FastAPI) -> Iterator[httpx.Client]:
    """Run the app on a free port of 127.0.0.1; a client for it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)  # a request waits for the server to be up instead of being refused
        port = listener.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(
                app, http=ProblemProtocol, log_config=None, access_log=False, proxy_headers=False, timeout_keep_alive=60
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


@dataclass
class Site:
    """One running API and what is behind it."""

    http: httpx.Client
    ports: ApiPorts
    claims: Any
    board: MemoryStatusBoard
    queue: MemoryJobQueue
    host: MemoryHost

    def submit(self, **changes: Any) -> str:
        answer = self.http.post("/process-job", json=JOB | changes)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["task_id"])

    def claim(self, task_id: str) -> Claim:
        claim = self.claims.claim(task_id, "w1", 60)
        assert isinstance(claim, Claim)
        return claim

    def task(self, task_id: str) -> Task:
        task = self.ports.ledger.task(task_id)
        assert task is not None
        return task


@contextmanager
def start_site() -> Iterator[Site]:
    """The API on parts in memory."""
    ledger, board, queue, host = MemoryLedger(), MemoryStatusBoard(), MemoryJobQueue(), MemoryHost()
    ports = make_ports(ledger, board, queue, host, "ncr_jobs", lambda: None, {})
    with serve(create_app(ports, SETTINGS)) as http:
        yield Site(http, ports, ledger, board, queue, host)


def assert_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert (body["status"], body["code"]) == (status, code)
    assert body["type"]
    assert body["title"]
    assert body["detail"]
    assert body["next_step"]
    return body
