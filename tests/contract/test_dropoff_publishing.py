"""A server that renames a folder by copying its files: fast, slow, or breaking off. One whole delivery is always there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from dropoff_place import STAGING, DropoffPlace, place_on, read_tree
from fault_table import fault
from ncr_upload.adapters.sftp_dropoff import publishing, scratch
from ncr_upload.adapters.sftp_dropoff.dropoff import SftpSession
from ncr_upload.adapters.sftp_dropoff.remote import Remote
from ncr_upload.application.ports import AnnouncedPublish, LocalFile, Successor
from ncr_upload.domain.errors import DeliveryError, NotPublished, Unavailable
from packages_on_disk import arriving, write_package
from servers import SftpServer, start_asyncssh

pytestmark = pytest.mark.anyio
OLD = {"S/S.glb": b"old model", "S/same.png": b"same size 1", "S/sources/only_in_old.blend": b"x" * 30}
NEW = {
    "S/S.glb": b"new model!",
    "S/same.png": b"same size 2",
    "S/materials/m.png": b"\x89PNG",
    "S/deep/er/s.bin": b"b" * 70_001,
}
DELETES = ("each", "end", "never")


@pytest.fixture(scope="module")
def copying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SftpServer]:
    with start_asyncssh(tmp_path_factory.mktemp("copying"), extensions=False) as server:
        yield server


@pytest.fixture
def place(copying: SftpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DropoffPlace]:
    """Whose renames are over at once, whether they end or break off; and nobody else probes it."""
    monkeypatch.setattr(publishing, "STILL_SECONDS", 0.05)
    monkeypatch.setattr(scratch, "TRIES", 2)
    with place_on(copying, tmp_path.name) as place:
        yield place


@pytest.fixture
def slow_place(place: DropoffPlace, monkeypatch: pytest.MonkeyPatch) -> DropoffPlace:
    """Two looks are further apart than the server's two writes of a file."""
    monkeypatch.setattr(publishing, "STILL_SECONDS", 0.5)
    return place


@pytest.fixture
def old(tmp_path: Path) -> list[LocalFile]:
    return write_package(tmp_path / "old", OLD)


@pytest.fixture
def new(tmp_path: Path) -> list[LocalFile]:
    return write_package(tmp_path / "new", NEW)


class Job:
    """The attempts at one re-delivery, as the pipeline makes them; after each, one whole delivery must be there."""

    def __init__(self, place: DropoffPlace, files: list[LocalFile], *, redelivery: bool = True) -> None:
        self.place, self.files, self.redelivery = place, files, redelivery
        self.announced: AnnouncedPublish | None = None
        self.fence = 1
        self.said: list[str] = []

    async def attempt(self, timeout_seconds: float = 20) -> bool:
        """Whether it is delivered."""
        self.fence += 1
        try:
            async with self.place.dropoff(timeout_seconds=timeout_seconds).session() as session:
                return await self._deliver(session)
        except NotPublished as failure:
            self.announced = None
            self.said.append(failure.message)
        except DeliveryError as failure:
            self.said.append(failure.message)
        finally:
            self.check()
        return False

    async def _deliver(self, session: SftpSession) -> bool:
        self.said.append(await session.adopt("task", self.fence, self.announced))
        if self.announced is None or not await session.is_published("task", self.fence):
            self.announced = None
            await session.stage("task", self.fence, arriving(self.files), lambda _: None, self.place.previous)
            self.announced = AnnouncedPublish("job-1", {each.file.target: each.file.size for each in self.files})
            self.said.append(await session.publish("task", self.fence, "job-1", lambda: None))
        assert self.place.delivered() == NEW
        await session.discard("task")
        return True

    async def deliver(self, attempts: int = 4, **settings: float) -> int:
        for number in range(1, attempts + 1):
            if await self.attempt(**settings):
                return number
        raise AssertionError(self.said)

    def check(self) -> None:
        """K, from outside: the new one whole under its name, or every file of the old one there or set aside."""
        final = self.place.delivered() if (self.place.folder / "job-1").exists() else {}
        if final == NEW or not self.redelivery:
            return
        staging = self.place.folder / STAGING
        there = [final, *(read_tree(folder) for folder in staging.glob("task-*/previous/job-1"))]
        lost = [path for path, content in OLD.items() if not any(found.get(path) == content for found in there)]
        assert not lost, (lost, self.said)


async def deliver_before(place: DropoffPlace, old: list[LocalFile]) -> None:
    await place.deliver(old, task="before")


def staging_is_empty(place: DropoffPlace) -> bool:
    return list((place.folder / STAGING).iterdir()) == []


BREAKS = fault(
    "SFTP: a rename of a folder copies files and breaks off",
    injector="SFTP server that copies",
    invariants="LOKRH",
    outcome="finished file by file, or the previous delivery put back and tried again",
)
SLOW = fault(
    "SFTP: a rename of a folder goes on after the time-out",
    injector="SFTP server that copies slowly",
    invariants="LOKRH",
    outcome="waited for until nothing moves, then recorded or undone; no second rename on top",
)


@pytest.mark.parametrize("deletes", DELETES)
@pytest.mark.parametrize("stops", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("which", ["aside", "publish"])
@BREAKS
async def test_a_rename_that_breaks_off_once_is_ended_and_the_package_delivered(
    place: DropoffPlace, old: list[LocalFile], new: list[LocalFile], which: str, stops: int, deletes: str
) -> None:
    await deliver_before(place, old)
    place.server.fault(f"copy {which} {stops} {deletes} 0 ok")
    job = Job(place, new)
    assert await job.deliver() <= 2, job.said
    assert place.delivered() == NEW
    assert staging_is_empty(place)


@pytest.mark.parametrize("stops", [0, 1, 3])
@BREAKS
async def test_a_server_that_always_breaks_off_never_costs_the_previous_delivery(
    place: DropoffPlace, old: list[LocalFile], new: list[LocalFile], stops: int
) -> None:
    """Every rename of a folder, those of staging folders too; rows 1 of the issue, five times over."""
    await deliver_before(place, old)
    job = Job(place, new)
    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
    place.server.fault(f"copy all {stops} each 0 ok")
    delivered = False
    for _ in range(5):
        delivered = delivered or await job.attempt()
    async with place.dropoff().session() as session:
        await session.discard("task", Successor.DELIVERED if delivered else Successor.NONE)
    assert place.delivered() == (NEW if delivered else OLD), job.said
    assert staging_is_empty(place)


@pytest.mark.parametrize("stops", [1, 2, 3])
@BREAKS
async def test_a_first_delivery_that_broke_off_is_finished_or_taken_back(
    place: DropoffPlace, new: list[LocalFile], stops: int
) -> None:
    place.server.fault(f"copy publish {stops} each 0 ok")
    job = Job(place, new, redelivery=False)
    assert await job.deliver() <= 2
    assert "renames of single files" in "".join(job.said)
    assert place.delivered() == NEW


@pytest.mark.parametrize("stops", [1, 3, 5])
@BREAKS
async def test_what_a_broken_take_over_left_in_two_folders_is_brought_together(
    place: DropoffPlace, old: list[LocalFile], new: list[LocalFile], stops: int
) -> None:
    """The previous delivery is set aside, and the folder it is in breaks in two on its way to the next attempt."""
    await deliver_before(place, old)
    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
        await session.stage("task", 1, arriving(new), lambda _: None)
    (place.folder / "job-1").rename(place.folder / STAGING / "task-1" / "previous" / "job-1")
    place.server.fault(f"copy adopt {stops} each 0 ok")
    job = Job(place, new)
    assert await job.deliver() <= 2, job.said
    assert staging_is_empty(place)


@pytest.mark.parametrize("deletes", DELETES)
@pytest.mark.parametrize("which", ["aside", "publish", "adopt"])
@SLOW
async def test_a_rename_that_is_slower_than_the_time_out_is_waited_for(
    slow_place: DropoffPlace, old: list[LocalFile], new: list[LocalFile], which: str, deletes: str
) -> None:
    place = slow_place
    await deliver_before(place, old)
    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
    place.server.fault(f"copy {which} -1 {deletes} 0.35 ok")
    job = Job(place, new)
    assert await job.deliver(timeout_seconds=1) <= 2, job.said
    assert place.delivered() == NEW
    assert staging_is_empty(place)


@pytest.mark.parametrize("which", ["aside", "publish"])
@SLOW
async def test_a_rename_that_goes_on_after_the_client_is_gone_is_not_renamed_on_top_of(
    slow_place: DropoffPlace, old: list[LocalFile], new: list[LocalFile], which: str
) -> None:
    place = slow_place
    await deliver_before(place, old)
    place.server.fault(f"copy {which} -1 each 0.3 ok")
    job = Job(place, new)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await job.attempt()
    job.announced = AnnouncedPublish("job-1", {each.file.target: each.file.size for each in new})
    assert await job.deliver() <= 2, job.said
    assert staging_is_empty(place)


@pytest.mark.parametrize("which", ["aside", "publish"])
@fault(
    "SFTP: a rename of a folder answered 'Failure' though it was done",
    injector="SFTP server that copies",
    invariants="LOKRH",
    outcome="what is listed counts: published, or put back",
)
async def test_a_no_that_was_a_yes_is_seen_through(
    place: DropoffPlace, old: list[LocalFile], new: list[LocalFile], which: str
) -> None:
    await deliver_before(place, old)
    place.server.fault(f"copy {which} -1 each 0 no")
    job = Job(place, new)
    assert await job.deliver() <= 2, job.said


@pytest.mark.parametrize("kill_after", range(1, 9))
@BREAKS
async def test_an_attempt_killed_while_it_moves_single_files_is_gone_on_with(
    place: DropoffPlace, old: list[LocalFile], new: list[LocalFile], kill_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    await deliver_before(place, old)
    place.server.fault("copy publish 2 each 0 ok")
    job = Job(place, new)
    plain, renamed = Remote.rename, 0

    class Killed(BaseException):
        """The worker is gone: nothing of ours runs any more."""

    async def rename(self: Remote, source: str, target: str) -> None:
        nonlocal renamed
        if "job-1" in target or "job-1" in source:
            renamed += 1
            if renamed == kill_after + 2:
                raise Killed
        await plain(self, source, target)

    monkeypatch.setattr(Remote, "rename", rename)
    try:
        await job.attempt()
    except (Killed, BaseExceptionGroup):
        job.check()
    monkeypatch.setattr(Remote, "rename", plain)
    assert await job.deliver() <= 2, job.said
    assert staging_is_empty(place)


@fault(
    "SFTP: a foreign file is merged into the delivery",
    injector="SFTP server that merges folders",
    invariants="OK",
    outcome="moved aside; the delivery is exactly its manifest",
)
async def test_a_folder_the_server_merged_with_is_no_delivery_until_it_is_exactly_the_package(
    place: DropoffPlace, new: list[LocalFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.server.fault("copy publish -1 each 0 ok")
    plain = Remote.rename

    async def squat(self: Remote, source: str, target: str) -> None:
        if target.endswith("/job-1") and source.endswith("/package"):
            (place.folder / "job-1").mkdir()
            (place.folder / "job-1" / "foreign.txt").write_text("not ours")
        await plain(self, source, target)

    monkeypatch.setattr(Remote, "rename", squat)
    job = Job(place, new, redelivery=False)
    assert await job.deliver() == 1
    assert place.delivered() == NEW


@fault(
    "SFTP: renames of folders are refused while an ended task is cleaned up",
    injector="SFTP server that refuses them",
    invariants="KR",
    outcome="removed in place; no folder is left",
)
async def test_clean_up_needs_no_rename(place: DropoffPlace, new: list[LocalFile]) -> None:
    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
        await session.stage("task", 1, arriving(new), lambda _: None)
        place.server.fault("copy all 0 each 0 ok")
        await session.discard("task")
    assert staging_is_empty(place)


async def test_an_ended_task_whose_previous_delivery_cannot_be_put_back_whole_is_kept_and_told(
    place: DropoffPlace, old: list[LocalFile], new: list[LocalFile]
) -> None:
    """Somebody else's folder has the final name, and the previous delivery is set aside."""
    await deliver_before(place, old)
    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
        await session.stage("task", 1, arriving(new), lambda _: None)
        (place.folder / "job-1").rename(place.folder / STAGING / "task-1" / "previous" / "job-1")
        (place.folder / "job-1").mkdir()
        (place.folder / "job-1" / "theirs.bin").write_bytes(b"y" * 99_999)
        with pytest.raises(Unavailable, match=r"task-1\.gone is kept") as kept:
            await session.discard("task")
        assert kept.value.code == "previous_kept"
        assert read_tree(place.folder / STAGING / "task-1.gone" / "previous" / "job-1") == OLD
        await session.discard("task", Successor.DELIVERED)
    assert place.delivered() == {"theirs.bin": b"y" * 99_999}
    assert staging_is_empty(place)
