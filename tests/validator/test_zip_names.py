"""The name of a zip entry that is checked is the name that is written, on every Python, whatever the zip says."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from interpreters import OTHERS, find_interpreter
from ncr_validator import archive as unpacking
from ncr_validator.archive import BadArchive, unpack
from ncr_validator.limits import Limits
from ncr_validator.verdicts import Report, Result
from ncr_validator.zip_directory import Entry, read_directory
from validator.conftest import KEY, Service
from validator.raw_zips import CASES, SOUND, UTF8, Raw, build, names_of, unicode_path
from validator.samples import ASSETS, make_zip, package
from validator.unpack_program import LIMITS, unpack_one

PROGRAM = Path(__file__).with_name("unpack_program.py")
SOURCE = Path(unpacking.__file__).parents[1]
PUBLIC = ("zip_up_traversal.zip", "zip_empty_name.zip", "yauzl_unicode-path-extra-field.zip")


@pytest.mark.parametrize("case", CASES)
def test_a_zip_that_lies_is_refused_by_its_code_before_anything_is_written(tmp_path: Path, case: str) -> None:
    code, data = CASES[case]
    (tmp_path / "a.zip").write_bytes(data)
    answer = unpack_one(tmp_path / "a.zip", tmp_path)
    assert code in answer["codes"]  # type: ignore[operator]
    assert (answer["inside"], answer["outside"]) == ([], 0)


@pytest.mark.parametrize("case", SOUND)
def test_an_odd_zip_is_unpacked_under_exactly_its_names(tmp_path: Path, case: str) -> None:
    files, data = SOUND[case]
    (tmp_path / "a.zip").write_bytes(data)
    answer = unpack_one(tmp_path / "a.zip", tmp_path)
    assert (answer["codes"], answer["names"]) == ([], {name: name for name in files})
    assert (answer["inside"], answer["outside"]) == (sorted(files), 0)
    assert {name: (tmp_path / "a" / "above" / "package" / name).read_bytes() for name in files} == files


@pytest.mark.parametrize("version", OTHERS)
def test_every_python_found_answers_the_same(tmp_path: Path, version: str) -> None:
    python = find_interpreter(version)
    if python is None:
        pytest.skip(f"Python {version} is not on this machine; the suite itself runs on {sys.version.split()[0]}")
    cases = {**{case: data for case, (_, data) in CASES.items()}, **{case: data for case, (_, data) in SOUND.items()}}
    paths = {case: tmp_path / name for case, name in names_of(cases).items()}
    for case, path in paths.items():
        path.write_bytes(cases[case])
    (tmp_path / "work").mkdir()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [python, "-X", "utf8", str(PROGRAM), str(tmp_path / "work"), *map(str, paths.values())],
        env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    answers = json.loads(done.stdout)
    (tmp_path / "here").mkdir()
    assert {case: answers[str(path)] for case, path in paths.items()} == {
        case: unpack_one(path, tmp_path / "here") for case, path in paths.items()
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_zip_whose_names_lie_is_invalid(judge: Callable[..., Report], name: str) -> None:
    path = ASSETS / "cases" / name
    if not path.is_file():
        pytest.skip("the sample assets are not beside the repository")
    report = judge(path)
    assert report.result is Result.INVALID
    assert "ZIP_UNSAFE_NAME" in {issue.code for issue in report.issues}


def test_the_service_answers_with_a_verdict_that_names_the_entry_escaped(start_service: Callable[..., Service]) -> None:
    url = f"{start_service().url}/SKU1"
    client = httpx.Client(headers={"X-API-Key": KEY}, timeout=60)
    for case, (code, data) in CASES.items():
        # A limit of the cases', not of the service; and names that have had their turn in the other header.
        if case == "folders without end" or case.startswith("header behind"):
            continue
        answer = client.post(url, files={"zip_file": data})
        assert answer.status_code == 200, f"{case}: {answer.text}"
        (verdict,) = answer.json()["data"]
        issues = [issue for issue in verdict["issues"] if issue["code"] == code]
        assert (verdict["result"], bool(issues)) == ("Invalid", True), case
        for issue in issues:
            assert issue["message"].endswith("."), f"{case}: the reason is cut off: {issue['message']}"
            assert not any(unicodedata.category(char)[0] == "C" for char in issue["message"] + (issue["file"] or "")), case


def test_the_refusal_of_a_name_says_which_entry_and_what_is_wrong_with_it(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(build(Raw(b"A/x.txt", extra=unicode_path(b"A/x.txt", b"../\xe2\x80\xaegnp.exe"))))
    with (tmp_path / "a.zip").open("rb") as file, pytest.raises(BadArchive) as refusal:
        unpack(file, tmp_path, Limits())
    assert str(refusal.value) == "'../\\u202egnp.exe': it has a '.' or '..' or empty segment in its name."


@pytest.mark.parametrize(
    "segments", [("..", "..", "x"), ("..",), (".",), ("", "x"), ("/x",), ("A", "..", "..", "x"), ("A/../../x",)]
)
def test_the_last_gate_holds_when_no_name_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segments: tuple[str, ...]
) -> None:
    """A hole in the checks cannot be had otherwise: the directory is read as if it had passed them."""
    entry = Entry(segments, False, 0, 0, 0, 0, 0, 0, 0, 0, 30)
    monkeypatch.setattr(unpacking, "read_directory", lambda *_: ([entry], []))
    folder = tmp_path / "above" / "package"
    folder.mkdir(parents=True)
    with pytest.raises(BadArchive, match="leads out of the package"):
        unpack(io.BytesIO(bytes(30)), folder, Limits())
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "above", folder]


def test_the_last_gate_follows_no_link_out_of_the_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "package", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "A").symlink_to(outside)
    with make_zip(tmp_path / "a.zip", {"A/a": b"1"}).open("rb") as file, pytest.raises(BadArchive, match="leads out"):
        unpack(file, folder, Limits())
    assert list(outside.iterdir()) == []


def test_a_name_that_this_disk_takes_for_another_is_refused(tmp_path: Path) -> None:
    """As on a disk that knows more names for one file than the checks do: one is there already."""
    (tmp_path / "out" / "A").mkdir(parents=True)
    (tmp_path / "out" / "A" / "a").write_bytes(b"of another entry")
    with make_zip(tmp_path / "a.zip", {"A/a": b"1"}).open("rb") as file, pytest.raises(BadArchive) as refusal:
        unpack(file, tmp_path / "out", Limits())
    assert [issue.code for issue in refusal.value.issues] == ["ZIP_DUPLICATE_NAME"]
    assert (tmp_path / "out" / "A" / "a").read_bytes() == b"of another entry"


def test_zips_of_other_writers_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Streamed (sizes behind the content), Zip64 by force, folders of their own, a comment."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(_NoSeek(path), "w", zipfile.ZIP_DEFLATED) as zipped:  # type: ignore[call-overload]
        zipped.comment = b"streamed"
        zipped.mkdir("A")
        zipped.writestr("A/streamed é.txt", b"1" * 5000)
        with zipped.open("A/zip64", "w", force_zip64=True) as entry:
            entry.write(b"2" * 5000)
    (tmp_path / "out").mkdir()
    with path.open("rb") as file:
        files, issues = unpack(file, tmp_path / "out", Limits())
    assert ([(file.name, file.path.read_bytes()) for file in files], issues) == (
        [("A/streamed é.txt", b"1" * 5000), ("A/zip64", b"2" * 5000)],
        [],
    )


class _NoSeek(io.RawIOBase):
    """A file that is only written on, as a pipe is."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._file.flush()
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


NAMES = st.one_of(
    st.text("aAé./\\:\0\n ", max_size=12).map(str.encode),
    st.binary(max_size=12),
    st.sampled_from([b"", b"/", b"A/a", b"A/../../x", b"..", b"A/a/", b"C:/x"]),
)


@st.composite
def lying_entries(draw: st.DrawFn) -> Raw:
    name = draw(NAMES)
    fields = [unicode_path(name, other) for other in draw(st.lists(NAMES, max_size=2))] + draw(
        st.lists(st.binary(max_size=9), max_size=1)
    )
    return Raw(
        name,
        content=draw(st.sampled_from([b"", b"content"])),
        flags=draw(st.sampled_from([0, UTF8])),
        extra=b"".join(fields),
        local_name=draw(st.none() | NAMES),
        local_extra=draw(st.just(b"") | st.just(b"".join(fields)) | NAMES.map(lambda other: unicode_path(name, other))),
        mode=draw(st.sampled_from([0, 0o100644, 0o120777, 0o040755])),
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(lying_entries(), min_size=1, max_size=3), st.binary(max_size=30))
def test_of_any_names_at_all_only_the_checked_ones_are_written_and_only_inside(entries: list[Raw], comment: bytes) -> None:
    answer = _unpack(build(*entries, comment=comment))
    assert answer["outside"] == 0
    if not answer["codes"]:
        names = answer["names"]
        assert names == {name: name for name in names}  # type: ignore[attr-defined]
        assert answer["inside"] == sorted(names)  # type: ignore[call-overload]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([data for _, data in SOUND.values()]),
    st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8)), max_size=4),
)
@example(SOUND["Zip64 end"][1], [(0.6, b"\xff" * 8)])
def test_a_zip_with_bytes_changed_anywhere_is_unpacked_or_refused(data: bytes, changes: list[tuple[float, bytes]]) -> None:
    changed = bytearray(data)
    for share, piece in changes:
        at = int(share * len(data))
        changed[at : at + len(piece)] = piece
    assert _unpack(bytes(changed))["outside"] == 0


def _unpack(data: bytes) -> dict[str, object]:
    with TemporaryDirectory() as work:
        (Path(work) / "a.zip").write_bytes(data)
        return unpack_one(Path(work) / "a.zip", Path(work))


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=3).map("/".join))
def test_a_name_that_passes_is_the_name_that_zipfile_wrote(name: str) -> None:
    """Ours and Python's agree on what Python writes itself: nothing ordinary is renamed."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as zipped:
        zipped.writestr(name, b"1")
    entries, issues = read_directory(data, LIMITS.max_entries)
    with zipfile.ZipFile(data) as zipped:
        assert issues or [entry.name for entry in entries] == zipped.namelist()


def test_a_sound_package_stays_valid(judge: Callable[..., Report], tmp_path: Path) -> None:
    assert judge(package(tmp_path / "a.zip")).result is not Result.INVALID
