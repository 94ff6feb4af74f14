"""Downloads that outlive their task: the very object and the very bytes, or none; never in anybody's way."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ledger_twin import MemoryHost
from ncr_upload.application import download_cache
from ncr_upload.application.download_cache import FOLDER, DownloadCache, Entry, describe
from ncr_upload.application.ports import Fetched, ObjectInfo
from ncr_upload.application.workspace import Workspace, remove_oldest, remove_workspaces, sweep_workspaces
from ncr_upload.domain.jobs import Status

SOURCE, CONTENT, ETAG = "https://s3 bucket", b"glTF and so on", "e" * 32
LIMIT = 10**9


@pytest.fixture
def cache(tmp_path: Path) -> DownloadCache:
    return make_cache(tmp_path)


def make_cache(work_dir: Path, limit_bytes: int = LIMIT, free_bytes: int = 10**12) -> DownloadCache:
    host = MemoryHost()
    host.free_disk = lambda _: free_bytes  # type: ignore[method-assign]
    return DownloadCache(work_dir, limit_bytes, host)


def object_of(key: str, content: bytes = CONTENT, etag: str = ETAG) -> ObjectInfo:
    return ObjectInfo(key, len(content), etag)


def fetched_of(content: bytes = CONTENT, etag: str = ETAG) -> Fetched:
    return Fetched(len(content), hashlib.sha256(content).hexdigest(), zlib.crc32(content), etag)


def deliver(cache: DownloadCache, key: str, content: bytes = CONTENT, etag: str = ETAG) -> None:
    """A task that downloads one object and ends."""
    work_dir, task_id = cache.folder.parent, str(uuid.uuid4())
    with Workspace(work_dir, task_id, 1) as workspace:
        fetch(workspace, key, content, etag)
    remove_workspaces(work_dir, task_id, cache)


def fetch(workspace: Workspace, key: str, content: bytes = CONTENT, etag: str = ETAG) -> Path:
    place = workspace.place(key)
    place.write_bytes(content)
    fetched = fetched_of(content, etag)
    workspace.note(key, fetched, describe(SOURCE, key, fetched, place))
    return place


def take(cache: DownloadCache, wanted: ObjectInfo, source: str = SOURCE) -> bytes | None:
    """What another task finds of the object."""
    with Workspace(cache.folder.parent, str(uuid.uuid4()), 1) as workspace:
        place = workspace.place(wanted.key)
        taken = cache.take(source, [(wanted, place)])
        found = place.read_bytes() if taken else None
        assert (found is not None) == place.exists()
        if found is not None:
            assert taken == {wanted.key: fetched_of(found, wanted.etag)}
    remove_workspaces(cache.folder.parent, workspace.task_id, cache)
    return found


def entries(cache: DownloadCache) -> list[Path]:
    return sorted(cache.folder.iterdir()) if cache.folder.exists() else []


# --- what is found ------------------------------------------------------------------------------------------------


def test_what_an_ended_task_had_downloaded_is_there_for_others_and_stays(cache: DownloadCache) -> None:
    deliver(cache, "a")
    assert [take(cache, object_of("a")) for _ in range(2)] == [CONTENT, CONTENT]
    (entry,) = entries(cache)
    assert entry.stat().st_mode & 0o777 == 0o400
    assert [path.name for path in cache.folder.parent.iterdir()] == [FOLDER]


@pytest.mark.parametrize(
    "wanted",
    [object_of("b"), object_of("a", etag="f" * 32), object_of("a", CONTENT + b"!"), object_of("a", etag="")],
    ids=["key", "etag", "size", "no etag"],
)
def test_another_object_is_not_found(cache: DownloadCache, wanted: ObjectInfo) -> None:
    deliver(cache, "a")
    assert take(cache, wanted) is None


def test_the_same_key_and_etag_in_another_bucket_is_another_object(cache: DownloadCache) -> None:
    deliver(cache, "a")
    assert take(cache, object_of("a"), "https://s3 other") is None


@pytest.mark.parametrize("etag", ["", 'w/"1'])
def test_without_a_strong_etag_nothing_is_kept(cache: DownloadCache, etag: str) -> None:
    deliver(cache, "a", etag=etag)
    assert take(cache, object_of("a", etag=etag)) is None
    assert entries(cache) == []


def test_what_the_journal_does_not_tell_of_is_not_kept(cache: DownloadCache) -> None:
    """A part, a file whose line could not be written."""
    work_dir, task_id = cache.folder.parent, str(uuid.uuid4())
    with Workspace(work_dir, task_id, 1) as workspace:
        workspace.place("a").write_bytes(CONTENT)
        (workspace.path / ".0123.part").write_bytes(CONTENT)
    remove_workspaces(work_dir, task_id, cache)
    assert entries(cache) == []


@pytest.mark.parametrize("damage", ["bytes", "longer", "cut", "replaced"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_that_was_touched_is_never_used(cache: DownloadCache, damage: str, when: str) -> None:
    """Before it came into the cache, and in there."""
    work_dir, task_id = cache.folder.parent, str(uuid.uuid4())
    with Workspace(work_dir, task_id, 1) as workspace:
        place = fetch(workspace, "a")
        if when == "before":
            touch(place, damage)
    remove_workspaces(work_dir, task_id, cache)
    if when == "after":
        touch(entries(cache)[0], damage)
    assert take(cache, object_of("a")) is None
    assert entries(cache) == []


def touch(path: Path, damage: str) -> None:
    path.chmod(0o600)
    time.sleep(0.02)  # the kernel's clock for files ticks in milliseconds
    match damage:
        case "bytes":
            with path.open("r+b") as file:
                file.write(b"GLTF")
        case "longer":
            with path.open("ab") as file:
                file.write(b"!")
        case "cut":
            os.truncate(path, 3)
        case "replaced":
            file = path.stat()
            other = path.with_name("other")
            other.write_bytes(CONTENT)
            os.utime(other, ns=(file.st_atime_ns, file.st_mtime_ns))
            other.replace(path)


def test_an_object_that_two_tasks_downloaded_is_kept_once(cache: DownloadCache) -> None:
    deliver(cache, "a")
    deliver(cache, "a")
    assert len(entries(cache)) == 1


def test_a_killed_workers_downloads_are_kept_when_its_workspace_is_swept(cache: DownloadCache) -> None:
    work_dir, task_id = cache.folder.parent, str(uuid.uuid4())
    with Workspace(work_dir, task_id, 1) as workspace:
        fetch(workspace, "a")
    sweep_workspaces(work_dir, lambda ids: dict.fromkeys(ids, Status.FAILED), cache)
    assert take(cache, object_of("a")) == CONTENT


def test_a_workspace_that_goes_for_want_of_room_leaves_nothing(cache: DownloadCache) -> None:
    work_dir, task_id = cache.folder.parent, str(uuid.uuid4())
    with Workspace(work_dir, task_id, 1) as workspace:
        fetch(workspace, "a")
    assert list(remove_oldest(work_dir, but_of="another"))
    assert entries(cache) == []


def test_removing_an_object_removes_every_file_of_it_and_no_other(cache: DownloadCache) -> None:
    for key in ("a", "b"):
        deliver(cache, key)
    cache.remove(SOURCE, object_of("a"))
    assert (take(cache, object_of("a")), take(cache, object_of("b"))) == (None, CONTENT)


def test_no_entry_is_made_of_a_name_that_is_not_its_own() -> None:
    entry = Entry("i" * 32, 5, "a" * 64, 7, 123, 456)
    assert Entry.parse(entry.name) == entry
    assert len(replace(entry, size=10**13, inode=2**64, mtime_ns=2**62).name) < 200
    for name in ("", "notes.txt", entry.name + ".part", entry.name.replace(".5.", ".05."), entry.name.replace(".5.", ".x.")):
        assert Entry.parse(name) is None


# --- what goes ----------------------------------------------------------------------------------------------------


def test_beyond_the_limit_the_least_recently_used_go(tmp_path: Path) -> None:
    content = bytes(100)
    cache = make_cache(tmp_path, limit_bytes=450)
    for key in "abcd":
        deliver(cache, key, content)
    with Workspace(tmp_path, str(uuid.uuid4()), 1) as workspace:  # nothing is read: its time would be noted on some disks
        assert cache.take(SOURCE, [(object_of("a", content), workspace.place("a"))])
    remove_workspaces(tmp_path, workspace.task_id, cache)
    deliver(cache, "e", content)
    assert [key for key in "abcde" if take(cache, object_of(key, content))] == ["a", "c", "d", "e"]
    assert sum(path.stat().st_size for path in entries(cache)) <= 450


def test_a_package_larger_than_the_limit_does_not_stay(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, limit_bytes=10)
    deliver(cache, "a")
    assert entries(cache) == []


def test_with_a_limit_of_nothing_nothing_is_kept_and_what_was_goes(tmp_path: Path, cache: DownloadCache) -> None:
    deliver(cache, "a")
    off = make_cache(tmp_path, limit_bytes=0)
    deliver(off, "b")
    assert (take(off, object_of("a")), take(off, object_of("b"))) == (None, None)
    sweep_workspaces(tmp_path, lambda _: {}, off)
    assert entries(off) == []
    assert make_cache(tmp_path / "missing", limit_bytes=0).trim() == []


def test_there_are_not_too_many(cache: DownloadCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_cache, "MAX_ENTRIES", 10)
    for number in range(11):
        deliver(cache, str(number))
    assert len(entries(cache)) == 9
    assert take(cache, object_of("10")) == CONTENT
    assert take(cache, object_of("0")) is None


def test_it_leaves_as_much_of_the_disk_free_as_it_takes(tmp_path: Path) -> None:
    """Another program fills the disk."""
    cache = make_cache(tmp_path)
    for number in range(10):
        deliver(cache, str(number), bytes(100))
    assert cache.trim() == []
    assert len(make_cache(tmp_path, free_bytes=600).trim()) == 3
    assert len(make_cache(tmp_path, free_bytes=0).trim()) == 4


def test_strangers_in_its_folder_are_left_alone(cache: DownloadCache) -> None:
    deliver(cache, "a")
    for name in ("notes.txt", "a.b.c.d.e.f"):
        (cache.folder / name).write_text("not ours")
    assert cache.held_bytes() == len(CONTENT)
    assert take(cache, object_of("a")) == CONTENT
    assert cache.clear()
    assert [path.name for path in entries(cache)] == ["a.b.c.d.e.f", "notes.txt"]
    assert make_cache(cache.folder.parent, limit_bytes=0).trim() == []


def test_room_is_made_one_by_one_and_never_of_what_is_in_use(cache: DownloadCache) -> None:
    for key in "abc":
        deliver(cache, key)
    with Workspace(cache.folder.parent, str(uuid.uuid4()), 1) as workspace:
        assert cache.take(SOURCE, [(object_of("b"), workspace.place("b"))])
        going = cache.make_room()
        assert next(going)
        assert take(cache, object_of("a")) is None
        assert take(cache, object_of("c")) == CONTENT
        assert len(list(going)) == 1
        assert next(going, None) is None
        assert make_cache(cache.folder.parent, limit_bytes=0).trim() == []
        assert workspace.place("b").read_bytes() == CONTENT
    remove_workspaces(cache.folder.parent, workspace.task_id, cache)
    assert cache.clear()
    assert entries(cache) == []
    assert not cache.clear()


def test_a_workspaces_removal_leaves_the_entry_it_used(cache: DownloadCache) -> None:
    deliver(cache, "a")
    with Workspace(cache.folder.parent, str(uuid.uuid4()), 1) as workspace:
        cache.take(SOURCE, [(object_of("a"), workspace.place("a"))])
        workspace.clear_all_but([])
    assert take(cache, object_of("a")) == CONTENT


def test_the_kernel_may_forget_what_it_keeps_in_memory(cache: DownloadCache) -> None:
    deliver(cache, "a")
    cache.forget_pages()
    assert take(cache, object_of("a")) == CONTENT


def test_a_file_system_without_hard_links_keeps_nothing_and_fails_nothing(
    cache: DownloadCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver(cache, "a")

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    assert take(cache, object_of("a")) is None


def test_a_folder_that_cannot_be_made_fails_nothing(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    (tmp_path / FOLDER).write_text("in the way")
    deliver(cache, "a")
    assert take(cache, object_of("a")) is None


# --- several at once ----------------------------------------------------------------------------------------------


def work(work_dir: str, seed: int, seconds: float) -> None:
    """Deliver objects at random, whose content follows from their key, and check each."""
    chance, cache, end = random.Random(seed), make_cache(Path(work_dir), limit_bytes=2000), time.monotonic() + seconds
    while time.monotonic() < end:
        key = str(chance.randrange(12))
        content = key.encode() * 200
        found = take(cache, object_of(key, content))
        assert found in (None, content)
        if found is None:
            deliver(cache, key, content)
        if chance.random() < 0.1:
            sweep_workspaces(cache.folder.parent, lambda ids: dict.fromkeys(ids, Status.COMPLETED), cache)
        if chance.random() < 0.05:
            next(cache.make_room(), None)


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[list[multiprocessing.Process]]:
    found: list[multiprocessing.Process] = []
    yield found
    for process in found:
        process.kill()
        process.join()


def test_several_workers_at_once_and_kills_at_any_moment_leave_whole_entries_only(
    tmp_path: Path, workers: list[multiprocessing.Process]
) -> None:
    workers += [multiprocessing.Process(target=work, args=(str(tmp_path), seed, 3.0)) for seed in range(2)]
    for worker in workers:
        worker.start()
    for seed in range(10, 24):
        doomed = multiprocessing.Process(target=work, args=(str(tmp_path), seed, 60.0))
        doomed.start()
        time.sleep(random.Random(seed).uniform(0.03, 0.15))
        doomed.kill()
        doomed.join()
        assert doomed.exitcode == -signal.SIGKILL
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    cache = make_cache(tmp_path, limit_bytes=2000)
    sweep_workspaces(tmp_path, lambda ids: dict.fromkeys(ids, Status.COMPLETED), cache)
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]
    for path in entries(cache):
        entry = Entry.parse(path.name)
        assert entry is not None
        assert entry.is_untouched(path.stat())
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256
    assert sum(path.stat().st_size for path in entries(cache)) <= 2000
