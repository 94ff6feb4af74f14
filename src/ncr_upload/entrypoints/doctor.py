"""`ncr doctor`: tries every outside part with the current settings and says what is right, what is wrong and what to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

from ncr_upload.domain.errors import DeliveryError
from ncr_upload.domain.redaction import NO_SECRETS, Redactor
from ncr_upload.domain.text import MESSAGE

PART_SECONDS = 12.0


@dataclass(frozen=True, slots=True)
class Doubt:
    """Works, but is not as it should be."""

    told: str
    next_step: str


Check = Callable[[], Iterator[str | Doubt | DeliveryError]]
"""Tries one part: yields what is right or doubtful about it, or wrong beside other things, and raises a `DeliveryError` at what
is wrong and ends the check."""


class State(StrEnum):
    RIGHT = "right"
    DOUBTFUL = "doubtful"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found out about a part."""

    part: str
    state: State
    told: str
    code: str | None = None
    next_step: str | None = None

    def to_json(self) -> dict[str, str]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def examine(checks: Mapping[str, Check], seconds: float = PART_SECONDS, redactor: Redactor = NO_SECRETS) -> list[Finding]:
    """Run all checks side by side, each for `seconds` at most; findings in the order of the checks, without secrets."""
    found: dict[str, list[Finding]] = {part: [] for part in checks}
    threads = {
        part: threading.Thread(target=_examine_part, args=(part, check, found[part]), daemon=True)
        for part, check in checks.items()
    }
    for thread in threads.values():
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads.values():
        thread.join(max(0.0, deadline - time.monotonic()))
    every = [finding for part, thread in threads.items() for finding in _told_by(part, thread, list(found[part]), seconds)]
    return [replace(finding, told=redactor.bound(finding.told, MESSAGE)) for finding in every]


def _told_by(part: str, thread: threading.Thread, found: list[Finding], seconds: float) -> list[Finding]:
    if not thread.is_alive():
        return found
    step = "See that it runs and that nothing between it and this machine drops packets."
    return [*found, Finding(part, State.WRONG, f"no answer within {seconds:g} s", "no_answer", step)]


def _examine_part(part: str, check: Check, found: list[Finding]) -> None:
    try:
        for told in check():
            if isinstance(told, Doubt):
                found.append(Finding(part, State.DOUBTFUL, told.told, next_step=told.next_step))
            elif isinstance(told, DeliveryError):
                found.append(Finding(part, State.WRONG, told.message, told.code, told.next_step))
            else:
                found.append(Finding(part, State.RIGHT, told))
    except DeliveryError as error:
        found.append(Finding(part, State.WRONG, error.message, error.code, error.next_step))
    except Exception as error:  # noqa: BLE001 - a check that breaks must not hide the others
        # Its text may hold anything, a secret too.
        step = "This is a fault of the check itself: report it with the version and the setting concerned."
        found.append(Finding(part, State.WRONG, f"the check failed: {type(error).__name__}", "check_failed", step))


def is_well(findings: list[Finding]) -> bool:
    return all(finding.state is not State.WRONG for finding in findings)


MARKS = {State.RIGHT: "ok  ", State.DOUBTFUL: "hmm ", State.WRONG: "BAD "}


def render(findings: list[Finding]) -> str:
    """One line per finding, with its next step below where there is one."""
    width = max((len(finding.part) for finding in findings), default=0)
    lines: list[str] = []
    for finding in findings:
        lines.append(f"{MARKS[finding.state]} {finding.part:<{width}}  {finding.told}")
        if finding.next_step:
            lines.append(f"     {'':<{width}}  → {finding.next_step}")
    wrong = sorted({finding.part for finding in findings if finding.state is State.WRONG})
    lines.append(f"wrong: {', '.join(wrong)}" if wrong else "everything that was tried works")
    return "\n".join(lines)
