"""Callers of every kind, all the time: submits, polls, slow requests. Whatever is not answered as it should be is kept."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

SECONDS = 30.0
SLOW_SECONDS = 5.0
POLL_SECONDS = 0.1
POLLED = 20
"""So many of the newest tasks are asked for."""


@dataclass
class Load:
    """`jobs` are ids that await upload; each is submitted once. `failures` are by phase."""

    port: int
    key: str
    jobs: list[str]
    every_seconds: float = 2.0
    phase: str = "start"
    accepted: dict[str, str] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._lock = threading.Lock()
        loops: list[Callable[[], None]] = [self._submit, self._poll, self._poll, self._ask_slowly, self._list]
        self._threads = [threading.Thread(target=self._keep, args=(loop,), daemon=True) for loop in loops]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(SECONDS + SLOW_SECONDS)

    def failed_in(self, phase: str) -> list[dict[str, str]]:
        return [failure for failure in self.failures if failure["phase"] == phase]

    def _keep(self, loop: Callable[[], None]) -> None:
        while not self._stop.is_set():
            loop()

    def _submit(self) -> None:
        """A job that is refused for being in flight already was accepted by a request whose answer got lost: a failure."""
        if not self.jobs:
            self._stop.wait(0.2)
            return
        job_id = self.jobs.pop()
        answer = self._ask("submit", "POST", "/process-job", {"job_id": job_id, "username": "load", "campaign": "deploy"}, 202)
        with self._lock:
            if answer is not None:
                self.accepted[job_id] = answer["task_id"]
        self._stop.wait(self.every_seconds)

    def _poll(self) -> None:
        with self._lock:
            task_ids = list(self.accepted.values())[-POLLED:]
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)) as kept_open:
            for task_id in task_ids:
                self._ask("poll", "GET", f"/job-status/{task_id}", None, 200, kept_open)
                self._stop.wait(POLL_SECONDS)
        self._stop.wait(POLL_SECONDS)

    def _list(self) -> None:
        self._ask("list", "GET", "/jobs/active", None, 200)
        self._stop.wait(0.3)

    def _ask(
        self,
        kind: str,
        method: str,
        path: str,
        body: Any,
        expected: int,
        kept_open: http.client.HTTPConnection | None = None,
    ) -> Any:
        connection = kept_open or http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        phase = self.phase
        try:
            text = json.dumps(body) if body is not None else None
            connection.request(method, path, text, {"X-API-Key": self.key, "Content-Type": "application/json"})
            response = connection.getresponse()
            return self._judge(kind, phase, response.status, response.read(), expected)
        except (OSError, http.client.HTTPException) as error:
            self._note(kind, phase, f"{method} {path}: {type(error).__name__}: {error}")
            connection.close()
            return None
        finally:
            if kept_open is None:
                connection.close()

    def _ask_slowly(self) -> None:
        """A request that takes its time, as over a bad line: its body comes in drops."""
        body = json.dumps([{"job_id": "nobody", "username": "slow", "campaign": 7}]).encode()
        head = f"POST /process-batch HTTP/1.1\r\nHost: x\r\nX-API-Key: {self.key}\r\nContent-Type: application/json\r\n"
        phase = self.phase
        try:
            with socket.create_connection(("127.0.0.1", self.port), SECONDS) as line:
                line.sendall(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode())
                for place in range(len(body)):
                    line.sendall(body[place : place + 1])
                    time.sleep(SLOW_SECONDS / len(body))
                response = http.client.HTTPResponse(line)
                response.begin()
                self._judge("slow", phase, response.status, response.read(), 422)
        except (OSError, http.client.HTTPException) as error:
            self._note("slow", phase, f"slow POST /process-batch: {type(error).__name__}: {error}")
            self._stop.wait(POLL_SECONDS)

    def _judge(self, kind: str, phase: str, status: int, body: bytes, expected: int) -> Any:
        if status != expected:
            self._note(kind, phase, f"{kind}: {status} instead of {expected}: {body[:300]!r}")
            return None
        with self._lock:
            self.requests[kind] += 1
        return json.loads(body)

    def _note(self, kind: str, phase: str, what: str) -> None:
        with self._lock:
            self.requests[kind] += 1
            self.failures.append({"phase": phase, "kind": kind, "what": what, "at": time.strftime("%H:%M:%S")})
