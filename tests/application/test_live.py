"""The live view of an attempt: a few posts a second, the attempt's own facts, and never in the attempt's way."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import pytest

from ledger_twin import MemoryLedger, MemoryStatusBoard
from ncr_upload.application import live
from ncr_upload.application.live import LiveStatus, post_quietly, quietly
from ncr_upload.domain.errors import Rejected, Unavailable
from ncr_upload.domain.jobs import Claim, NewJob, Stage, Status, Task
from patience import until


class CountingBoard(MemoryStatusBoard):
    def __init__(self) -> None:
        super().__init__()
        self.posts: list[tuple[float, dict[str, Any], bool, int]] = []

    def post(self, views: Sequence[dict[str, Any]], *, live: bool, fence: int = 0) -> None:
        self.posts += [(time.monotonic(), view, live, fence) for view in views]
        super().post(views, live=live, fence=fence)

    def last(self) -> dict[str, Any]:
        return self.posts[-1][1]


@pytest.fixture
def board() -> CountingBoard:
    return CountingBoard()


@pytest.fixture
def claim() -> Claim:
    ledger = MemoryLedger()
    (task,) = ledger.accept([NewJob("job-1", "ann", "spring")], batch_id=None, release=1)
    assert isinstance(task, Task)
    claim = ledger.claim(task.task_id, "w1", 60)
    assert claim is not None
    return claim


def test_the_first_view_is_posted_as_live_with_the_fence_of_the_claim(board: CountingBoard, claim: Claim) -> None:
    with LiveStatus(board, claim):
        until(lambda: board.posts)
    _, view, is_live, fence = board.posts[0]
    assert (view["task_id"], view["attempt"], is_live, fence) == (claim.task.task_id, 1, True, claim.fence)


def test_an_attempt_that_ends_at_once_posts_nothing(
    board: CountingBoard, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "FIRST_POST_SECONDS", 30.0)
    with LiveStatus(board, claim) as status:
        status.show(Status.PROCESSING, Stage.DOWNLOAD, "downloading")
    assert board.posts == []


def test_progress_follows_the_bytes_of_the_stage_and_begins_anew_with_the_next(board: CountingBoard, claim: Claim) -> None:
    with LiveStatus(board, claim) as status:
        status.show(Status.PROCESSING, Stage.DOWNLOAD, "downloading", total_bytes=100)
        assert status.stage is Stage.DOWNLOAD
        status.add_bytes(30)
        status.add_bytes(20)
        until(lambda: board.posts and board.last()["progress"] == 25.0)  # half of 5 to 45
        status.add_bytes(500)
        until(lambda: board.last()["progress"] == 45.0)
        status.show(Status.UPLOADING, Stage.UPLOAD, "uploading", total_bytes=100)
        until(lambda: board.last()["stage"] == "upload")
        assert (board.last()["progress"], board.last()["status"], board.last()["message"]) == (60.0, "uploading", "uploading")


def test_facts_come_with_the_next_post(board: CountingBoard, claim: Claim) -> None:
    with LiveStatus(board, claim) as status:
        status.know(sku="SKU-1", files=3, bytes=9, verdict="Valid")
        status.show(Status.PROCESSING, Stage.VALIDATE, "validating")
        until(lambda: board.posts and board.last()["stage"] == "validate")
    assert [board.last()[name] for name in ("sku", "files", "bytes", "verdict")] == ["SKU-1", 3, 9, "Valid"]


def test_posts_of_a_busy_attempt_are_far_apart_and_its_last_state_is_among_them(board: CountingBoard, claim: Claim) -> None:
    with LiveStatus(board, claim) as status:
        status.show(Status.PROCESSING, Stage.DOWNLOAD, "downloading", total_bytes=1000)
        for _ in range(1000):
            status.add_bytes(1)
            time.sleep(0.001)
        until(lambda: board.last()["progress"] == 45.0)
    times = [at for at, *_ in board.posts]
    assert all(later - earlier >= 0.9 * live.POSTS_APART_SECONDS for earlier, later in itertools.pairwise(times))


def test_an_attempt_in_which_nothing_moves_is_shown_again_before_its_view_fades(
    board: CountingBoard, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "REFRESH_SECONDS", 0.5)
    with LiveStatus(board, claim):
        until(lambda: len(board.posts) >= 3)
    times = [at for at, *_ in board.posts]
    assert times[1] - times[0] >= 0.5
    assert [view["timestamp"] for _, view, *_ in board.posts] == sorted({view["timestamp"] for _, view, *_ in board.posts})


def test_nothing_is_posted_after_the_attempt(board: CountingBoard, claim: Claim) -> None:
    with LiveStatus(board, claim) as status:
        until(lambda: board.posts)
    status.add_bytes(1)
    count = len(board.posts)
    time.sleep(2 * live.POSTS_APART_SECONDS)
    assert len(board.posts) == count


def test_without_redis_the_attempt_goes_on_and_is_shown_again_when_it_is_back(board: CountingBoard, claim: Claim) -> None:
    board.away = True
    with LiveStatus(board, claim) as status:
        until(lambda: board.posts)
        board.away = False
        status.add_bytes(1)
        until(lambda: board.read([claim.task.task_id]) != [None])


def test_an_attempt_does_not_wait_for_a_frozen_redis(
    board: CountingBoard, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "REFRESH_SECONDS", 0.2)  # so long the end waits
    board.thawed.clear()
    with LiveStatus(board, claim) as status:
        until(lambda: board.posts)
        status.show(Status.UPLOADING, Stage.UPLOAD, "uploading")
    assert len(board.posts) == 1, "the thread that posts is still in its first call"
    board.thawed.set()


def test_a_failure_that_is_not_of_the_part_is_not_hidden(board: CountingBoard, claim: Claim) -> None:
    board.away = True
    post_quietly(board, claim.task, fence=1, live=False)

    def fail(error: Exception) -> None:
        raise error

    quietly(lambda: fail(Unavailable("redis_unavailable", "away", "Wait.")))
    for error in (ValueError("broken"), Rejected("code", "no", "Correct it.")):
        with pytest.raises(type(error)):
            quietly(lambda error=error: fail(error))  # type: ignore[misc]
