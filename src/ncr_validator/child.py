"""A bounded child process that answers one JSON line for each JSON line, and may die without taking us along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import IO, Any

from ncr_validator.limits import MB

_MEMORY_MARKS = (b"heap out of memory", b"allocation failed", b"std::bad_alloc", b"MemoryError", b"Cannot allocate memory")


class Death(StrEnum):
    """Why a child gave no answer."""

    TIMEOUT = "timeout"
    MEMORY = "memory"
    CRASH = "crash"


class ChildDied(Exception):
    """The child ended while it was asked. `why` is MEMORY only when the child itself ran into its own bound."""

    def __init__(self, name: str, why: Death, detail: str) -> None:
        super().__init__(f"the {name} ended without an answer: {detail}")
        self.name = name
        self.why = why


class Child:
    """Started at the first question and again after each death or after `max_asks` questions.

    The child has a bound on its private memory (Linux: RLIMIT_DATA), writes no files and no core, and does not see
    our environment. Two threads that ask wait for each other.
    """

    def __init__(self, name: str, argv: Sequence[str], *, memory_mb: int, max_asks: int, env: Mapping[str, str]) -> None:
        self._name = name
        self._argv = list(argv)
        self._memory_mb = memory_mb
        self._max_asks = max_asks
        self._env = dict(env)
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._asks = 0
        self._turn = threading.Lock()
        self._closed = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def ask(self, question: Mapping[str, Any], timeout_seconds: float) -> dict[str, Any]:
        """The child's answer. Raises `ChildDied`; the next question then meets a fresh child."""
        with self._turn:
            return self._ask(question, timeout_seconds)

    def close(self) -> None:
        """End the child for good, also one that is just being asked. Harmless when there is none."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()
        with self._turn:
            self._clear()

    def _ask(self, question: Mapping[str, Any], timeout_seconds: float) -> dict[str, Any]:
        process = self._running()
        self._asks += 1
        timed_out = threading.Event()

        def expire() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(timeout_seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            answer = self._exchange(process, question)
        finally:
            timer.cancel()
        if answer is None:
            raise self._autopsy(process, timed_out.is_set(), timeout_seconds)
        return answer

    def _clear(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, self._stderr):
                if stream is not None:
                    try:
                        stream.close()
                    except BrokenPipeError:
                        continue

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and (self._asks >= self._max_asks or self._process.poll() is not None):
            self._clear()
        if self._closed:
            raise ChildDied(self._name, Death.CRASH, "the validator is stopping")
        if self._process is None:
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in _clear()
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                self._argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=self._env,
                cwd=os.sep,
                start_new_session=True,  # Ctrl-C is for us; the child ends when its stdin does
            )
            self._asks = 0
            _bound(self._process.pid, self._memory_mb)
        return self._process

    @staticmethod
    def _exchange(process: subprocess.Popen[bytes], question: Mapping[str, Any]) -> dict[str, Any] | None:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            return None
        if not line.endswith(b"\n"):
            return None
        try:
            answer = json.loads(line)
        except ValueError:
            return None
        return answer if isinstance(answer, dict) else None

    def _autopsy(self, process: subprocess.Popen[bytes], timed_out: bool, timeout_seconds: float) -> ChildDied:
        process.kill()
        status = process.wait()
        last_words = b""
        if self._stderr is not None:
            size = self._stderr.seek(0, os.SEEK_END)
            self._stderr.seek(max(0, size - 8192))
            last_words = self._stderr.read()
        self._clear()
        if timed_out:
            return ChildDied(self._name, Death.TIMEOUT, f"no answer in {timeout_seconds:g} s")
        if any(mark in last_words for mark in _MEMORY_MARKS):
            return ChildDied(self._name, Death.MEMORY, f"it needed more than its {self._memory_mb} MB")
        return ChildDied(self._name, Death.CRASH, f"exit status {status}")


def _bound(pid: int, memory_mb: int) -> None:
    """Set the child's limits from outside (no code of ours runs between fork and exec)."""
    if sys.platform != "linux":
        return
    import resource  # noqa: PLC0415 - Unix only

    bounds = {
        resource.RLIMIT_DATA: memory_mb * MB,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: MB,
    }
    for which, value in bounds.items():
        try:
            resource.prlimit(pid, which, (value, value))
        except ProcessLookupError:  # died at once; the question will find out
            return
