"""The bundled validator agrees with the field on every sample asset."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from ncr_validator.bench import Bench
from ncr_validator.judgement import judge_file
from ncr_validator.limits import Limits
from ncr_validator.verdicts import Report, Result, Severity
from parts import miss
from validator.samples import ASSETS

KHRONOS_MISSES = {"mixer_png_corrupt.glb": "IMAGE_CORRUPT", "wicker_draco_corrupt.glb": "DRACO_CORRUPT"}
ONLY_USD_CORE_SEES = {"CesiumMan.usdz", "InterpolationTest.usdz"}

pytestmark = pytest.mark.skipif(not ASSETS.is_dir(), reason="the sample assets are not beside the repository")


def expected() -> list[tuple[Path, str]]:
    return [
        (ASSETS / kind / sample["file"], "Invalid" if sample["file"] in KHRONOS_MISSES else sample["verdict"])
        for kind in ("valid", "invalid")
        if (ASSETS / kind / "expected.json").is_file()
        for sample in json.loads((ASSETS / kind / "expected.json").read_text())
    ]


@pytest.mark.parametrize(("path", "verdict"), expected(), ids=lambda value: value.name if isinstance(value, Path) else "")
def test_the_verdict_on_a_sample_is_that_of_the_field(judge: Callable[[Path], Report], path: Path, verdict: str) -> None:
    if path.name in ONLY_USD_CORE_SEES and find_spec("pxr") is None:
        miss("usd-core is not installed (extra 'usd')")
    report = judge(path)
    assert (report.result.value, [i for i in report.issues if i.severity is Severity.ERROR and verdict != "Invalid"]) == (
        verdict,
        [],
    )


@pytest.mark.parametrize(("name", "code"), KHRONOS_MISSES.items())
def test_damage_that_the_khronos_engine_passes_is_found(judge: Callable[[Path], Report], name: str, code: str) -> None:
    errors = [issue for issue in judge(ASSETS / "invalid" / name).issues if issue.severity is Severity.ERROR]
    assert {issue.code for issue in errors} == {code}


def test_without_usd_core_the_broken_usdz_stay_invalid_and_the_others_are_valid(engine: Path) -> None:
    bench = Bench(Limits(usd=False))
    try:
        results = {path.name: judge_file(path, bench).result for path, _ in expected() if path.suffix == ".usdz"}
        assert bench.engines()["usd-core"] is None
    finally:
        bench.close()
    assert {name for name, result in results.items() if result is Result.VALID} == ONLY_USD_CORE_SEES
    assert {result for name, result in results.items() if name not in ONLY_USD_CORE_SEES} == {Result.INVALID}
