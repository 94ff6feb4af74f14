"""docs/state_machine.md says exactly what domain/jobs.py allows."""

from __future__ import annotations

import re
from pathlib import Path

from ncr_upload.domain.jobs import TERMINAL, TRANSITIONS, Stage, Status

DOCUMENT = (Path(__file__).parents[2] / "docs" / "state_machine.md").read_text()
ROW = re.compile(r"^\| (\w+) \| (\w+) \| .+ \|$", re.MULTILINE)


def test_the_table_lists_every_legal_move_and_no_other() -> None:
    listed = {(now, then) for now, then in ROW.findall(DOCUMENT) if now in set(Status)}
    assert listed == {(now.value, then.value) for now, followers in TRANSITIONS.items() for then in followers}


def test_every_status_and_stage_is_named() -> None:
    assert [word for word in (*Status, *Stage) if word.value not in DOCUMENT] == []


def test_final_statuses_lead_nowhere() -> None:
    assert {status for status, followers in TRANSITIONS.items() if not followers} == TERMINAL
