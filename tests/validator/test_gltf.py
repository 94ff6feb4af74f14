"""The Khronos engine and what it does not see: the traps of judging glTF."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ncr_validator.bench import Bench, drop_ktx2_false_alarms
from ncr_validator.engine import read_report
from ncr_validator.judgement import judge_file
from ncr_validator.limits import Limits
from ncr_validator.verdicts import Issue, Report, Result, Severity
from validator import samples

Judge = Callable[[Path], Report]


def errors(report: Report) -> set[str]:
    return {issue.code for issue in report.issues if issue.severity is Severity.ERROR}


def write(folder: Path, data: bytes, name: str = "model.glb") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def test_a_sound_model_is_valid_and_its_counts_are_told(judge: Judge, tmp_path: Path) -> None:
    report = judge(write(tmp_path, samples.glb()))
    assert (report.result, report.issues) == (Result.VALID, [])
    assert report.files[0].facts["triangles"] == 1
    assert report.engines["gltf-validator"] == "2.0.0-dev.3.10"


@pytest.mark.parametrize("content", [b"", b"<Error><Code>NoSuchKey</Code></Error>", b"glTFxxxx", b"{}", bytes(100)])
def test_what_is_no_gltf_is_invalid(judge: Judge, tmp_path: Path, content: bytes) -> None:
    assert judge(write(tmp_path, content)).result is Result.INVALID


def test_a_gltf_named_glb_is_invalid(judge: Judge, tmp_path: Path) -> None:
    uri = "data:application/octet-stream;base64," + base64.b64encode(samples.triangle()).decode()
    gltf = samples.gltf(tmp_path, uri)
    assert judge(gltf).result is Result.VALID
    assert errors(judge(gltf.rename(tmp_path / "model.glb"))) == {"GLB_INVALID_MAGIC"}


def test_an_extension_in_upper_case_is_judged_the_same(judge: Judge, tmp_path: Path) -> None:
    assert judge(write(tmp_path, samples.glb(), "MODEL.GLB")).result is Result.VALID
    assert judge(write(tmp_path, b"", "MODEL2.GLB")).result is Result.INVALID


def test_errors_beyond_the_issue_limit_cannot_hide(engine: Path, tmp_path: Path) -> None:
    content = samples.document(accessors=[{"componentType": 1, "count": 3, "type": "VEC3", "bufferView": 9}] * 50)
    path = write(tmp_path, samples.glb(content))
    bench = Bench(Limits(max_issues_per_file=3))
    try:
        report = judge_file(path, bench)
    finally:
        bench.close()
    assert report.result is Result.INVALID
    assert "TOO_MANY_ISSUES" in errors(report)


def test_a_truncated_report_without_any_error_in_it_is_invalid() -> None:
    hint = {"code": "UNUSED_OBJECT", "severity": 3, "message": "", "pointer": "/nodes/0"}
    look = read_report({"report": {"issues": {"numErrors": 0, "truncated": True, "messages": [hint]}}})
    assert [issue.code for issue in look.issues if issue.severity is Severity.ERROR] == ["TOO_MANY_ISSUES"]


def test_errors_that_are_counted_but_not_listed_are_an_error() -> None:
    look = read_report({"report": {"issues": {"numErrors": 128, "truncated": False, "messages": []}}})
    assert [(issue.code, issue.severity) for issue in look.issues] == [("UNLISTED_ERRORS", Severity.ERROR)]


def test_of_very_many_issues_the_worst_are_listed_and_the_rest_counted(judge: Judge, tmp_path: Path) -> None:
    content = samples.document(nodes=[{"mesh": 0}] + [{"unknown": 1}] * 1500, scenes=[{"nodes": [0]}])
    report = judge(write(tmp_path, samples.glb(content)))
    assert len(report.issues) < 1100
    assert "MORE_ISSUES" in {issue.code for issue in report.issues}
    assert report.result is Result.WARNING


# --- files beside the glTF --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mesh.bin", "a mesh.bin", "größe.bin", "sub/mesh.bin"])
def test_a_file_in_the_package_is_found(judge: Judge, tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(samples.triangle())
    assert judge(samples.gltf(tmp_path, name.replace(" ", "%20"))).result is Result.VALID


def test_small_files_keep_their_own_bytes(judge: Judge, tmp_path: Path) -> None:
    """Node hands out small buffers as views into one pool; the engine would read the pool's start."""
    nan = b"\xff\xff\xff\x7f" + samples.triangle()[4:]
    for number in range(4):
        (tmp_path / f"{number}.bin").write_bytes(samples.triangle())
        assert judge(samples.gltf(tmp_path, f"{number}.bin")).result is Result.VALID
    (tmp_path / "nan.bin").write_bytes(nan)
    assert "ACCESSOR_INVALID_FLOAT" in errors(judge(samples.gltf(tmp_path, "nan.bin")))


@pytest.mark.parametrize(
    "form", ["{0}", "../mesh.bin", "%2e%2e/mesh.bin", "..%2fmesh.bin", "file://{0}", "//{0}", "a/../../mesh.bin"]
)
def test_a_file_outside_the_package_is_never_read(judge: Judge, tmp_path: Path, form: str) -> None:
    outside = tmp_path / "mesh.bin"
    outside.write_bytes(samples.triangle())
    package = tmp_path / "package"
    package.mkdir()
    report = judge(samples.gltf(package, form.format(outside)))
    assert errors(report) == {"IO_ERROR"}
    assert str(tmp_path) not in json.dumps([i.message for i in report.issues if i.source != "gltf"])


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1/mesh.bin", "https://example.com/m.bin", "ftp://example.com/m.bin"])
def test_nothing_is_fetched_from_the_network(judge: Judge, tmp_path: Path, uri: str) -> None:
    report = judge(samples.gltf(tmp_path, uri))
    assert report.result is Result.INVALID


def test_a_link_out_of_the_folder_is_not_followed(judge: Judge, tmp_path: Path) -> None:
    (tmp_path / "mesh.bin").write_bytes(samples.triangle())
    package = tmp_path / "package"
    package.mkdir()
    (package / "mesh.bin").symlink_to(tmp_path / "mesh.bin")
    assert errors(judge(samples.gltf(package, "mesh.bin"))) == {"IO_ERROR"}


def test_a_folder_or_pipe_in_place_of_a_file_is_an_error(judge: Judge, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        assert errors(judge(samples.gltf(tmp_path, name))) == {"IO_ERROR"}


def test_a_gltf_may_use_another_folder_of_its_package(judge: Callable[..., Report], tmp_path: Path) -> None:
    gltf = samples.gltf(tmp_path, "../textures/mesh.bin").read_bytes()
    entries = {"SKU1/gltf/m.gltf": gltf, "SKU1/textures/mesh.bin": samples.triangle()}
    assert judge(samples.package(tmp_path / "a.zip", **entries)).result is Result.VALID


# --- images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format_", "mime"), [("PNG", "image/png"), ("JPEG", "image/jpeg")])
def test_a_sound_texture_is_valid_and_a_damaged_one_invalid(judge: Judge, tmp_path: Path, format_: str, mime: str) -> None:
    image = samples.picture(format_)
    assert judge(write(tmp_path, samples.glb_with(image, mime))).result is Result.VALID
    broken = samples.damaged(image) if format_ == "PNG" else image[: len(image) // 2]
    report = judge(write(tmp_path, samples.glb_with(broken, mime), "broken.glb"))
    assert [(issue.code, issue.pointer) for issue in report.issues if issue.source == "image"] == [
        ("IMAGE_CORRUPT", "/images/0")
    ]
    assert report.result is Result.INVALID


def test_a_damaged_image_in_a_data_uri_is_invalid(judge: Judge, tmp_path: Path) -> None:
    content = json.loads(samples.gltf(tmp_path, "mesh.bin").read_text())
    (tmp_path / "mesh.bin").write_bytes(samples.triangle())
    image = base64.b64encode(samples.damaged(samples.picture())).decode()
    content["images"] = [{"uri": f"data:image/png;base64,{image}"}]
    (tmp_path / "model.gltf").write_text(json.dumps(content))
    assert errors(judge(tmp_path / "model.gltf")) == {"IMAGE_CORRUPT"}


def test_a_damaged_image_beside_a_single_gltf_is_invalid(judge: Judge, tmp_path: Path) -> None:
    content = json.loads(samples.gltf(tmp_path, "mesh.bin").read_text())
    (tmp_path / "mesh.bin").write_bytes(samples.triangle())
    (tmp_path / "texture.png").write_bytes(samples.damaged(samples.picture()))
    content["images"] = [{"uri": "texture.png"}]
    (tmp_path / "model.gltf").write_text(json.dumps(content))
    assert errors(judge(tmp_path / "model.gltf")) == {"IMAGE_CORRUPT"}


def test_an_image_bomb_in_a_model_is_refused(judge: Judge, tmp_path: Path) -> None:
    assert "IMAGE_TOO_LARGE" in errors(judge(write(tmp_path, samples.glb_with(samples.png_of(30_000, 30_000)))))


# --- KTX2 and Draco ---------------------------------------------------------------------------------------------


def test_ktx2_is_no_warning_where_its_extension_is_used(judge: Judge, tmp_path: Path) -> None:
    report = judge(write(tmp_path, samples.glb_with(samples.ktx2(), "image/ktx2", basisu=True)))
    assert (report.result, report.files[0].facts["textures"]) == (Result.VALID, ["4x4"])


def test_ktx2_without_its_extension_keeps_the_warnings(judge: Judge, tmp_path: Path) -> None:
    report = judge(write(tmp_path, samples.glb_with(samples.ktx2(), "image/ktx2")))
    assert {"IMAGE_UNRECOGNIZED_FORMAT", "VALUE_NOT_IN_LIST"} <= {issue.code for issue in report.issues}
    assert report.result is not Result.VALID


def test_what_only_calls_itself_ktx2_is_invalid(judge: Judge, tmp_path: Path) -> None:
    report = judge(write(tmp_path, samples.glb_with(b"no ktx2 at all, not even near", "image/ktx2", basisu=True)))
    assert {"IMAGE_UNRECOGNIZED_FORMAT", "VALUE_NOT_IN_LIST"} <= {issue.code for issue in report.issues}
    assert report.result is Result.INVALID


def test_a_cut_off_ktx2_is_invalid(judge: Judge, tmp_path: Path) -> None:
    report = judge(write(tmp_path, samples.glb_with(samples.ktx2()[:-8], "image/ktx2", basisu=True)))
    assert "KTX2_TRUNCATED" in errors(report)


def test_only_the_false_alarms_of_the_ktx2_image_itself_are_dropped() -> None:
    issues = tuple(
        Issue("gltf", code, Severity.WARNING, "", pointer=pointer)
        for code in ("VALUE_NOT_IN_LIST", "OTHER")
        for pointer in ("/images/1/mimeType", "/images/10/mimeType", "/materials/1/alphaMode")
    )
    facts = {"basisu": True, "images": {"/images/1": {"format": "KTX2"}, "/images/10": {"format": "PNG"}}}
    dropped = set(issues) - set(drop_ktx2_false_alarms(issues, facts))
    assert {(issue.code, issue.pointer) for issue in dropped} == {("VALUE_NOT_IN_LIST", "/images/1/mimeType")}


def test_a_draco_model_is_valid_and_a_damaged_payload_invalid(judge: Judge, tmp_path: Path) -> None:
    assert errors(judge(write(tmp_path, samples.glb_with_draco()))) == set()
    broken = samples.damaged(samples.draco(), at=0.0)
    assert errors(judge(write(tmp_path, samples.glb_with_draco(broken), "broken.glb"))) == {"DRACO_CORRUPT"}


def test_a_draco_payload_with_other_triangles_than_promised_is_invalid(judge: Judge, tmp_path: Path) -> None:
    assert errors(judge(write(tmp_path, samples.glb_with_draco(indices=6)))) == {"DRACO_COUNT_MISMATCH"}
