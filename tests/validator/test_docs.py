"""docs/validator.md holds what the code holds."""

from __future__ import annotations

import re
from pathlib import Path

from ncr_validator.limits import Limits
from ncr_validator.profile import parse_profile
from ncr_validator.verdicts import Severity
from validator.raw_zips import CASES

DOCUMENT = (Path(__file__).parents[2] / "docs" / "validator.md").read_text()


def test_every_setting_is_documented_and_every_documented_setting_exists() -> None:
    documented = set(re.findall(r"\b(VALIDATOR_[A-Z_]+)\b", DOCUMENT)) - {"VALIDATOR_API_KEY", "VALIDATOR_ENGINE_DIR"}
    assert documented == {f"VALIDATOR_{name.upper()}" for name in Limits.model_fields}


def test_every_default_in_the_table_is_the_default() -> None:
    rows = dict(re.findall(r"^\| `VALIDATOR_([A-Z_]+)` \| ([a-z0-9]+) \|", DOCUMENT, re.MULTILINE)) | {}
    rows.pop("API_KEY")
    assert {name: str(Limits.model_fields[name.lower()].default).lower().removesuffix(".0") for name in rows} == rows


def test_every_documented_rule_is_known_to_the_profile() -> None:
    rules = re.findall(r"^\| `((?:textures|model)\.require\w+)`", DOCUMENT, re.MULTILINE)
    assert len(rules) >= 3
    for rule in rules:
        section, name = rule.split(".")
        profile = parse_profile(f'{{"version": "1", "{section}": {{"{name}": true}}}}', "test", Severity.WARNING)
        assert "PROFILE_UNKNOWN_KEY" not in {note.code for note in profile.notes}


def test_every_code_that_refuses_a_zip_is_documented() -> None:
    assert {code for code, _ in CASES.values()} <= set(re.findall(r"`(ZIP_[A-Z0-9_]+)`", DOCUMENT))
