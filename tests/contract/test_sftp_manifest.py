"""The manifest of what was staged: never ahead of the destination, in few writes, and nothing where it cannot be read."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from ncr_upload.adapters.sftp_dropoff import manifest as module
from ncr_upload.adapters.sftp_dropoff.manifest import LINKED, Entry, Manifest
from ncr_upload.adapters.sftp_dropoff.remote import Failed, Missing

pytestmark = pytest.mark.anyio
OWN = "/base/.ncr-staging/task-1"
PATH = f"{OWN}/manifest.json"


class Disk:
    """Of a `Remote`: whole files, whose writes can fail or wait."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.replaced = 0
        self.failures: list[Exception] = []
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def read(self, path: str) -> bytes:
        if path not in self.files:
            raise Missing("sftp_missing", "no such file", "It is tried again.")
        return self.files[path]

    async def write(self, path: str, content: bytes) -> None:
        assert path != PATH, "it is written beside and renamed"
        await self.go_on.wait()
        if self.failures:
            raise self.failures.pop()
        self.files[path] = content

    async def replace(self, old: str, new: str) -> None:
        self.files[new] = self.files.pop(old)
        self.replaced += 1

    def content(self) -> Any:
        return json.loads(self.files[PATH])


@pytest.fixture
def disk() -> Disk:
    return Disk()


async def read(disk: Disk) -> Manifest:
    return await Manifest.read(disk, OWN)  # type: ignore[arg-type]


async def test_what_is_covered_is_there_for_the_next_attempt(disk: Disk) -> None:
    manifest = await read(disk)
    manifest.note("S/a", Entry("hash of a"))
    manifest.note("S/b", Entry("hash of b", 1_700_000_000))
    await manifest.complete()
    again = await read(disk)
    assert (again.entry("S/a"), again.entry("S/b")) == (Entry("hash of a"), Entry("hash of b", 1_700_000_000))
    assert again.linked() == {"S/b"}
    assert again.entry("S/c") is None
    assert set(disk.files) == {PATH}, "no part is left"


async def test_a_manifest_without_links_is_as_releases_before_wrote_it(disk: Disk) -> None:
    manifest = await read(disk)
    manifest.note("S/a", Entry("hash of a"))
    await manifest.complete()
    assert disk.content() == {"S/a": "hash of a"}
    assert LINKED not in disk.content()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"null", b"[1]", b"3", b'"words"', b"\xff\xfe", b"[" * 200_000),
        *(
            b'{"S/a": "h", "": 7}',
            b'{"S/a": "h", "": ["S/a"]}',
            b'{"S/a": "h", "": {"S/a": "1"}}',
            b'{"S/a": 7}',
            b'{"S/a": {}}',
        ),
    ],
    ids=lambda content: content[:20].decode(errors="replace"),
)
async def test_one_that_cannot_be_read_is_none(disk: Disk, content: bytes) -> None:
    disk.files[PATH] = content
    manifest = await read(disk)
    assert manifest.entry("S/a") is None
    assert manifest.linked() == set()


async def test_what_is_noted_is_not_said_to_be_there_before_it_is_written(disk: Disk) -> None:
    manifest = await read(disk)
    manifest.note("S/a", Entry("hash of a"))
    assert manifest.entry("S/a") is None
    await manifest.complete()
    manifest.note("S/a", Entry("another hash"))
    assert manifest.entry("S/a") == Entry("hash of a")
    await manifest.cover("S/a")
    assert manifest.entry("S/a") == Entry("another hash")


async def test_many_targets_that_are_covered_together_take_one_write(disk: Disk) -> None:
    manifest = await read(disk)
    targets = [f"S/{number}" for number in range(50)]
    for target in targets:
        manifest.note(target, Entry(f"hash of {target}"))
    covering = [asyncio.create_task(manifest.cover(target)) for target in targets]
    await asyncio.sleep(0)
    await manifest.complete()
    await asyncio.gather(*covering)
    assert disk.replaced == 1
    assert len(disk.content()) == 50


async def test_a_target_that_is_noted_while_it_is_written_takes_one_more_write(disk: Disk) -> None:
    manifest = await read(disk)
    manifest.note("S/a", Entry("hash of a"))
    disk.go_on.clear()
    completing = asyncio.create_task(manifest.complete())
    await asyncio.sleep(0)
    manifest.note("S/b", Entry("hash of b"))
    covering = asyncio.create_task(manifest.cover("S/b"))
    await asyncio.sleep(0)
    disk.go_on.set()
    await asyncio.gather(completing, covering)
    assert disk.replaced == 2
    assert set(disk.content()) == {"S/a", "S/b"}


async def test_while_more_files_are_to_come_a_target_waits_for_others(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUP_SECONDS", 0.3)
    manifest = await read(disk)
    manifest.note("S/a", Entry("hash of a"))
    covering = asyncio.create_task(manifest.cover("S/a"))
    await asyncio.sleep(0.05)
    assert disk.replaced == 0
    manifest.note("S/b", Entry("hash of b"))
    await covering
    await manifest.cover("S/b")
    assert disk.replaced == 1


async def test_a_write_that_failed_leaves_it_as_it_was_and_is_repeated(disk: Disk) -> None:
    manifest = await read(disk)
    manifest.note("S/a", Entry("hash of a"))
    disk.failures.append(Failed("sftp_failure", "no", "It is tried again."))
    with pytest.raises(Failed):
        await manifest.complete()
    assert manifest.entry("S/a") is None
    await manifest.cover("S/a")
    assert manifest.entry("S/a") == Entry("hash of a")


async def test_nothing_new_takes_no_write(disk: Disk) -> None:
    disk.files[PATH] = b'{"S/a": "hash of a"}'
    manifest = await read(disk)
    manifest.note("S/a", Entry("hash of a"))
    await manifest.cover("S/a")
    await manifest.complete()
    assert disk.replaced == 0
