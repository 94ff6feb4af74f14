"""What a worker says of its host, and when the memory is worth a line in the log."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ledger_twin import MemoryHost, MemoryStatistics, MemoryWorkerReports
from ncr_upload.application.download_cache import FOLDER, DownloadCache, describe
from ncr_upload.application.monitoring import BatchWatch, MemoryWatch, observe, read_rooms
from ncr_upload.application.ports import Fetched, Memory, WorkerReport
from ncr_upload.domain.admission import AdmissionLimits
from ncr_upload.domain.batches import WorkerRoom


def look(host: MemoryHost, work_dir: Path, spare_disk_bytes: int = 0) -> WorkerReport:
    return observe(
        host,
        "w1",
        configured=4,
        child_bytes=10,
        work_dir=work_dir,
        limits=AdmissionLimits(80, spare_disk_bytes),
        cache=DownloadCache(work_dir, 10**9, host),
    )


@pytest.mark.parametrize(("used", "capacity"), [(20, 4), (62, 2), (79, 1), (81, 0)])
def test_a_worker_has_room_for_the_children_that_fit_below_the_limit(used: int, capacity: int, tmp_path: Path) -> None:
    report = look(MemoryHost(used=used), tmp_path)
    assert report.room == WorkerRoom(capacity, 4)
    assert (report.worker, report.memory.used) == ("w1", used)


def test_what_the_cache_would_make_room_for_counts_as_free(tmp_path: Path) -> None:
    host = MemoryHost()
    host.free_disk = lambda _: 10  # type: ignore[method-assign]
    assert look(host, tmp_path, spare_disk_bytes=100).room.capacity == 0
    file = tmp_path / "file"
    file.write_bytes(bytes(90))
    entry = describe("bucket", "key", Fetched(90, "a" * 64, 1, "etag"), file)
    assert entry is not None
    (tmp_path / FOLDER).mkdir()
    file.rename(tmp_path / FOLDER / entry.name)
    report = look(host, tmp_path, spare_disk_bytes=100)
    assert (report.room.capacity, report.free_disk_bytes) == (4, 100)


def test_a_worker_that_stops_reporting_is_not_counted_on(tmp_path: Path) -> None:
    now = [1000.0]
    reports = MemoryWorkerReports(clock=lambda: now[0])
    reports.report(look(MemoryHost(), tmp_path))
    assert read_rooms(reports, 30) == [WorkerRoom(4, 4)]
    now[0] += 91
    assert read_rooms(reports, 30) == []


def test_memory_over_the_limit_is_told_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    watch, host = MemoryWatch(80), MemoryHost()
    with caplog.at_level(logging.INFO):
        for used in (20, 81, 95, 81, 79, 20, 90):
            host.figures = Memory(used, 100, "cgroup2")
            watch.look(host)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "WARNING"]
    assert "81.0 % of the cgroup2 memory" in caplog.records[0].getMessage()


def test_a_stalled_batch_is_told_of_once_until_it_has_gone_on() -> None:
    watch, statistics, told = BatchWatch(300), MemoryStatistics(), []
    for stalled in (["a"], ["a", "b"], ["b"], ["b"], ["a"]):
        statistics.stalled_batches = stalled
        told.append(watch.look(statistics))
    assert told == [(["a"], []), (["b"], []), ([], ["a"]), ([], []), (["a"], ["b"])]
