"""docs/state_machine.md says exactly what domain/jobs.py allows."""

from __future__ import annotations

import re
from pathlib import Path

from ncr_upload.domain.jobs import TERMINAL, TRANSITIONS, Stage, Status
from ncr_upload.domain.retries import ErrorClass, RetryLimits, find_policy

DOCUMENT = (Path(__file__).parents[2] / "docs" / "state_machine.md").read_text()
ROW = re.compile(r"^\| (\w+) \| (\w+) \| .+ \|$", re.MULTILINE)


def test_the_table_lists_every_legal_move_and_no_other() -> None:
    listed = {(now, then) for now, then in ROW.findall(DOCUMENT) if now in set(Status)}
    assert listed == {(now.value, then.value) for now, followers in TRANSITIONS.items() for then in followers}


def test_every_status_and_stage_is_named() -> None:
    assert [word for word in (*Status, *Stage) if word.value not in DOCUMENT] == []


def test_final_statuses_lead_nowhere() -> None:
    assert {status for status, followers in TRANSITIONS.items() if not followers} == TERMINAL


def test_the_table_of_error_classes_is_the_policy() -> None:
    limits = RetryLimits(max_attempts=5, base_seconds=5, max_seconds=300)
    rows = re.findall(r"^\| (\w+) \| ([\w ]+) \| (\d+) \| (yes|no) \| (.+) \|$", DOCUMENT, re.MULTILINE)
    told = {row[0]: row[1:] for row in rows}
    assert told == {
        each.value: (
            "no limit" if policy.attempts is None else str(policy.attempts),
            f"{policy.base_seconds:g}",
            "yes" if policy.spends_attempt else "no",
            policy.because,
        )
        for each in ErrorClass
        for policy in [find_policy(each, limits)]
    }
