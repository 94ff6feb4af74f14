"""The live view of one attempt: posted to the status board from another thread, a few times a second at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

from ncr_upload.application.ports import StatusBoard
from ncr_upload.application.ticker import Ticker
from ncr_upload.application.views import view_of
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import Claim, Stage, Status, Task, progress_percent

POSTS_APART_SECONDS = 0.2
FIRST_POST_SECONDS = 0.05
"""An attempt that ends before then is only shown as ended."""
REFRESH_SECONDS = 3.0


class LiveStatus:
    """What callers see of a running attempt. Never slows the attempt down, never fails it."""

    def __init__(self, board: StatusBoard, claim: Claim) -> None:
        self._board = board
        self._fence = claim.fence
        self._task = claim.task
        self._done_bytes = 0
        self._total_bytes = 0
        self._changed = True
        self._posted_at = time.monotonic()
        self._ticker = Ticker("live", self._tick, FIRST_POST_SECONDS)

    def __enter__(self) -> LiveStatus:
        self._ticker.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._ticker.end(REFRESH_SECONDS)

    @property
    def stage(self) -> Stage:
        """Where the attempt is."""
        return self._task.stage

    def show(self, status: Status, stage: Stage, message: str, *, total_bytes: int = 0) -> None:
        """A new stage, of which `total_bytes` are to move."""
        self._done_bytes, self._total_bytes = 0, total_bytes
        self._task = replace(self._task, status=status, stage=stage, message=message)
        self._changed = True

    def add_bytes(self, count: int) -> None:
        """So many more bytes of this stage have moved."""
        self._done_bytes += count
        self._changed = True

    def know(self, **facts: str | int) -> None:
        """Facts learned on the way: `sku`, `verdict`, `files`, `bytes`."""
        self._task = replace(self._task, **facts)  # type: ignore[arg-type]

    def _tick(self) -> float:
        now = time.monotonic()
        if self._changed or now - self._posted_at >= REFRESH_SECONDS:
            self._changed, self._posted_at = False, now
            post_quietly(self._board, self._snapshot(), fence=self._fence, live=True)
        return POSTS_APART_SECONDS

    def _snapshot(self) -> Task:
        progress = progress_percent(self._task.stage, self._done_bytes, self._total_bytes)
        return replace(self._task, progress=progress, updated_at=time.time())


def post_quietly(board: StatusBoard, task: Task, *, fence: int, live: bool) -> None:
    """Post the task's view; without Redis the ledger answers instead."""
    quietly(lambda: board.post([view_of(task)], live=live, fence=fence))


def quietly(call: Callable[[], None]) -> None:
    """Do without what is only a convenience when its part is away."""
    try:
        call()
    except Unavailable:
        return
