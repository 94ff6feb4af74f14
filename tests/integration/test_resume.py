"""A retry moves again only what had not arrived: counted in bytes on the wire, on real servers."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import text

from disks import open_files
from fault_proxy import FaultProxy, fault_proxy
from fault_table import fault
from ncr_upload.adapters.sftp_dropoff.upload import WINDOW_BYTES
from ncr_upload.application import download_cache
from ncr_upload.application.arrivals import SMALL_BYTES
from ncr_upload.application.workspace import JOURNAL
from ncr_upload.domain.jobs import Status, Task
from ncr_upload.entrypoints.embedded import textures
from ncr_upload.entrypoints.embedded.product import Product, make_product
from patience import until
from workplace import Workplace

LARGE_FILES = 6
SIDE = 512
HEADERS_BYTES = 2000
"""More than a request and an answer have around an object's bytes."""

SCENE_BYTES = 24 * 1024 * 1024
CUT_BYTES = 12 * 1024 * 1024
SLOW = 3_000_000
"""Bytes a second that leave time to see some files arrive before others."""


@pytest.fixture(scope="module")
def large_product() -> Product:
    """A product with some pictures that do not compress."""
    product = make_product("studio/LARGE", "LARGE")
    for number in range(LARGE_FILES):
        noise = Image.merge("RGB", [Image.effect_noise((SIDE, SIDE), 80 + number) for _ in range(3)])
        name = f"noise-{number}.png"
        product.files[f"studio/LARGE/angles/{name}"] = textures.encode(noise, "PNG")
        product.targets[f"studio/LARGE/angles/{name}"] = f"LARGE/angles/{name}"
    return product


@pytest.fixture(scope="module")
def huge_product(large_product: Product) -> Product:
    """A product with a source that takes several windows to send."""
    scene = next(key for key in large_product.targets if key.endswith(".blend"))
    return replace(large_product, files=large_product.files | {scene: large_product.files[scene] + os.urandom(SCENE_BYTES)})


def finished(workplace: Workplace) -> list[Path]:
    """The downloads that wait for the next attempt."""
    journals = list(workplace.settings.work_dir.glob(f"[!.]*/{JOURNAL}"))
    lines = [(journal.parent, line) for journal in journals for line in journal.read_text().splitlines() if line]
    return sorted(folder / hashlib.sha256(json.loads(line)[0].encode()).hexdigest() for folder, line in lines)


def arrived_pictures(workplace: Workplace) -> int:
    """How many of the noisy ones: the small files come before them."""
    with suppress(FileNotFoundError, ValueError):
        return sum(place.stat().st_size > SMALL_BYTES for place in finished(workplace))
    return 0


@contextmanager
def when_some_have_arrived(workplace: Workplace, act: Callable[[], Any], count: int = 2) -> Iterator[None]:
    over = threading.Event()

    def watch() -> None:
        while arrived_pictures(workplace) < count and not over.is_set():
            over.wait(0.005)
        if not over.is_set():
            act()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def fail_half_way(workplace: Workplace, storage: FaultProxy, task: Task) -> set[Path]:
    """An attempt whose storage goes away after some downloads; what it leaves, by place."""
    storage.throttle(all_bytes_per_second=SLOW)
    with when_some_have_arrived(workplace, storage.refuse):
        waiting = workplace.attempt(task)
    assert waiting.problem is not None
    assert waiting.problem.code == "storage_unavailable", waiting.message
    storage.heal()
    until(lambda: not open_files(workplace.settings.work_dir), 60)  # a body that nobody waits for any more is read on a little
    make_due(workplace)
    return set(finished(workplace))


def make_due(workplace: Workplace) -> None:
    with workplace.engine.begin() as connection:
        connection.execute(text("UPDATE ncr_jobs SET claimable_at = 1 WHERE claimable_at IS NOT NULL"))


def attempt_again(workplace: Workplace, storage: FaultProxy, task: Task) -> int:
    """Another attempt, which delivers; the bytes that came from the storage."""
    before = storage.count()["down"]
    ended = workplace.attempt(task)
    assert ended.status is Status.COMPLETED, ended
    assert workplace.leftovers() == []
    return storage.count()["down"] - before


def assert_only(moved: int, wanted: int, product: Product) -> None:
    assert wanted <= moved <= wanted + 2 * HEADERS_BYTES * len(product.files), (moved, wanted)


def selected(product: Product) -> dict[str, bytes]:
    return {key: product.files[key] for key in product.targets}


def submit(workplace: Workplace, job_id: str, product: Product) -> Task:
    workplace.place(job_id, product)
    (task,) = workplace.submit(job_id)
    return task


@fault(
    "S3: goes away half-way through a job",
    injector="fault proxy refuses after some downloads",
    invariants="LOPRH",
    outcome="the next attempt on this host fetches only what is missing",
)
def test_the_next_attempt_fetches_only_what_had_not_arrived(
    workplace: Workplace, storage: FaultProxy, large_product: Product
) -> None:
    task = submit(workplace, "half", large_product)
    places = fail_half_way(workplace, storage, task)
    files = selected(large_product)
    missing = sum(map(len, files.values())) - sum(place.stat().st_size for place in places)
    assert 0 < missing < sum(map(len, files.values()))
    moved = attempt_again(workplace, storage, task)
    assert_only(moved, missing, large_product)
    assert workplace.delivered("half") == large_product.delivered
    assert f"kept {len(places)} of {len(files)} files from the attempt before" in "\n".join(workplace.history(task))


@fault(
    "Worker: killed in the middle of its downloads",
    injector="SIGKILL",
    invariants="LOPR",
    outcome="the next attempt on this host fetches only what is missing",
)
def test_what_a_killed_worker_had_downloaded_is_not_fetched_again(
    workplace: Workplace, storage: FaultProxy, large_product: Product, tmp_path: Path
) -> None:
    task = submit(workplace, "killed", large_product)
    storage.throttle(all_bytes_per_second=SLOW)
    doomed = workplace.start_attempt(task, tmp_path)
    with when_some_have_arrived(workplace, doomed.kill):
        assert doomed.wait(60) == -9
    storage.heal()
    make_due(workplace)
    files = selected(large_product)
    places = set(finished(workplace))
    missing = sum(map(len, files.values())) - sum(place.stat().st_size for place in places)
    assert_only(attempt_again(workplace, storage, task), missing, large_product)
    assert workplace.delivered("killed") == large_product.delivered


@fault(
    "S3: object replaced between two attempts",
    injector="PUT of other bytes",
    invariants="OP",
    outcome="that one is fetched again, the others are kept",
)
def test_an_object_replaced_between_two_attempts_is_fetched_again(
    workplace: Workplace, storage: FaultProxy, large_product: Product
) -> None:
    task = submit(workplace, "replaced", large_product)
    places = fail_half_way(workplace, storage, task)
    files = selected(large_product)
    content = {place.read_bytes() for place in places}
    key = next(key for key in files if files[key] in content and "noise" in key)
    other = next(bytes_ for other, bytes_ in files.items() if "noise" in other and bytes_ != files[key])
    workplace.put_objects({key: other})
    missing = sum(len(data) for data in files.values() if data not in content) + len(other)
    assert_only(attempt_again(workplace, storage, task), missing, large_product)
    assert workplace.delivered("replaced") == large_product.delivered | {large_product.targets[key]: other}


@fault(
    "Worker: a kept download is damaged on its disk",
    injector="bytes flipped in WORK_DIR",
    invariants="OP",
    outcome="that one is fetched again, the others are kept",
)
def test_a_kept_file_whose_bytes_changed_is_fetched_again(
    workplace: Workplace, storage: FaultProxy, large_product: Product
) -> None:
    task = submit(workplace, "flipped", large_product)
    places = fail_half_way(workplace, storage, task)
    files = selected(large_product)
    damaged = max(places, key=lambda place: place.stat().st_size)
    whole = sum(place.stat().st_size for place in places if place != damaged)
    damaged.write_bytes(damaged.read_bytes()[::-1])
    missing = sum(map(len, files.values())) - whole
    assert_only(attempt_again(workplace, storage, task), missing, large_product)
    assert workplace.delivered("flipped") == large_product.delivered
    assert f"kept {len(places) - 1} of {len(files)} files" in "\n".join(workplace.history(task))


@fault(
    "SFTP: cut in the middle of a job's upload",
    injector="fault proxy",
    invariants="OPRH",
    outcome="a worker on another host sends only the rest",
)
def test_an_upload_that_was_cut_off_goes_on_from_another_host(
    workplace: Workplace, huge_product: Product, tmp_path: Path
) -> None:
    with fault_proxy((workplace.sftp.login.host or "", workplace.sftp.login.port)) as destination:
        workplace.change(sftp_port=destination.port)
        task = submit(workplace, "cut", huge_product)
        destination.cut_after(CUT_BYTES)
        waiting = workplace.attempt(task)
        assert waiting.problem is not None
        assert waiting.problem.code == "sftp_unreachable", waiting.message
        destination.heal()
        make_due(workplace)
        here = workplace.settings.work_dir
        workplace.change(work_dir=tmp_path / "another-host")
        before = destination.count()["up"]
        ended = workplace.attempt(task)
        sent = destination.count()["up"] - before
    assert ended.status is Status.COMPLETED, ended
    total = sum(map(len, huge_product.delivered.values()))
    assert sent < total - CUT_BYTES + 4 * WINDOW_BYTES < total
    assert workplace.delivered("cut") == huge_product.delivered
    assert "bytes were there from the attempt before" in "\n".join(workplace.history(task))
    assert workplace.leftovers() == []
    assert len(list(here.iterdir())) == 1, "that host does not know yet"
    assert len(workplace.sweep_work_dir(here)) == 1
    assert [path.name for path in here.iterdir()] == [download_cache.FOLDER]
