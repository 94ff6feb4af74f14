"""Stand-alone textures: body, name and size."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from ncr_validator.images import check_image
from ncr_validator.verdicts import Report, Result, Severity, decide
from validator import samples

FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "webp": "WEBP",
    "tga": "TGA",
    "bmp": "BMP",
    "gif": "GIF",
    "tiff": "TIFF",
}
LIMIT = 10_000_000


def check(data: bytes, extension: str) -> list[tuple[str, str]]:
    issues, _ = check_image(io.BytesIO(data), extension, LIMIT)
    return [(issue.code, issue.severity.value) for issue in issues]


@pytest.mark.parametrize(("extension", "format_"), FORMATS.items())
def test_a_sound_image_has_no_issue(extension: str, format_: str) -> None:
    assert check(samples.picture(format_), extension) == []


@pytest.mark.parametrize(("extension", "format_"), [item for item in FORMATS.items() if item[0] != "tiff"])
def test_a_cut_off_image_is_an_error(extension: str, format_: str) -> None:
    data = samples.picture(format_)
    assert [severity for _, severity in check(data[: len(data) // 2], extension)] == ["error"]


def test_flipped_bytes_in_a_png_are_an_error() -> None:
    assert check(samples.damaged(samples.picture()), "png") == [("IMAGE_CORRUPT", "error")]


@pytest.mark.parametrize("extension", sorted(FORMATS))
@pytest.mark.parametrize("content", [b"", b"\x00", b"<Error>NoSuchKey</Error>" * 10])
def test_what_is_no_image_is_at_least_a_warning_and_an_error_for_common_types(extension: str, content: bytes) -> None:
    assert [severity for _, severity in check(content, extension)] == ["warning" if extension == "tiff" else "error"]


def test_an_image_under_another_formats_name_is_a_warning() -> None:
    assert check(samples.picture("JPEG"), "png") == [("IMAGE_FORMAT_MISMATCH", "warning")]
    assert check(samples.picture("PNG"), "tga") == [("IMAGE_FORMAT_MISMATCH", "warning")]


@pytest.mark.parametrize("data", [samples.png_of(30_000, 30_000), samples.png_of(2_000_000, 6)])
def test_an_image_bomb_is_refused_before_it_is_decoded(data: bytes) -> None:
    assert check(data, "png") == [("IMAGE_TOO_LARGE", "error")]


def test_the_pixel_limit_is_inclusive() -> None:
    image = samples.picture(side=64)
    for limit, codes in ((64 * 64, []), (64 * 64 - 1, ["IMAGE_TOO_LARGE"])):
        issues, _ = check_image(io.BytesIO(image), "png", limit)
        assert [issue.code for issue in issues] == codes


@pytest.mark.parametrize("cut", [12, 40, 90, 110])
def test_a_cut_off_ktx2_is_an_error(cut: int) -> None:
    issues, _ = check_image(io.BytesIO(samples.ktx2()[:cut]), "ktx2", LIMIT)
    assert decide(issues) is Result.INVALID


def test_a_sound_ktx2_has_no_issue_and_another_file_of_that_name_is_an_error() -> None:
    assert check(samples.ktx2(), "ktx2") == []
    assert check(samples.picture(), "ktx2") == [("IMAGE_UNREADABLE", "error")]


def test_a_damaged_texture_in_a_package_is_named_with_its_path(judge: Callable[..., Report], tmp_path: Path) -> None:
    name = "SKU1/materials/sources/wood.png"
    path = samples.package(tmp_path / "a.zip", **{name: samples.damaged(samples.picture())})
    report = judge(path)
    assert [(i.file, i.code) for i in report.issues if i.severity is Severity.ERROR] == [(name, "IMAGE_CORRUPT")]
    assert report.result is Result.INVALID
