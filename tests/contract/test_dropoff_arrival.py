"""Files are staged as they become known: kept by the next attempt, given up without a trace, in few writes of the manifest."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dropoff_place import STAGING, DropoffPlace
from ncr_upload.adapters.sftp_dropoff.remote import Remote
from ncr_upload.application.arrivals import Arrival
from ncr_upload.application.ports import LocalFile, Staged
from ncr_upload.domain.errors import Unavailable
from packages_on_disk import arriving, write_package
from patience import until_async

pytestmark = pytest.mark.anyio
CONTENTS = {f"S/materials/{number % 7}/{number}.png": os.urandom(1000 + number) for number in range(60)}


@pytest.fixture
def files(tmp_path: Path) -> list[LocalFile]:
    return write_package(tmp_path / "files", CONTENTS)


@pytest.fixture
def manifests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every write of a manifest."""
    written: list[str] = []
    replace = Remote.replace

    async def count(self: Remote, old: str, new: str) -> None:
        written.append(new)
        await replace(self, old, new)

    monkeypatch.setattr(Remote, "replace", count)
    return written


async def one_by_one(files: list[LocalFile], seconds: float = 0.02) -> AsyncIterator[Arrival]:
    for local in files:
        await asyncio.sleep(seconds)
        yield Arrival.of(local)


async def test_all_files_at_once_take_one_write_of_the_manifest(
    place: DropoffPlace, files: list[LocalFile], manifests: list[str]
) -> None:
    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
        await session.stage("task", 1, arriving(files), lambda _: None)
    assert place.staged(1) == CONTENTS
    assert len(manifests) == 1


async def test_files_that_arrive_one_by_one_are_staged_meanwhile_in_few_writes_of_the_manifest(
    place: DropoffPlace, files: list[LocalFile], manifests: list[str]
) -> None:
    waiting = asyncio.Event()

    async def some_then_the_rest() -> AsyncIterator[Arrival]:
        async for arrival in one_by_one(files[:40]):
            yield arrival
        await waiting.wait()
        async for arrival in one_by_one(files[40:]):
            yield arrival

    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
        staging = asyncio.create_task(session.stage("task", 1, some_then_the_rest(), lambda _: None))
        await until_async(lambda: len(place.staged(1)) >= 40)
        waiting.set()
        assert await staging == Staged(0, 0)
        await session.publish("task", 1, "job-1", lambda: None)
        await session.discard("task")
    assert place.delivered() == CONTENTS
    assert len(manifests) < len(files) / 3


async def test_what_a_cancelled_stage_has_staged_is_kept_by_the_next_attempt(
    place: DropoffPlace, files: list[LocalFile]
) -> None:
    async def never_ending() -> AsyncIterator[Arrival]:
        for local in files[:30]:
            yield Arrival.of(local)
        await asyncio.Event().wait()

    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
        staging = asyncio.create_task(session.stage("task", 1, never_ending(), lambda _: None))
        await until_async(lambda: len(place.staged(1)) >= 30)
        staging.cancel()
        await asyncio.wait([staging])
        assert staging.cancelled()
        await session.adopt("task", 2)
        staged = await session.stage("task", 2, arriving(files), lambda _: None)
    assert staged == Staged(30, sum(local.file.size for local in files[:30]))
    assert place.staged(2) == CONTENTS


async def test_a_stage_that_is_given_up_leaves_nothing_once_it_is_discarded(
    place: DropoffPlace, files: list[LocalFile]
) -> None:
    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
        staging = asyncio.create_task(session.stage("task", 1, one_by_one(files), lambda _: None))
        await until_async(lambda: len(place.staged(1)) >= 5)
        staging.cancel()
        await asyncio.wait([staging])
        await session.discard("task")
    assert list((place.folder / STAGING).iterdir()) == []


async def test_a_file_that_never_arrives_ends_the_stage_with_its_own_error(place: DropoffPlace, files: list[LocalFile]) -> None:
    async def broken() -> AsyncIterator[Arrival]:
        yield Arrival.of(files[0])
        raise Unavailable("storage_unreachable", "the bucket is away", "It is tried again.")

    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
        with pytest.raises(Unavailable, match="the bucket is away"):
            await session.stage("task", 1, broken(), lambda _: None)


async def test_a_folder_in_the_place_of_a_file_and_a_file_in_the_place_of_a_folder_make_way(
    place: DropoffPlace, tmp_path: Path
) -> None:
    one, other = {"S/a": b"file", "S/b/c/d": b"deep"}, {"S/a/x/y": b"deep", "S/b": b"file"}
    async with place.dropoff().session() as session:
        for fence, contents in ((1, one), (2, other), (3, one)):
            await session.adopt("task", fence)
            await session.stage("task", fence, arriving(write_package(tmp_path / str(fence), contents)), lambda _: None)
            assert place.staged(fence) == contents
