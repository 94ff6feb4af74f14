"""What the validator makes of hostile and damaged zips."""

from __future__ import annotations

import shutil
import struct
import zipfile
from pathlib import Path

import pytest

from ncr_validator.archive import BadArchive, NoRoom, Unpacked, unpack
from ncr_validator.limits import Limits
from ncr_validator.verdicts import Issue
from validator.samples import make_zip


def codes(path: Path, tmp_path: Path, **limits: float) -> set[str]:
    """Why the zip is refused; nothing may be written then."""
    folder = tmp_path / "out"
    folder.mkdir()
    with path.open("rb") as file, pytest.raises(BadArchive) as refusal:
        unpack(file, folder, Limits.model_validate(limits))
    assert list(folder.iterdir()) == []
    return {issue.code for issue in refusal.value.issues}


def unpacked(path: Path, tmp_path: Path) -> tuple[list[Unpacked], list[Issue]]:
    (tmp_path / "out").mkdir()
    with path.open("rb") as file:
        return unpack(file, tmp_path / "out", Limits())


def test_a_sound_zip_is_unpacked_with_names_sizes_and_content(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"A/b.txt": b"one", "A/c/d.bin": bytes(3_000_000)})
    files, issues = unpacked(path, tmp_path)
    assert [(file.name, file.size, file.path.stat().st_size) for file in files] == [
        ("A/b.txt", 3, 3),
        ("A/c/d.bin", 3_000_000, 3_000_000),
    ]
    assert issues == []
    assert (tmp_path / "out" / "A" / "b.txt").read_bytes() == b"one"


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../a", "A/../../a", "A/./a", "A//a", "A\\a", "C:/a", "C:a", "A/a\nb", "A/" + "n" * 256],
)
def test_an_unsafe_name_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    assert "ZIP_UNSAFE_NAME" in codes(make_zip(tmp_path / "a.zip", {"A/fine": b"1", name: b"2"}), tmp_path)


def test_a_name_that_python_would_cut_at_a_zero_byte_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"A/a.glbX": b"1"})
    path.write_bytes(path.read_bytes().replace(b"A/a.glbX", b"A/a.glb\0"))
    assert "ZIP_UNSAFE_NAME" in codes(path, tmp_path)


@pytest.mark.parametrize(
    ("first", "second"), [("A/a", "A/a"), ("A/a", "A/A"), ("A/é", "A/e\u0301"), ("A/b", "A/b/c"), ("A/ß", "A/SS")]
)
def test_two_entries_for_one_file_are_refused(tmp_path: Path, first: str, second: str) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr(first, b"1")
        zipped.writestr("A/other", b"2")
        if first == second:
            with pytest.warns(UserWarning, match="Duplicate"):
                zipped.writestr(second, b"2")
        else:
            zipped.writestr(second, b"2")
    assert codes(path, tmp_path) == {"ZIP_DUPLICATE_NAME"}


@pytest.mark.parametrize("mode", [0o120777, 0o020600, 0o010600, 0o060600])
def test_a_link_or_device_is_refused(tmp_path: Path, mode: int) -> None:
    info = zipfile.ZipInfo("A/a")
    info.create_system, info.external_attr = 3, mode << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped:
        zipped.writestr(info, b"/etc/passwd")
    assert codes(tmp_path / "a.zip", tmp_path) == {"ZIP_SPECIAL_FILE"}


def test_an_encrypted_entry_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"A/a": b"1"})
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert codes(path, tmp_path) == {"ZIP_ENCRYPTED"}


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_method_other_than_stored_and_deflate_is_refused(tmp_path: Path, method: int) -> None:
    assert codes(make_zip(tmp_path / "a.zip", {"A/a": b"1" * 99}, method), tmp_path) == {"ZIP_METHOD"}


def test_a_bomb_is_refused_by_its_ratio(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"A/a.bin": bytes(3 * 1024 * 1024)})
    assert codes(path, tmp_path, ratio_floor_mb=2) == {"ZIP_BOMB"}


def test_many_entries_that_make_a_bomb_together_are_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {f"A/{number}": bytes(1024 * 1024) for number in range(3)})
    assert codes(path, tmp_path, ratio_floor_mb=2) == {"ZIP_BOMB"}


def test_a_flat_texture_that_packs_well_is_no_bomb(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"A/flat.tga": bytes(48 * 1024 * 1024)})
    files, issues = unpacked(path, tmp_path)
    assert (len(files), issues) == (1, [])


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"max_entries": 2}, "ZIP_TOO_MANY_ENTRIES"),
        ({"max_entry_mb": 1}, "ZIP_TOO_LARGE"),
        ({"max_unpacked_mb": 3}, "ZIP_TOO_LARGE"),
    ],
)
def test_each_limit_refuses(tmp_path: Path, limits: dict[str, int], code: str) -> None:
    path = make_zip(tmp_path / "a.zip", {f"A/{number}": bytes(2 * 1024 * 1024) for number in range(3)})
    assert codes(path, tmp_path, **limits) == {code}


def test_a_directory_that_claims_more_entries_than_it_has_is_refused_unread(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"A/a": b"1"})
    data = bytearray(path.read_bytes())
    struct.pack_into("<2H", data, len(data) - 22 + 8, 60_000, 60_000)
    path.write_bytes(data)
    assert codes(path, tmp_path) == {"ZIP_TOO_MANY_ENTRIES"}


def test_entries_that_share_bytes_are_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"A/a": b"1" * 50, "A/b": b"2" * 50}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    second = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
    struct.pack_into("<L", data, second + 42, 0)
    path.write_bytes(data)
    assert "ZIP_OVERLAP" in codes(path, tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK", b"<Error>NoSuchKey</Error>" * 9])
def test_what_is_no_zip_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(content)
    assert codes(path, tmp_path) == {"ZIP_UNREADABLE"}


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_cut_off_zip_is_refused(tmp_path: Path, share: float) -> None:
    path = make_zip(tmp_path / "a.zip", {f"A/{number}": bytes(range(256)) * 40 for number in range(9)})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert codes(path, tmp_path) == {"ZIP_UNREADABLE"}


def test_bytes_before_the_zip_are_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"A/a": b"1"})
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    assert codes(path, tmp_path) == {"ZIP_UNREADABLE"}


def test_a_zip_without_files_is_refused(tmp_path: Path) -> None:
    assert codes(make_zip(tmp_path / "a.zip", {"A/": b""}), tmp_path) == {"ZIP_EMPTY"}


def test_a_wrong_crc_names_the_entry_and_the_others_are_unpacked(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"A/a": b"1" * 50, "A/b": b"2" * 50}, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(b"1" * 50, b"1" * 49 + b"3"))
    files, issues = unpacked(path, tmp_path)
    assert [file.name for file in files] == ["A/b"]
    assert [(issue.code, issue.file) for issue in issues] == [("ZIP_CORRUPT_ENTRY", "A/a")]
    assert not (tmp_path / "out" / "A" / "a").exists()


def test_a_package_larger_than_the_disk_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil._ntuple_diskusage(10**12, 10**12, 1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    path = make_zip(tmp_path / "a.zip", {"A/a": bytes(2_000_000)})
    with pytest.raises(NoRoom, match="2000000"):
        unpacked(path, tmp_path)
    assert list((tmp_path / "out").iterdir()) == []
