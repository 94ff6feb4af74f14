"""USDZ: what the zip alone shows, and what usd-core adds."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from ncr_validator.limits import Limits
from ncr_validator.usdz import check_zip
from ncr_validator.verdicts import Report, Result, Severity
from validator import samples

needs_usd = pytest.mark.skipif(
    find_spec("pxr") is None and not os.environ.get("CI"), reason="usd-core is not installed (extra 'usd')"
)


def codes(path: Path) -> set[str]:
    return {issue.code for issue in check_zip(path, Limits())}


def test_a_sound_usdz_has_no_issue(tmp_path: Path) -> None:
    entries = {"model.usda": samples.LAYER, "0/wood.png": samples.picture(), "0/wood.jpg": samples.picture("JPEG")}
    assert codes(samples.usdz(tmp_path / "a.usdz", entries)) == set()


def test_a_compressed_file_is_an_error(tmp_path: Path) -> None:
    assert codes(samples.usdz(tmp_path / "a.usdz", method=zipfile.ZIP_DEFLATED)) == {"USDZ_COMPRESSED"}


def test_data_off_the_64_byte_grid_is_an_error(tmp_path: Path) -> None:
    assert codes(samples.usdz(tmp_path / "a.usdz", align=1)) == {"USDZ_MISALIGNED"}


def test_the_first_file_must_be_a_layer(tmp_path: Path) -> None:
    entries = {"0/wood.png": samples.picture(), "model.usda": samples.LAYER}
    assert codes(samples.usdz(tmp_path / "a.usdz", entries)) == {"USDZ_NO_ROOT_LAYER"}


@pytest.mark.parametrize("name", ["wood.tga", "run.sh", "model.glb", "noextension"])
def test_a_file_type_outside_the_list_is_an_error(tmp_path: Path, name: str) -> None:
    assert codes(samples.usdz(tmp_path / "a.usdz", {"model.usda": samples.LAYER, name: b"1"})) == {"USDZ_FILE_TYPE"}


def test_a_damaged_texture_inside_is_an_error(tmp_path: Path) -> None:
    entries = {"model.usda": samples.LAYER, "0/wood.png": samples.damaged(samples.picture())}
    assert codes(samples.usdz(tmp_path / "a.usdz", entries)) == {"IMAGE_CORRUPT"}


def test_a_wrong_crc_inside_is_an_error(tmp_path: Path) -> None:
    path = samples.usdz(tmp_path / "a.usdz")
    path.write_bytes(path.read_bytes().replace(b'upAxis = "Y"', b'upAxis = "Z"'))
    assert codes(path) == {"USDZ_CORRUPT_ENTRY"}


@pytest.mark.parametrize("content", [b"", b"<Error/>", bytes(500)])
def test_what_is_no_zip_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.usdz"
    path.write_bytes(content)
    assert codes(path) == {"USDZ_ZIP_UNREADABLE"}


def test_a_path_out_of_the_usdz_is_an_error(tmp_path: Path) -> None:
    path = samples.usdz(tmp_path / "a.usdz", {"model.usda": samples.LAYER, "../wood.png": samples.picture()})
    assert "USDZ_ZIP_UNSAFE_NAME" in codes(path)


@needs_usd
def test_a_sound_usdz_is_valid_with_usd_core(judge: Callable[[Path], Report], tmp_path: Path) -> None:
    report = judge(samples.usdz(tmp_path / "a.usdz"))
    assert (report.result, report.files[0].facts) == (Result.VALID, {"usd-core": True})


@needs_usd
@pytest.mark.parametrize("layer", [b"#usda 1.0\ndef Broken {{{", b"not a layer", samples.LAYER.replace(b"#usda", b"#no")])
def test_a_layer_that_cannot_be_opened_is_invalid(judge: Callable[[Path], Report], tmp_path: Path, layer: bytes) -> None:
    report = judge(samples.usdz(tmp_path / "a.usdz", {"model.usda": layer}))
    assert "USD_UNREADABLE" in {issue.code for issue in report.issues if issue.severity is Severity.ERROR}


@needs_usd
def test_a_reference_to_a_missing_file_is_invalid_with_usd_core(judge: Callable[[Path], Report], tmp_path: Path) -> None:
    layer = samples.LAYER.replace(b'def Xform "Root"', b'def Xform "Root" (\n    references = @./gone.usda@\n)')
    report = judge(samples.usdz(tmp_path / "a.usdz", {"model.usda": layer}))
    assert report.result is Result.INVALID
    assert all(str(tmp_path) not in issue.message for issue in report.issues)


@needs_usd
def test_findings_outside_the_packaging_rules_are_warnings(judge: Callable[[Path], Report], tmp_path: Path) -> None:
    layer = samples.LAYER.replace(b"    metersPerUnit = 1\n", b"")
    report = judge(samples.usdz(tmp_path / "a.usdz", {"model.usda": layer}))
    assert (report.result, len(report.issues)) == (Result.WARNING, 1)


def test_a_usdz_in_a_package_is_judged(judge: Callable[..., Report], tmp_path: Path) -> None:
    inner = samples.usdz(tmp_path / "a.usdz", method=zipfile.ZIP_DEFLATED).read_bytes()
    assert zipfile.is_zipfile(io.BytesIO(inner))
    report = judge(samples.package(tmp_path / "a.zip", **{"SKU1/usdz/a.usdz": inner}))
    assert ("SKU1/usdz/a.usdz", "USDZ_COMPRESSED") in {(issue.file, issue.code) for issue in report.issues}


def test_a_compressed_entry_that_is_damaged_is_an_issue(tmp_path: Path) -> None:
    path = samples.usdz(tmp_path / "a.usdz", {"model.usda": samples.LAYER * 20}, method=zipfile.ZIP_DEFLATED)
    path.write_bytes(samples.damaged(path.read_bytes(), 0.25, 24))
    assert codes(path) == {"USDZ_COMPRESSED", "USDZ_CORRUPT_ENTRY"}
