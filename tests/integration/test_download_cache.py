"""A re-delivery fetches what changed and nothing else, whatever becomes of the cache: in bytes on the wire, on real servers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from disks import small_disk
from fault_proxy import FaultProxy
from fault_table import fault
from ncr_upload.application.download_cache import FOLDER, Entry
from ncr_upload.domain.admission import SPARE_DISK_BYTES
from ncr_upload.domain.jobs import Status, Task
from ncr_upload.entrypoints.embedded.product import Product
from outcomes import assert_told
from workplace import Workplace

HEADERS_BYTES = 2000
"""More than a request and an answer have around an object's bytes."""


def total(product: Product) -> int:
    return sum(len(product.files[key]) for key in product.targets)


def deliver(workplace: Workplace, storage: FaultProxy, job_id: str, product: Product) -> tuple[Task, int]:
    """Deliver what the artist has uploaded; the task as it ended, and the bytes that came from the storage."""
    workplace.place(job_id, product)
    before = storage.count()["down"]
    task = workplace.deliver(job_id)
    assert task.status is Status.COMPLETED, task.message
    assert workplace.delivered(job_id) == product.delivered
    assert workplace.leftovers() == []
    return task, storage.count()["down"] - before


def assert_fetched(moved: int, wanted: int, product: Product) -> None:
    assert wanted <= moved <= wanted + 2 * HEADERS_BYTES * len(product.files), (moved, wanted)


def change(product: Product, key: str, content: bytes) -> Product:
    return replace(product, files=product.files | {key: content})


def elsewhere(product: Product) -> Product:
    """The same files as other objects."""
    files = {f"other/{key}": content for key, content in product.files.items()}
    return replace(product, files=files, targets={f"other/{key}": target for key, target in product.targets.items()})


def blend_of(product: Product) -> str:
    return next(key for key in product.targets if key.endswith(".blend"))


def entry_of(workplace: Workplace, content: bytes) -> Path:
    return next(path for path in cached(workplace) if path.read_bytes() == content)


def cached(workplace: Workplace) -> list[Path]:
    return sorted((workplace.settings.work_dir / FOLDER).iterdir())


def test_what_is_delivered_again_is_not_fetched_again(
    workplace: Workplace, storage: FaultProxy, job_id: str, product: Product
) -> None:
    _, first = deliver(workplace, storage, job_id, product)
    assert_fetched(first, total(product), product)
    task, again = deliver(workplace, storage, job_id, product)
    assert_fetched(again, 0, product)
    count = len(product.targets)
    assert_told(workplace, task, f"took {count} of {count} files from this host's cache of downloads", "downloaded 0")


def test_another_job_takes_the_same_objects_from_the_cache(
    workplace: Workplace, storage: FaultProxy, job_id: str, product: Product
) -> None:
    deliver(workplace, storage, job_id, product)
    _, other = deliver(workplace, storage, f"{job_id}-other", product)
    assert_fetched(other, 0, product)


@fault(
    "S3: object replaced between two deliveries",
    injector="PUT of other bytes",
    invariants="OP",
    outcome="that one is fetched, the others come from the cache",
)
def test_an_object_that_was_uploaded_anew_is_fetched(
    workplace: Workplace, storage: FaultProxy, job_id: str, product: Product
) -> None:
    """Of the same size: the ETag alone tells."""
    deliver(workplace, storage, job_id, product)
    key = blend_of(product)
    changed = change(product, key, product.files[key][::-1])
    _, moved = deliver(workplace, storage, job_id, changed)
    assert_fetched(moved, len(changed.files[key]), product)
    _, moved = deliver(workplace, storage, job_id, product)
    assert_fetched(moved, 0, product)


def test_without_a_cache_everything_is_fetched_again(
    workplace: Workplace, storage: FaultProxy, job_id: str, product: Product
) -> None:
    workplace.change(download_cache_bytes=0)
    for _ in range(2):
        _, moved = deliver(workplace, storage, job_id, product)
        assert_fetched(moved, total(product), product)


def rot(path: Path) -> None:
    """Other bytes, and nothing that shows it."""
    before = path.stat()
    path.chmod(0o600)
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.write(bytes([content[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
    )


@pytest.mark.parametrize(("ahead", "spent"), [(False, 2), (True, 1)], ids=["strict", "staged ahead"])
@fault(
    "Worker: a cached download rots on its disk",
    injector="a bit flipped, size and times as before",
    invariants="LOPR",
    outcome="found before anything of it is delivered; that one is fetched again",
)
def test_a_cached_file_that_rots_is_found_and_fetched_again(
    workplace: Workplace, storage: FaultProxy, job_id: str, product: Product, ahead: bool, spent: int
) -> None:
    """By the CRC in the zip, before anything is sent to the partner; by its hash, where it is sent before."""
    workplace.change(stage_before_verdict=ahead)
    deliver(workplace, storage, job_id, product)
    key = blend_of(product)
    rotten = entry_of(workplace, product.files[key])
    rot(rotten)
    task, moved = deliver(workplace, storage, job_id, product)
    assert task.attempt == spent
    assert_fetched(moved, len(product.files[key]), product)
    assert not rotten.exists()
    task, moved = deliver(workplace, storage, job_id, product)
    assert task.attempt == 1
    assert_fetched(moved, 0, product)


@pytest.mark.parametrize("touch", [lambda path: path.write_bytes(b"other"), lambda path: os.truncate(path, 1), Path.unlink])
@fault(
    "Worker: a cached download is written into, cut off or removed",
    injector="by hand in WORK_DIR",
    invariants="LOPR",
    outcome="not used: that one is fetched again",
)
def test_a_cached_file_that_was_touched_is_fetched_again(
    workplace: Workplace, storage: FaultProxy, job_id: str, product: Product, touch: Callable[[Path], object]
) -> None:
    deliver(workplace, storage, job_id, product)
    key = blend_of(product)
    path = entry_of(workplace, product.files[key])
    path.chmod(0o600)
    touch(path)
    task, moved = deliver(workplace, storage, job_id, product)
    assert task.attempt == 1
    assert_fetched(moved, len(product.files[key]), product)


@pytest.mark.parametrize("at", ["download:before", "validate:before", "stage:before", "publish:after", "record:after"])
@fault(
    "Worker: killed while it uses its cache of downloads",
    injector="SIGKILL at a crash point",
    invariants="LOPR",
    outcome="whoever comes next takes the same files from the cache",
)
def test_a_worker_killed_while_it_uses_the_cache_leaves_it_whole(
    workplace: Workplace, storage: FaultProxy, job_id: str, product: Product, tmp_path: Path, at: str
) -> None:
    deliver(workplace, storage, job_id, product)
    workplace.place(job_id, product)
    (task,) = workplace.submit(job_id)
    before = storage.count()["down"]
    assert workplace.start_attempt(task, tmp_path, crash_at=at).wait(60) == -9
    workplace.let_time_pass()
    workplace.attempt(task)
    workplace.sweep(task)
    assert_fetched(storage.count()["down"] - before, 0, product)
    assert workplace.delivered(job_id) == product.delivered
    assert workplace.leftovers() == []
    for path in cached(workplace):
        entry = Entry.parse(path.name)
        assert entry is not None
        assert entry.is_untouched(path.stat())
        assert path.stat().st_nlink == 1


def test_workers_that_share_a_folder_deliver_from_one_cache_at_once(
    workplace: Workplace, storage: FaultProxy, job_id: str, product: Product
) -> None:
    deliver(workplace, storage, job_id, product)
    names = [f"{job_id}-{number}" for number in range(4)]
    for name in names:
        workplace.place(name, product)
    before = storage.count()["down"]
    with ThreadPoolExecutor(len(names)) as workers:
        ended = list(workers.map(workplace.deliver, names))
    assert [task.status for task in ended] == [Status.COMPLETED] * len(names)
    assert [workplace.delivered(name) for name in names] == [product.delivered] * len(names)
    assert storage.count()["down"] - before <= 2 * HEADERS_BYTES * len(product.files) * len(names)


# --- room ---------------------------------------------------------------------------------------------------------


def test_a_cache_that_is_too_large_makes_room_for_the_newest(
    workplace: Workplace, storage: FaultProxy, job_id: str, product: Product, small: Product
) -> None:
    workplace.change(download_cache_bytes=total(product) + 1000)
    other = elsewhere(small)
    deliver(workplace, storage, job_id, product)
    deliver(workplace, storage, f"{job_id}-other", other)
    assert sum(path.stat().st_size for path in cached(workplace)) <= total(product) + 1000
    _, moved = deliver(workplace, storage, f"{job_id}-other", other)
    assert_fetched(moved, 0, other)


@fault(
    "Worker: disk full of cached downloads",
    injector="small tmpfs as WORK_DIR",
    invariants="LOPR",
    outcome="the cache makes room; no job waits for it",
)
def test_a_job_never_waits_for_room_that_the_cache_takes(
    workplace: Workplace, storage: FaultProxy, job_id: str, product: Product, small: Product, tmp_path: Path
) -> None:
    """Another program fills the disk up, so that the next job only fits without the cache."""
    disk = tmp_path / "small"
    disk.mkdir()
    workplace.change(work_dir=disk / "work")
    other = elsewhere(product)
    with small_disk(disk, f"{SPARE_DISK_BYTES + 3 * total(product)}"):
        deliver(workplace, storage, job_id, product)
        kept = sum(path.stat().st_size for path in cached(workplace))
        assert kept >= total(product)
        room = shutil.disk_usage(disk).free - SPARE_DISK_BYTES - total(product) + kept // 2
        (disk / "filler").write_bytes(bytes(room))
        task, moved = deliver(workplace, storage, f"{job_id}-other", other)
        assert task.attempt == 1
        assert not any("waiting for disk" in line for line in workplace.history(task))
        assert_fetched(moved, total(product), product)
        (disk / "filler").unlink()
