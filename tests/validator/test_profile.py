"""Industry limits: the Auditor's rules JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ncr_validator.bench import Bench, load_profile
from ncr_validator.judgement import judge_file
from ncr_validator.limits import Limits
from ncr_validator.profile import Measured, parse_profile
from ncr_validator.verdicts import Report, Result, Severity
from validator import samples

MODEL = Measured(
    file_bytes=2048 * 1024, triangles=1000, materials=3, nodes=7, meshes=2, primitives=4, textures=(("/images/0", (300, 512)),)
)


def broken(rules: dict[str, Any], model: Measured = MODEL) -> list[str]:
    profile = parse_profile(json.dumps({"version": "1", **rules}), "test", Severity.WARNING)
    return [issue.code for issue in profile.check(model)]


@pytest.mark.parametrize(
    ("rules", "code"),
    [
        ({"fileSizeInKb": {"maximum": 2047}}, "fileSizeInKb.maximum"),
        ({"fileSizeInKb": {"minimum": 2049}}, "fileSizeInKb.minimum"),
        ({"materials": {"maximum": 2}}, "materials.maximum"),
        ({"model": {"triangles": {"maximum": 999}}}, "model.triangles.maximum"),
        ({"model": {"objectCount": {"nodes": {"maximum": 6}}}}, "model.objectCount.nodes.maximum"),
        ({"model": {"objectCount": {"meshes": {"minimum": 3}}}}, "model.objectCount.meshes.minimum"),
        ({"model": {"objectCount": {"primitives": {"maximum": 0}}}}, "model.objectCount.primitives.maximum"),
        ({"textures": {"height": {"maximum": 511}}}, "textures.height.maximum"),
        ({"textures": {"width": {"minimum": 301}}}, "textures.width.minimum"),
        ({"textures": {"requireDimensionsBePowersOfTwo": True}}, "textures.requireDimensionsBePowersOfTwo"),
        ({"textures": {"requireDimensionsBeQuadratic": True}}, "textures.requireDimensionsBeQuadratic"),
    ],
)
def test_each_rule_finds_what_breaks_it(rules: dict[str, Any], code: str) -> None:
    assert broken(rules) == [code]


def test_a_value_on_the_limit_breaks_nothing() -> None:
    assert broken({"fileSizeInKb": {"maximum": 2048, "minimum": 2048}, "materials": {"maximum": 3, "minimum": 3}}) == []


def test_minus_one_and_false_switch_a_rule_off() -> None:
    off = {"fileSizeInKb": {"maximum": -1}, "textures": {"requireDimensionsBePowersOfTwo": False, "width": {"maximum": -1}}}
    assert broken(off) == []


def test_a_count_that_is_not_known_breaks_nothing() -> None:
    assert broken({"materials": {"minimum": 1}, "model": {"triangles": {"minimum": 1}}}, Measured(1)) == []


def test_an_unknown_key_and_a_rule_not_checked_are_told() -> None:
    rules = {"version": "1", "uvs": {"requireNotInverted": True, "requireNotOverlapping": False}, "modle": {"triangles": 5}}
    profile = parse_profile(json.dumps(rules), "test", Severity.ERROR)
    assert [(note.code, note.severity) for note in profile.notes] == [
        ("PROFILE_NOT_CHECKED", Severity.INFO),
        ("PROFILE_UNKNOWN_KEY", Severity.INFO),
    ]
    assert "'modle.triangles'" in profile.notes[1].message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 1}',
        '{"version": "1", "materials": {"maximum": "5"}}',
        '{"version": "1", "materials": {"maximum": true}}',
        '{"version": "1", "textures": {"requireDimensionsBePowersOfTwo": 1}}',
    ],
)
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="profile"):
        parse_profile(text, "test", Severity.WARNING)


def test_the_profile_shipped_switches_on_only_rules_that_are_checked() -> None:
    profile = load_profile(Limits())
    assert (profile.notes, profile.name) == ((), "default")
    assert profile.rules["model.triangles.maximum"] == 100_000


def test_a_profile_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.json"):
        load_profile(Limits(profile=tmp_path / "gone.json"))


@pytest.mark.parametrize(
    ("severity", "result"), [("warning", Result.WARNING), ("error", Result.INVALID), ("info", Result.VALID)]
)
def test_a_broken_limit_counts_as_much_as_the_operator_says(
    engine: Path, tmp_path: Path, severity: Any, result: Result
) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({"version": "1", "model": {"triangles": {"maximum": 0}}}))
    (tmp_path / "m.glb").write_bytes(samples.glb())
    bench = Bench(Limits(profile=rules, profile_severity=severity))
    try:
        report = judge_file(tmp_path / "m.glb", bench)
    finally:
        bench.close()
    assert (report.result, report.profile) == (result, "rules.json")
    assert [issue.code for issue in report.issues] == ["model.triangles.maximum"]


def test_textures_are_measured_inside_the_model(judge: Callable[[Path], Report], tmp_path: Path) -> None:
    (tmp_path / "m.glb").write_bytes(samples.glb_with(samples.picture(side=60)))
    codes = [(issue.code, issue.pointer) for issue in judge(tmp_path / "m.glb").issues if issue.source == "profile"]
    assert codes == [("textures.requireDimensionsBePowersOfTwo", "/images/0")]
