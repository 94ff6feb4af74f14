"""What a run found out, and how it says so."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx


class Failed(Exception):
    """A promise that did not hold; the message says which."""


@dataclass
class Report:
    """What deploy.json holds."""

    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.wrong.append(otherwise)
            say(f"WRONG: {otherwise}")

    def timed(self, name: str, act: Callable[[], object]) -> None:
        """Do it, say so, and keep how long it took as the fact `NAME_seconds`."""
        say(name.replace("_", " "))
        began = time.monotonic()
        act()
        self.facts[f"{name}_seconds"] = round(time.monotonic() - began, 1)


def say(line: str) -> None:
    sys.stderr.write(f"[{time.strftime('%H:%M:%S')}] {line}\n")
    sys.stderr.flush()


def wait(holds: Callable[[], bool], otherwise: str, seconds: float = 240) -> None:
    """Raises `Failed` with `otherwise` when it does not come to hold."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(httpx.TransportError):
            if holds():
                return
        if time.monotonic() > deadline:
            raise Failed(otherwise)
        time.sleep(0.3)
