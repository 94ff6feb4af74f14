"""The downloads of one attempt: nothing is fetched without room, nothing twice, and one failure names what decides."""

from __future__ import annotations

import asyncio
import hashlib
import os
import uuid
from pathlib import Path

import pytest

from ledger_twin import MemoryHost
from ncr_upload.application import downloads as module
from ncr_upload.application.download_cache import DownloadCache
from ncr_upload.application.downloads import Downloads, summarised
from ncr_upload.application.ports import Memory, ObjectInfo
from ncr_upload.application.workspace import Workspace, remove_workspaces
from ncr_upload.domain.admission import AdmissionLimits
from ncr_upload.domain.errors import Deferred, DeliveryError, Rejected, Unavailable
from ncr_upload.domain.packages import PlannedFile
from twins import MemoryObjectStore

pytestmark = pytest.mark.anyio
CONTENTS = {"a/one.glb": b"one" * 1000, "a/two.png": b"two", "a/none.mtl": b""}
SPARE_BYTES = 1000


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Desk:
    """A worker's host with a bucket; each `attempt` has a workspace of the same task."""

    def __init__(self, work_dir: Path) -> None:
        self.work_dir = work_dir
        self.task_id = str(uuid.uuid4())
        self.store = MemoryObjectStore(CONTENTS)
        self.host = MemoryHost()
        self.cache = DownloadCache(work_dir, 10**9, self.host)
        self.moved: list[int] = []
        self.fence = 0

    def attempt(self, keys: list[str] | None = None, *, distrustful: bool = False, again: bool = False) -> Attempt:
        self.fence += 1
        plan = [PlannedFile(key, f"SKU/{key}") for key in keys or CONTENTS]
        workspace = Workspace(self.work_dir, self.task_id, self.fence)
        limits = AdmissionLimits(80, SPARE_BYTES)
        return Attempt(
            Downloads(
                plan,
                workspace,
                self.store,
                self.cache,
                self.host,
                limits,
                self.moved.append,
                distrustful=distrustful,
                again=again,
            ),
            workspace,
        )

    def end_task(self) -> None:
        """What was downloaded goes to the cache, and the next attempt is another task's."""
        remove_workspaces(self.work_dir, self.task_id, self.cache)
        self.task_id = str(uuid.uuid4())

    def set_free_disk(self, count: int) -> None:
        self.host.free_disk = lambda _: count  # type: ignore[method-assign]

    def set_total_disk(self, count: int) -> None:
        self.host.total_disk = lambda _: count  # type: ignore[method-assign]


class Attempt:
    def __init__(self, downloads: Downloads, workspace: Workspace) -> None:
        self.downloads = downloads
        self._workspace = workspace

    def __enter__(self) -> Downloads:
        self._workspace.__enter__()
        return self.downloads

    def __exit__(self, *error: object) -> None:
        for task in self.downloads.tasks:
            task.cancel()
        self._workspace.__exit__(None, None, None)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


async def fetch_all(downloads: Downloads) -> int:
    """Run it to its end; how many files `prepare` thought to be here."""
    here = await downloads.prepare()
    downloads.begin(2)
    await downloads.whole()
    return here


async def test_every_file_arrives_with_its_hashes_in_the_order_of_the_plan(desk: Desk) -> None:
    with desk.attempt() as downloads:
        assert await fetch_all(downloads) == 0
        results = downloads.results()
        assert [local.file.key for local in results] == list(CONTENTS)
        assert [local.path.read_bytes() for local in results] == list(CONTENTS.values())
        assert [local.file.sha256 for local in results] == [hashlib.sha256(each).hexdigest() for each in CONTENTS.values()]
        assert (downloads.size.files, downloads.size.bytes) == (3, sum(map(len, CONTENTS.values())))
        assert sum(desk.moved) == downloads.size.bytes
        assert downloads.tell_sources() == "downloaded 3 files"


async def test_the_next_attempt_keeps_what_the_last_one_finished(desk: Desk) -> None:
    with desk.attempt() as downloads:
        await downloads.prepare()
        desk.store.failures |= {key: [LATER] for key in CONTENTS if key != "a/two.png"}
        downloads.begin(2)
        await asyncio.wait(downloads.tasks)
    with desk.attempt() as downloads:
        assert await fetch_all(downloads) == 1
        assert downloads.tell_sources() == "kept 1 of 3 files from the attempt before, downloaded 2"
    assert sorted(desk.store.fetched) == sorted(CONTENTS)


async def test_another_task_takes_the_files_from_the_cache(desk: Desk) -> None:
    with desk.attempt() as downloads:
        await fetch_all(downloads)
    desk.end_task()
    with desk.attempt() as downloads:
        assert await fetch_all(downloads) == 3
        assert downloads.tell_sources() == "took 3 of 3 files from this host's cache of downloads, downloaded 0"
        assert [local.path.read_bytes() for local in downloads.results()] == list(CONTENTS.values())
    assert len(desk.store.fetched) == 3


@pytest.mark.parametrize("distrustful", [True, False])
async def test_who_uses_a_file_before_the_zip_has_read_it_hashes_what_the_cache_gives(desk: Desk, distrustful: bool) -> None:
    """Other bytes of the same length and time, as a broken disk would leave."""
    with desk.attempt(["a/one.glb"]) as downloads:
        await fetch_all(downloads)
        (local,) = downloads.results()
        times = local.path.stat()
        with local.path.open("r+b") as file:
            file.write(b"X")
        os.utime(local.path, ns=(times.st_atime_ns, times.st_mtime_ns))
    desk.end_task()
    with desk.attempt(["a/one.glb"], distrustful=distrustful) as downloads:
        await fetch_all(downloads)
        content = downloads.results()[0].path.read_bytes()
        assert (content == CONTENTS["a/one.glb"]) is distrustful
        if not distrustful:  # the zip finds it, and the next attempt fetches it again
            downloads.distrust()
    if not distrustful:
        with desk.attempt(["a/one.glb"], again=True) as downloads:
            await fetch_all(downloads)
            assert downloads.results()[0].path.read_bytes() == CONTENTS["a/one.glb"]


async def test_an_object_that_a_list_tells_wrongly_is_looked_at_itself_before_a_kept_file_is_used(desk: Desk) -> None:
    with desk.attempt(["a/two.png"]) as downloads:
        await fetch_all(downloads)
    old = await desk.store.stat("a/two.png")
    desk.store.listed = {"a/two.png": old}
    desk.store.objects["a/two.png"] = b"new"
    with desk.attempt(["a/two.png"]) as downloads:
        await fetch_all(downloads)
        assert downloads.results()[0].path.read_bytes() == b"new"


async def test_after_a_failed_attempt_no_list_is_believed(desk: Desk) -> None:
    desk.store.listed = {"a/two.png": ObjectInfo("a/two.png", 99, "old")}
    with desk.attempt(["a/two.png"], again=True) as downloads:
        await downloads.prepare()
        assert downloads.size.bytes == len(CONTENTS["a/two.png"])


async def test_all_missing_objects_are_named_in_one_rejection(desk: Desk) -> None:
    with desk.attempt(["a/two.png", *(f"missing/{number}" for number in range(7))]) as downloads:
        error = await prepare_error(downloads)
    assert (type(error), error.code) == (Rejected, "object_missing")
    assert all(f"missing/{number}" in error.message for number in range(5))
    assert "(and 2 more)" in error.message
    assert desk.store.fetched == []


async def test_a_failed_download_is_raised_as_soon_as_it_fails(desk: Desk) -> None:
    with desk.attempt() as downloads:
        await downloads.prepare()
        desk.store.failures["a/two.png"] = [Unavailable("s3_unreachable", "cut", "Wait.")]
        downloads.begin(2)
        with pytest.raises(Unavailable, match="cut"):
            await downloads.whole()


async def test_a_disk_that_another_program_filled_empties_the_cache(desk: Desk) -> None:
    with desk.attempt(["a/one.glb"]) as downloads:
        await fetch_all(downloads)
    desk.end_task()
    assert list(desk.cache.folder.iterdir())
    with desk.attempt(["a/two.png"]) as downloads:
        await downloads.prepare()
        desk.store.failures["a/two.png"] = [Deferred("disk_full", "no space", "Free some.")]
        downloads.begin(1)
        with pytest.raises(Deferred, match="no space"):
            await downloads.whole()
    assert list(desk.cache.folder.iterdir()) == []


async def test_small_files_come_when_they_are_whole_and_large_ones_while_they_arrive(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GROWING_BYTES", 1000)
    with desk.attempt() as downloads:
        await downloads.prepare()
        downloads.begin(2)
        seen = [(arrival.target, arrival.local is not None) async for arrival in downloads.as_they_come()]
    assert seen[0] == ("SKU/a/one.glb", False)
    assert sorted(seen[1:]) == [("SKU/a/none.mtl", True), ("SKU/a/two.png", True)]


# --- room


NEEDED = sum(map(len, CONTENTS.values()))


async def prepare_error(downloads: Downloads) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        await downloads.prepare()
    return caught.value


async def test_a_package_larger_than_the_empty_disk_is_refused_and_exactly_that_large_is_not(desk: Desk) -> None:
    desk.set_total_disk(NEEDED + SPARE_BYTES - 1)
    with desk.attempt() as downloads:
        error = await prepare_error(downloads)
        assert (type(error), error.code) == (Rejected, "disk_too_small")
        assert str(desk.work_dir) in error.next_step
    desk.set_total_disk(NEEDED + SPARE_BYTES)
    with desk.attempt() as downloads:
        await downloads.prepare()


async def test_a_job_without_room_on_the_disk_waits_and_names_the_folder(desk: Desk) -> None:
    desk.set_free_disk(NEEDED + SPARE_BYTES - 1)
    with desk.attempt() as downloads:
        error = await prepare_error(downloads)
        assert (type(error), error.code) == (Deferred, "disk_short")
        assert str(desk.work_dir) in error.next_step
        desk.set_free_disk(NEEDED + SPARE_BYTES)
        await downloads.prepare()


async def test_a_job_without_memory_waits(desk: Desk) -> None:
    desk.host.figures = Memory(81, 100, "host")
    with desk.attempt() as downloads:
        error = await prepare_error(downloads)
    assert (type(error), error.code) == (Deferred, "memory_short")


async def test_what_two_attempts_reserve_is_not_given_twice(desk: Desk) -> None:
    desk.set_free_disk(2 * NEEDED + SPARE_BYTES - 1)
    other = Desk(desk.work_dir)
    other.host = desk.host
    with desk.attempt() as downloads, other.attempt() as second:
        await downloads.prepare()
        assert (await prepare_error(second)).code == "disk_short"


async def test_what_is_here_already_needs_no_room(desk: Desk) -> None:
    with desk.attempt() as downloads:
        await fetch_all(downloads)
    desk.set_free_disk(SPARE_BYTES)
    with desk.attempt() as downloads:
        assert await downloads.prepare() == 3


async def test_the_cache_makes_room_before_the_job_waits(desk: Desk) -> None:
    with desk.attempt() as downloads:
        await fetch_all(downloads)
    desk.end_task()
    desk.store.objects["b/new.glb"] = b"n" * NEEDED

    def free(_: object) -> int:
        held = sum(path.stat().st_size for path in desk.cache.folder.iterdir())
        return NEEDED + SPARE_BYTES - held

    desk.host.free_disk = free  # type: ignore[method-assign]
    with desk.attempt(["b/new.glb"]) as downloads:
        await fetch_all(downloads)
    assert [path for path in desk.cache.folder.iterdir() if path.stat().st_size] == []


# --- the failure that decides


LATER = Unavailable("s3_unreachable", "cut", "Wait.")


def refusal(number: int) -> Rejected:
    return Rejected("object_missing", f"no object {number}", "Upload it.")


def test_a_rejection_decides_before_what_could_be_tried_again() -> None:
    assert summarised([LATER, refusal(1), LATER]) is not LATER
    assert summarised([LATER, refusal(1), LATER]).args == refusal(1).args
    assert summarised([LATER, asyncio.CancelledError()]) is LATER


@pytest.mark.parametrize(("count", "more"), [(1, ""), (5, ""), (6, "(and 1 more)"), (100, "(and 95 more)")])
def test_further_rejections_are_named_and_then_counted(count: int, more: str) -> None:
    said = summarised([refusal(number) for number in range(count)])
    assert isinstance(said, Rejected)
    assert all(f"no object {number}" in said.message for number in range(min(count, 5)))
    assert said.message.endswith(more)
    assert "more" in said.message or not more
