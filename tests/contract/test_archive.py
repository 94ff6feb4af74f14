"""The zip: reproducible, lazy, readable by everyone."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import random
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ncr_upload.adapters.zip_archive import ZipArchiver
from ncr_upload.adapters.zip_archive import archive as archiving
from ncr_upload.adapters.zip_archive.records import StoredBlocks
from ncr_upload.application.arrivals import Arrival
from ncr_upload.application.ports import LocalFile
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.paths import find_segment_problem, fold
from ncr_validator.zip_directory import read_directory
from packages_on_disk import write_package
from parts import require

pytestmark = pytest.mark.anyio
NOISE = random.Random(1).randbytes(3_000_000)
CONTENTS = {
    "SKU/SKU.glb": NOISE,
    "SKU/models/chair.obj": b"v 1.0 2.0 3.0\n" * 200_000,
    "SKU/materials/Rückseite ü.PNG": NOISE[:100_000],
    "SKU/materials/empty.png": b"",
    "SKU/sources/empty.mtl": b"",
    "SKU/sources/SKU.blend": NOISE[:5000] * 100,
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def files(tmp_path: Path) -> list[LocalFile]:
    return write_package(tmp_path / "files", CONTENTS)


async def archive(files: Sequence[LocalFile], pause_seconds: float = 0) -> bytes:
    """Of files that arrive one after the other."""
    arriving = [Arrival(local.file.target, local.file.size, local.path) for local in files]
    reading = asyncio.create_task(collect(ZipArchiver().stream(arriving)))
    for arrival, local in zip(arriving, files, strict=True):
        await asyncio.sleep(pause_seconds)
        arrival.become(local)
    return b"".join(await reading)


async def collect(chunks: Iterable[bytes]) -> list[bytes]:
    return await asyncio.to_thread(list, chunks)


async def first_of(chunks: Iterator[bytes]) -> bytes:
    return await asyncio.to_thread(next, chunks)


async def test_the_zip_holds_every_file_in_the_order_given(files: list[LocalFile]) -> None:
    with zipfile.ZipFile(io.BytesIO(await archive(files))) as made:
        assert made.testzip() is None
        assert made.namelist() == list(CONTENTS)
        assert {name: made.read(name) for name in made.namelist()} == CONTENTS


async def test_the_same_package_gives_the_same_bytes_whenever_and_wherever_with_the_same_zlib(
    files: list[LocalFile], tmp_path: Path
) -> None:
    first = await archive(files)
    elsewhere = write_package(tmp_path / "another folder", CONTENTS)
    for local in elsewhere:
        local.path.chmod(0o600)
    assert await archive(elsewhere, pause_seconds=0.01) == first


SEGMENTS = st.text(min_size=1, max_size=12).filter(lambda text: find_segment_problem(text) is None)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(SEGMENTS, min_size=1, max_size=2).map(lambda path: "/".join(["SKU", *path])),
        min_size=1,
        max_size=5,
        unique_by=fold,
    )
)
def test_the_names_in_the_zip_are_exactly_the_targets_for_every_reader(targets: list[str]) -> None:
    """Whatever the layout lets pass as a target: Python's reader and the bundled validator's see that name, in both headers."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_package(Path(folder), dict.fromkeys(targets, b"content"))
        made = io.BytesIO(asyncio.run(archive(files)))
    with zipfile.ZipFile(made) as zipped:
        assert zipped.namelist() == targets
        assert {zipped.read(target) for target in targets} == {b"content"}
    entries, issues = read_directory(made, len(targets))
    assert ([entry.name for entry in entries], issues) == (targets, [])


async def test_compressed_types_are_stored_without_descriptor_and_the_rest_is_deflated(files: list[LocalFile]) -> None:
    with zipfile.ZipFile(io.BytesIO(await archive(files))) as made:
        entries = {Path(entry.filename).suffix.lower(): entry for entry in made.infolist() if entry.file_size}
    for suffix in (".glb", ".png"):
        assert entries[suffix].compress_type == zipfile.ZIP_STORED
        assert not entries[suffix].flag_bits & 0x08
    for suffix in (".obj", ".blend"):
        assert entries[suffix].compress_type == zipfile.ZIP_DEFLATED
        assert entries[suffix].compress_size < entries[suffix].file_size / 2


async def test_entries_carry_a_fixed_date_fixed_permissions_and_no_extra_fields(files: list[LocalFile]) -> None:
    with zipfile.ZipFile(io.BytesIO(await archive(files))) as made:
        described = {(entry.date_time, entry.external_attr >> 16, entry.extra) for entry in made.infolist()}
    assert described == {((1980, 1, 1, 0, 0, 0), 0o100644, b"")}


async def test_an_empty_package_is_an_empty_zip() -> None:
    with zipfile.ZipFile(io.BytesIO(await archive([]))) as made:
        assert made.namelist() == []


@pytest.mark.parametrize("large", [False, True])
async def test_unzip_finds_no_error_in_it(
    files: list[LocalFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """`large` moves the border to zip64 down to where the package crosses it."""
    program = require("unzip")
    if large:
        monkeypatch.setattr(archiving, "ZIP32_MAX_BYTES", 4_000_000)
    path = tmp_path / "package.zip"
    write(path, await archive(files))
    done = await run(program, "-t", str(path))
    assert "No errors detected" in done.stdout, done.stdout + done.stderr
    with zipfile.ZipFile(path) as made:
        assert {name: made.read(name) for name in made.namelist()} == CONTENTS


@pytest.mark.parametrize(
    ("zip32_max_bytes", "digest"),
    [
        (archiving.ZIP32_MAX_BYTES, "22a5195f0fa4cfa00ebfacca75088a9fd57e5805200060a5314e27fd04e485c5"),
        (5000, "0756b6780d21bb291d890f863ebbad40324d6b92e51fdd62128cc96b4ae2296b"),
    ],
    ids=["zip32", "zip64 from the second entry on"],
)
async def test_the_bytes_are_those_that_earlier_versions_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zip32_max_bytes: int, digest: str
) -> None:
    """Of stored entries: what deflate makes is zlib's affair."""
    monkeypatch.setattr(archiving, "ZIP32_MAX_BYTES", zip32_max_bytes)
    files = write_package(tmp_path / "stored", {"S/S.glb": bytes(range(250)) * 16, "S/ü.PNG": b"two" * 999, "S/e.jpg": b""})
    assert hashlib.sha256(await archive(files)).hexdigest() == digest


READ_ALL = """
const fs = require('fs'), zlib = require('zlib');
const bytes = fs.readFileSync(process.argv[1]); const found = {};
let at = bytes.readUInt32LE(bytes.length - 6);
for (let n = bytes.readUInt16LE(bytes.length - 12); n > 0; n--) {
  const method = bytes.readUInt16LE(at + 10), packed = bytes.readUInt32LE(at + 20), name = bytes.readUInt16LE(at + 28);
  const local = bytes.readUInt32LE(at + 42);
  const start = local + 30 + bytes.readUInt16LE(local + 26) + bytes.readUInt16LE(local + 28);
  const raw = bytes.subarray(start, start + packed), body = method ? zlib.inflateRawSync(raw) : raw;
  found[bytes.toString('utf8', at + 46, at + 46 + name)] = [body.length, zlib.crc32(body) === bytes.readUInt32LE(at + 16)];
  at += 46 + name + bytes.readUInt16LE(at + 30) + bytes.readUInt16LE(at + 32);
}
console.log(JSON.stringify(found));
"""


async def test_a_reader_that_is_not_python_finds_the_same_files(files: list[LocalFile], tmp_path: Path) -> None:
    """Walks the central directory with Node's own zlib."""
    program = require("node")
    path = tmp_path / "package.zip"
    write(path, await archive(files))
    done = await run(program, "-e", READ_ALL, str(path))
    assert json.loads(done.stdout) == {name: [len(content), True] for name, content in CONTENTS.items()}, done.stderr


async def test_the_first_bytes_leave_before_the_last_file_has_arrived(files: list[LocalFile]) -> None:
    last = Arrival(files[-1].file.target, files[-1].file.size, files[-1].path)
    chunks = iter(ZipArchiver().stream([*map(Arrival.of, files[:-1]), last]))
    first = await first_of(chunks)
    assert first.startswith(b"PK")
    last.become(files[-1])
    assert first + b"".join(await collect(chunks)) == await archive(files)


async def test_a_large_or_uncompressed_file_enters_the_zip_while_it_arrives(
    files: list[LocalFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archiving, "LARGE_BYTES", 2_000_000)
    for local in (files[0], files[1]):
        whole = await archive([local])
        growing = Arrival(local.file.target, local.file.size, local.path.with_name("its place"))

        chunks = iter(ZipArchiver().stream([growing]))
        growing.begin(local.path)
        growing.reach(local.file.size // 2)
        made = [await first_of(chunks)]
        assert made[0].startswith(b"PK")
        reading = asyncio.create_task(collect(chunks))
        await asyncio.sleep(0.05)
        assert not reading.done(), "the other half has not arrived"
        local.path.rename(growing.place)
        growing.become(replace(local, path=growing.place))
        made += await reading
        assert b"".join(made) == whole, "the same bytes as from a file that was there"
        with zipfile.ZipFile(io.BytesIO(whole)) as read:
            assert read.read(local.file.target) == CONTENTS[local.file.target]


@pytest.mark.parametrize(("target", "reached"), [("S/b.png", 0), ("S/b.obj", 0), ("S/b.obj", 1)])
async def test_what_is_made_is_not_held_back_while_a_file_is_waited_for(tmp_path: Path, target: str, reached: int) -> None:
    (first,) = write_package(tmp_path / "files", {"S/a.png": NOISE[:1000]})
    (tmp_path / "growing").write_bytes(b"v")
    growing = Arrival(target, 1000, tmp_path / "place")
    growing.begin(tmp_path / "growing")
    growing.reach(reached)

    async with asyncio.timeout(10):
        assert NOISE[:1000] in await first_of(iter(ZipArchiver().stream([Arrival.of(first), growing])))


@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("length", [1.0, 0.5])
async def test_a_file_that_changed_on_disk_is_no_zip(files: list[LocalFile], changed: int, length: float) -> None:
    """A stored file and a deflated one; other bytes, and fewer."""
    write(files[changed].path, b"x" * int(files[changed].file.size * length))
    with pytest.raises(Unavailable) as caught:
        await archive(files)
    assert caught.value.code == "package_changed"
    assert files[changed].file.target in caught.value.message


async def test_a_growing_file_that_is_shorter_than_was_said_is_no_zip(
    files: list[LocalFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object was replaced between the look at it and its download."""
    monkeypatch.setattr(archiving, "LARGE_BYTES", 2_000_000)
    for local in (files[0], files[1]):
        growing = Arrival(local.file.target, local.file.size + 2_000_000, local.path)

        growing.begin(local.path)
        growing.reach(1)
        reading = asyncio.create_task(collect(ZipArchiver().stream([growing])))
        await asyncio.sleep(0.05)
        growing.become(local)
        with pytest.raises(Unavailable, match=local.file.target):
            await asyncio.wait_for(reading, 20)


@pytest.mark.parametrize("pause_seconds", [0, 2 * archiving.HELD_SECONDS], ids=["before it waits", "while it waits"])
async def test_a_stopped_zip_frees_the_thread_that_waits_for_a_file(files: list[LocalFile], pause_seconds: float) -> None:
    never = Arrival("S/never.glb", 1000, files[0].path)
    made = ZipArchiver().stream([Arrival.of(files[0]), never])
    reading = asyncio.create_task(collect(made))
    await asyncio.sleep(pause_seconds)
    made.stop()
    async with asyncio.timeout(10):
        with pytest.raises(archiving.ZipStopped):
            await reading


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


async def run(*command: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("sizes", [[], [0], [1], [65_535], [65_536], [1_048_576, 3], [131_070, 0, 70_000]])
def test_stored_blocks_are_deflated_data(sizes: list[int]) -> None:
    chunks, blocks = [NOISE[:size].ljust(size, b"n") for size in sizes], StoredBlocks()
    made = b"".join([*(blocks.compress(chunk) for chunk in chunks), blocks.flush()])
    reader = zlib.decompressobj(-zlib.MAX_WBITS)
    assert reader.decompress(made) == b"".join(chunks)
    assert reader.eof
    assert not reader.unused_data
