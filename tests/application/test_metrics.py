"""What is counted of an attempt, and how histograms add up."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ledgers import Ledger, memory_ledger
from ncr_upload.application.metrics import (
    JOB_SECONDS,
    JOBS_ENDED,
    RETRIES,
    STAGE_SECONDS,
    CountedClaims,
    CountedStore,
    Counts,
    Family,
    MemoryMetrics,
    MetricsRecorder,
    histogram_of,
)
from ncr_upload.application.ports import Fetched, ObjectInfo, OnBytes
from ncr_upload.domain.errors import LeaseLost, Unavailable
from ncr_upload.domain.jobs import Claim, Problem, Stage, Status
from ncr_upload.domain.packages import PackageSize

PROBLEM = Problem("s3_unreachable", "transient", "no answer", "Wait.")
SIZES = Family("sizes", "", "kind", ("a",), (1, 10))


class Counted:
    """A ledger whose claims are counted, with a clock of its own."""

    def __init__(self) -> None:
        self.ledger: Ledger = memory_ledger()
        self.store = MemoryMetrics()
        self.recorder = MetricsRecorder(self.store, flush_seconds=3600)
        self.time = 0.0
        self.claims = CountedClaims(self.ledger.claims, self.recorder, lambda: self.time)

    def claim(self, job_id: str = "job-1") -> Claim:
        (task,) = self.ledger.accept(job_id)
        claim = self.claims.claim(task.task_id, "w1", 20)
        assert claim is not None
        return claim

    def counts(self) -> Counts:
        self.recorder.flush()
        return self.store.read()


@pytest.fixture
def counted() -> Counted:
    return Counted()


def finish(counted: Counted, claim: Claim, status: Status = Status.FAILED) -> None:
    counted.claims.finish(claim, status=status, stage=Stage.DONE, message="", problem=None)


def test_each_stage_is_timed_until_the_next_one(counted: Counted) -> None:
    claim = counted.claim()
    for seconds, status, stage, facts in (
        (2, Status.PROCESSING, Stage.LOOKUP, {}),
        (1, Status.PROCESSING, Stage.DOWNLOAD, {"size": PackageSize(1, 700)}),
        (7, Status.VALIDATION_PASSED, Stage.VALIDATE, {}),
        (20, Status.UPLOADING, Stage.UPLOAD, {}),
        (40, Status.UPLOADING, Stage.PUBLISH, {}),
    ):
        counted.time += seconds
        counted.claims.advance(claim, status=status, stage=stage, message="", **facts)
    counted.time += 0.02
    finish(counted, claim, Status.COMPLETED)
    counts = counted.counts()
    sums = {stage: histogram_of(STAGE_SECONDS, stage, counts)[1] for stage in STAGE_SECONDS.values}
    assert sums == pytest.approx({"lookup": 3, "download": 7, "validate": 20, "upload": 40, "publish": 0.02})
    assert (counts[JOBS_ENDED.key("completed")], counts["ncr_delivered_bytes|"]) == (1, 700)
    assert histogram_of(JOB_SECONDS, "completed", counts)[0][-1] == ("+Inf", 1)


def test_an_end_whose_answer_is_asked_for_again_is_counted_once(counted: Counted) -> None:
    claim = counted.claim()
    for _ in range(2):
        finish(counted, claim)
    counts = counted.counts()
    assert counts[JOBS_ENDED.key("failed")] == 1
    assert histogram_of(JOB_SECONDS, "failed", counts)[0][-1] == ("+Inf", 1)


def test_a_retry_is_counted_by_its_class_and_is_no_end(counted: Counted) -> None:
    claim = counted.claim()
    counted.claims.put_back(claim, problem=PROBLEM, message="", delay_seconds=9, spend_attempt=True)
    counts = counted.counts()
    assert counts[RETRIES.key("transient")] == 1
    assert not any(key.startswith(JOBS_ENDED.name) for key in counts)


def test_what_a_stale_worker_could_not_write_is_not_counted(counted: Counted) -> None:
    claim = counted.claim()
    counted.ledger.expire(claim.task)
    counted.ledger.claim(claim.task, "w2")
    with pytest.raises(LeaseLost):
        finish(counted, claim)
    with pytest.raises(LeaseLost):
        counted.claims.put_back(claim, problem=PROBLEM, message="", delay_seconds=9, spend_attempt=True)
    assert counted.counts() == {}


@pytest.mark.parametrize(("amount", "bound"), [(0, "1"), (1, "1"), (1.1, "10"), (10, "10"), (11, "+Inf"), (-1, "1")])
def test_a_measurement_is_in_the_first_bucket_that_holds_it(amount: float, bound: str) -> None:
    store = MemoryMetrics()
    recorder = MetricsRecorder(store, flush_seconds=3600)
    recorder.observe(SIZES, "a", amount)
    recorder.flush()
    assert store.read() == {f"sizes|a|{bound}": 1, "sizes|a|sum": max(0, amount)}


def test_buckets_of_another_release_keep_their_counts() -> None:
    counts = {"sizes|a|1": 2.0, "sizes|a|5": 1.0, "sizes|a|+Inf": 1.0, "sizes|a|sum": 30.0, "sizes|b|1": 9.0}
    assert histogram_of(SIZES, "a", counts) == ([("1", 2), ("5", 3), ("10", 3), ("+Inf", 4)], 30)


class Storage:
    """Delivers some bytes and breaks off, if it is told to."""

    source = "s3://here"

    def __init__(self, *, breaks_off: bool = False) -> None:
        self._breaks_off = breaks_off

    async def stat(self, key: str) -> ObjectInfo:
        return ObjectInfo(key, 30, "e")

    async def glance(self, keys: Sequence[str]) -> Mapping[str, ObjectInfo]:
        return {}

    async def fetch(self, key: str, to: Path, on_bytes: OnBytes, **_: Any) -> Fetched:
        on_bytes(10)
        on_bytes(20)
        if self._breaks_off:
            raise Unavailable("s3_unreachable", "no answer", "Wait.")
        return Fetched(30, "aa", 1, "e")


@pytest.mark.parametrize("breaks_off", [False, True])
def test_bytes_that_were_received_are_counted_also_of_a_download_that_broke_off(counted: Counted, breaks_off: bool) -> None:
    told: list[int] = []
    store = CountedStore(Storage(breaks_off=breaks_off), counted.recorder)
    try:
        asyncio.run(store.fetch("k", Path("nowhere"), told.append))
    except Unavailable:
        assert breaks_off
    assert told == [10, 20]
    assert counted.counts() == {"ncr_downloaded_bytes|": 30}
