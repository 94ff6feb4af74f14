"""A package arrives whole or not at all, and only from the newest attempt: the twin and three real SFTP servers."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from dropoff_place import STAGING, read_tree
from fault_table import fault
from ncr_upload.adapters.sftp_dropoff import SftpDropoff
from ncr_upload.application.ports import Dropoff, LocalFile
from ncr_upload.domain.errors import DeliveryError, LeaseLost, Rejected, Unavailable
from packages_on_disk import arriving, write_package
from servers import SftpServer
from twins import MemoryDropoff, Staging

pytestmark = pytest.mark.anyio
OLD = {"S/S.glb": b"old model", "S/sources/only_in_old.blend": b"x"}
NEW = {
    "S/S.glb": b"new model!",
    "S/materials/ü ß.png": b"\x89PNG",
    "S/materials/empty.png": b"",
    "S/deep/er/s.bin": b"b" * 700_001,
}


class Place:
    """A destination seen from both sides: through its port, and as its partner sees it."""

    def __init__(self, dropoff: Dropoff, server: SftpServer | None = None) -> None:
        self.dropoff = dropoff
        self.server = server

    def delivered(self, job_id: str = "job-1") -> dict[str, bytes] | None:
        if isinstance(self.dropoff, MemoryDropoff):
            return self.dropoff.deliveries.get(job_id)
        return read_tree(self.folder / job_id) if (self.folder / job_id).exists() else None

    def shown(self) -> set[str]:
        if isinstance(self.dropoff, MemoryDropoff):
            return set(self.dropoff.deliveries)
        return {path.name for path in self.folder.iterdir()} - {STAGING}

    def staged(self) -> set[str]:
        if isinstance(self.dropoff, MemoryDropoff):
            return {f"{task}-{fence}" for task, fence in self.dropoff.staging}
        return {path.name for path in (self.folder / STAGING).iterdir()} if (self.folder / STAGING).exists() else set()

    def set_aside(self, name: str, job_id: str = "job-1") -> None:
        """Do what a publish does before its second rename, and no more."""
        if isinstance(self.dropoff, MemoryDropoff):
            task, _, fence = name.rpartition("-")
            staging: Staging = self.dropoff.staging[task, int(fence)]
            staging.previous[job_id] = self.dropoff.deliveries.pop(job_id)
        else:
            (self.folder / job_id).rename(self.folder / STAGING / name / "previous" / job_id)

    @property
    def folder(self) -> Path:
        assert self.server is not None
        return self.server.folder


@pytest.fixture(params=["memory", "plain", "asyncssh_server", "openssh"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Every test has a base folder of its own, whose parents do not exist yet."""
    if request.param == "memory":
        return Place(MemoryDropoff())
    server: SftpServer = request.getfixturevalue(request.param)
    name = f"{tmp_path.parent.name}-{tmp_path.name}"
    base, folder = os.path.join(server.base_dir, "bases", name), server.folder / "bases" / name  # noqa: PTH118
    return open_place(server, base, folder)


def open_place(server: SftpServer, base: str, folder: Path) -> Place:
    own = SftpServer(server.login, base, folder, server.control)
    return Place(SftpDropoff(server.login, base, channels=3, timeout_seconds=10), own)


@pytest.fixture
def old(tmp_path: Path) -> list[LocalFile]:
    return write_package(tmp_path / "old", OLD)


@pytest.fixture
def new(tmp_path: Path) -> list[LocalFile]:
    return write_package(tmp_path / "new", NEW)


def ignore(_: int) -> None:
    """For tests that do not count bytes."""


def nothing() -> None:
    """For tests that do nothing between the two renames of a publish."""


async def deliver(place: Place, files: list[LocalFile], task: str, fence: int = 1, job_id: str = "job-1") -> None:
    async with place.dropoff.session() as session:
        await session.adopt(task, fence)
        await session.stage(task, fence, arriving(files), ignore)
        await session.publish(task, fence, job_id, nothing)
        await session.discard(task)


# --- whole or not at all ----------------------------------------------------------------------------------------


async def test_a_package_arrives_whole_under_its_job_id(place: Place, new: list[LocalFile]) -> None:
    await deliver(place, new, "task")
    assert place.delivered() == NEW
    assert place.shown() == {"job-1"}
    assert place.staged() == set()


async def test_nothing_shows_before_it_is_published(place: Place, new: list[LocalFile]) -> None:
    async with place.dropoff.session() as session:
        await session.adopt("task", 1)
        await session.stage("task", 1, arriving(new), ignore)
        assert place.shown() == set()
        assert not await session.is_published("task", 1)
        await session.publish("task", 1, "job-1", nothing)
        assert await session.is_published("task", 1)


async def test_a_new_delivery_replaces_the_previous_one_whole(place: Place, old: list[LocalFile], new: list[LocalFile]) -> None:
    await deliver(place, old, "first")
    async with place.dropoff.session() as session:
        await session.adopt("second", 1)
        await session.stage("second", 1, arriving(new), ignore)
        assert place.delivered() == OLD
        await session.publish("second", 1, "job-1", nothing)
        assert place.delivered() == NEW
        await session.discard("second")
    assert place.delivered() == NEW
    assert place.staged() == set()


async def test_publishing_again_changes_nothing(place: Place, new: list[LocalFile]) -> None:
    async with place.dropoff.session() as session:
        await session.adopt("task", 1)
        await session.stage("task", 1, arriving(new), ignore)
        for _ in range(2):
            await session.publish("task", 1, "job-1", nothing)
    assert place.delivered() == NEW


async def test_every_byte_is_told_once_whether_sent_or_kept(place: Place, new: list[LocalFile]) -> None:
    total = sum(len(content) for content in NEW.values())
    for fence in (1, 2):
        told: list[int] = []
        async with place.dropoff.session() as session:
            await session.adopt("task", fence)
            await session.stage("task", fence, arriving(new), told.append)
        assert sum(told) == total


async def test_a_staged_file_whose_content_changed_is_sent_again(place: Place, new: list[LocalFile], tmp_path: Path) -> None:
    """Same target, same size, other bytes: the object was replaced between two attempts."""
    changed = NEW | {"S/S.glb": NEW["S/S.glb"][::-1]}
    async with place.dropoff.session() as session:
        await session.adopt("task", 1)
        await session.stage("task", 1, arriving(new), ignore)
        await session.adopt("task", 2)
        await session.stage("task", 2, arriving(write_package(tmp_path / "changed", changed)), ignore)
        await session.publish("task", 2, "job-1", nothing)
    assert place.delivered() == changed


async def test_a_staged_file_that_is_no_longer_listed_is_not_delivered(
    place: Place, old: list[LocalFile], new: list[LocalFile]
) -> None:
    async with place.dropoff.session() as session:
        await session.adopt("task", 1)
        await session.stage("task", 1, arriving(old), ignore)
        await session.stage("task", 1, arriving(new), ignore)
        await session.publish("task", 1, "job-1", nothing)
    assert place.delivered() == NEW


async def test_names_as_long_as_a_file_system_allows_arrive(place: Place, tmp_path: Path) -> None:
    contents = {f"S/{'d' * 255}/{'ü' * 125}.glb": b"content"}
    await deliver(place, write_package(tmp_path / "long", contents), "task")
    assert place.delivered() == contents


@pytest.mark.parametrize("job_id", ["", ".", "..", "../job", "/etc", "a/b", STAGING])
async def test_a_job_id_that_is_a_path_is_refused(place: Place, new: list[LocalFile], job_id: str) -> None:
    async with place.dropoff.session() as session:
        await session.adopt("task", 1)
        await session.stage("task", 1, arriving(new), ignore)
        if isinstance(place.dropoff, MemoryDropoff) and job_id == STAGING:
            return  # the twin has no such folder
        with pytest.raises(Rejected):
            await session.publish("task", 1, job_id, nothing)
    assert place.shown() == set()


@pytest.mark.parametrize("target", ["../S/x.glb", "/S/x.glb", "S//x.glb", "S/../../x.glb"])
async def test_a_target_that_leads_out_of_the_package_is_refused(place: Place, tmp_path: Path, target: str) -> None:
    async with place.dropoff.session() as session:
        await session.adopt("task", 1)
        with pytest.raises(Rejected):
            await session.stage("task", 1, arriving(write_package(tmp_path / "bad", {target: b"x"})), ignore)


# --- only the newest attempt ------------------------------------------------------------------------------------


async def test_a_newer_attempt_takes_over_what_was_staged(place: Place, new: list[LocalFile]) -> None:
    async with place.dropoff.session() as stale, place.dropoff.session() as newer:
        await stale.adopt("task", 1)
        await stale.stage("task", 1, arriving(new), ignore)
        await newer.adopt("task", 2)
        assert place.staged() == {"task-2"}
        await newer.stage("task", 2, arriving(new), ignore)
        await newer.publish("task", 2, "job-1", nothing)
    assert place.delivered() == NEW


@fault("Worker: stale after a take-over", injector="two sessions", invariants="OP", outcome="fails; nothing visible changes")
async def test_a_stale_attempt_can_neither_stage_nor_publish(place: Place, old: list[LocalFile], new: list[LocalFile]) -> None:
    await deliver(place, old, "before")
    async with place.dropoff.session() as stale, place.dropoff.session() as newer:
        await stale.adopt("task", 1)
        await stale.stage("task", 1, arriving(new), ignore)
        await newer.adopt("task", 2)
        for attempt in (stale.publish("task", 1, "job-1", nothing), stale.stage("task", 1, arriving(new), ignore)):
            with pytest.raises(Unavailable):
                await attempt
        assert place.delivered() == OLD
        await newer.publish("task", 2, "job-1", nothing)
        with pytest.raises(Unavailable):
            await stale.publish("task", 1, "job-1", nothing)
    assert place.delivered() == NEW
    assert place.staged() == {"task-2"}


async def test_a_stale_attempt_cannot_come_back(place: Place) -> None:
    async with place.dropoff.session() as session:
        await session.adopt("task", 2)
        with pytest.raises(LeaseLost):
            await session.adopt("task", 1)
    assert place.staged() == {"task-2"}


async def test_adopting_again_keeps_what_is_staged(place: Place, new: list[LocalFile]) -> None:
    async with place.dropoff.session() as session:
        await session.adopt("task", 1)
        await session.stage("task", 1, arriving(new), ignore)
        await session.adopt("task", 1)
        await session.publish("task", 1, "job-1", nothing)
    assert place.delivered() == NEW


@pytest.mark.parametrize("published", [False, True])
async def test_the_next_attempt_can_tell_whether_the_last_one_published(
    place: Place, new: list[LocalFile], published: bool
) -> None:
    async with place.dropoff.session() as session:
        await session.adopt("task", 1)
        await session.stage("task", 1, arriving(new), ignore)
        if published:
            await session.publish("task", 1, "job-1", nothing)
        await session.adopt("task", 2)
        assert await session.is_published("task", 2) is published


@fault(
    "SFTP: crash between the two renames",
    injector="the first rename only",
    invariants="OPR",
    outcome="the previous delivery is put back, then replaced",
)
async def test_a_crash_between_the_two_renames_is_healed_by_publishing_again(
    place: Place, old: list[LocalFile], new: list[LocalFile]
) -> None:
    await deliver(place, old, "before")
    async with place.dropoff.session() as session:
        await session.adopt("task", 1)
        await session.stage("task", 1, arriving(new), ignore)
        place.set_aside("task-1")
        assert place.delivered() is None
        await session.adopt("task", 2)
        assert place.delivered() == OLD, "the partner is not left without a delivery while the package is made again"
        assert not await session.is_published("task", 2)
        await session.publish("task", 2, "job-1", nothing)
        await session.discard("task")
    assert place.delivered() == NEW
    assert place.staged() == set()


# --- cleaning up ------------------------------------------------------------------------------------------------


async def test_discard_removes_every_staging_folder_of_the_task_and_no_other(place: Place, new: list[LocalFile]) -> None:
    async with place.dropoff.session() as session:
        for task, fence in (("task", 1), ("task-1", 2), ("other", 7)):
            await session.adopt(task, fence)
            await session.stage(task, fence, arriving(new), ignore)
        await session.publish("other", 7, "job-1", nothing)
        await session.discard("task")
        assert place.staged() == {"task-1-2", "other-7"}
        await session.discard("task")
        await session.discard("never-seen")
    assert place.delivered() == NEW


async def test_discard_puts_a_delivery_back_whose_successor_never_came(
    place: Place, old: list[LocalFile], new: list[LocalFile]
) -> None:
    await deliver(place, old, "before")
    async with place.dropoff.session() as session:
        await session.adopt("task", 1)
        await session.stage("task", 1, arriving(new), ignore)
        place.set_aside("task-1")
        await session.discard("task")
    assert place.delivered() == OLD
    assert place.staged() == set()


async def test_discard_takes_the_package_away_from_an_attempt_that_still_runs(place: Place, new: list[LocalFile]) -> None:
    async with place.dropoff.session() as running, place.dropoff.session() as cleaner:
        await running.adopt("task", 1)
        await running.stage("task", 1, arriving(new), ignore)
        await cleaner.discard("task")
        with pytest.raises(Unavailable):
            await running.publish("task", 1, "job-1", nothing)
    assert place.shown() == set()
    assert place.staged() == set()


async def test_every_staging_folder_is_listed_and_can_be_cleared_without_touching_another(
    place: Place, old: list[LocalFile], new: list[LocalFile]
) -> None:
    await deliver(place, old, "before")
    async with place.dropoff.session() as session:
        for task in ("task", "other"):
            await session.adopt(task, 3)
            await session.stage(task, 3, arriving(new), ignore)
        left = {each.name: each for each in await session.leftovers()}
        assert {name: each.task_id for name, each in left.items()} == {"task-3": "task", "other-3": "other"}
        assert all(each.idle_seconds < 600 for each in left.values())
        await session.clear(left["task-3"])
        await session.probe()
    assert place.staged() == {"other-3"}
    assert place.delivered() == OLD


# --- on real servers only ---------------------------------------------------------------------------------------


@pytest.fixture(params=["plain", "openssh"])
def real(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    server: SftpServer = request.getfixturevalue(request.param)
    folder = server.folder / tmp_path.name
    folder.mkdir()
    return open_place(server, f"{server.base_dir.rstrip('/')}/{tmp_path.name}", folder)


async def test_a_finished_file_is_not_sent_again(real: Place, new: list[LocalFile]) -> None:
    async with real.dropoff.session() as session:
        await session.adopt("task", 1)
        await session.stage("task", 1, arriving(new), ignore)
        first = {path.name: path.stat().st_ino for path in (real.folder / STAGING / "task-1" / "package").rglob("*")}
        await session.adopt("task", 2)
        await session.stage("task", 2, arriving(new), ignore)
        second = {path.name: path.stat().st_ino for path in (real.folder / STAGING / "task-2" / "package").rglob("*")}
    assert second == first


async def test_whoever_lists_the_destination_never_sees_a_mixed_or_partial_delivery(
    real: Place, old: list[LocalFile], new: list[LocalFile]
) -> None:
    seen: list[frozenset[str]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            with suppress(FileNotFoundError):
                seen.append(frozenset(path.name for path in (real.folder / "job-1" / "S").iterdir()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        async with real.dropoff.session() as session:
            for turn in range(6):
                await session.adopt(f"task-{turn}", 1)
                await session.stage(f"task-{turn}", 1, arriving([old, new][turn % 2]), ignore)
                await session.publish(f"task-{turn}", 1, "job-1", nothing)
    finally:
        done.set()
        watcher.join()
    assert set(seen) == {frozenset({"S.glb", "sources"}), frozenset({"S.glb", "materials", "deep"})}


async def test_an_empty_folder_left_from_another_layout_is_not_delivered(real: Place, old: list[LocalFile]) -> None:
    async with real.dropoff.session() as session:
        await session.adopt("task", 1)
        (real.folder / STAGING / "task-1" / "package" / "S" / "leftover").mkdir(parents=True)
        await session.stage("task", 1, arriving(old), ignore)
        await session.publish("task", 1, "job-1", nothing)
    assert not (real.folder / "job-1" / "S" / "leftover").exists()


async def test_how_long_a_staging_folder_is_idle_is_told_by_the_servers_clock(real: Place, new: list[LocalFile]) -> None:
    day = 86_400
    staging = real.folder / STAGING
    async with real.dropoff.session() as session:
        for task in ("old", "busy"):
            await session.adopt(task, 1)
            await session.stage(task, 1, arriving(new), ignore)
        (staging / "busy-1" / "parts" / "0").write_bytes(b"arriving")
        for path in [*staging.rglob("*")]:
            if path.name != "0":
                os.utime(path, (path.stat().st_atime, path.stat().st_mtime - day))
        (staging / "probe.dead").mkdir()
        left = {each.name: each for each in await session.leftovers()}
        assert left["old-1"].idle_seconds == pytest.approx(day, abs=600)
        assert left["busy-1"].idle_seconds < 600
        assert left["probe.dead"].task_id is None
        await session.clear(left["probe.dead"])
    assert real.staged() == {"old-1", "busy-1"}


@fault("SFTP: two workers adopt at once", injector="two sessions", invariants="OPR", outcome="one owner of the staging folder")
async def test_two_attempts_at_once_leave_one_owner(real: Place, new: list[LocalFile]) -> None:
    """Both adopt at the same time, over and over; whoever still may publish is the newer one."""
    for turn in range(5):
        task = f"task-{turn}"

        async def attempt(fence: int, task: str = task) -> DeliveryError | None:
            async with real.dropoff.session() as session:
                try:
                    await session.adopt(task, fence)
                    await session.stage(task, fence, arriving(new), ignore)
                except DeliveryError as error:
                    return error
                return None

        told = await asyncio.gather(attempt(1), attempt(2))
        assert {name for name in real.staged() if name.startswith(f"{task}-")} == {f"{task}-2"}, told
