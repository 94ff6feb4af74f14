"""Telling the workers about accepted tasks without making the caller wait for Redis."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence

from ncr_upload.application.crash_points import Reach, pass_by
from ncr_upload.application.ports import JobQueue, StatusBoard
from ncr_upload.application.views import view_of
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import Task

log = logging.getLogger(__name__)

WAITING_RINGS = 1000
RUNG_AT_ONCE = 100


class Doorbell:
    """Rings for accepted tasks from a thread of its own, and shows them as pending.

    A ring may be lost: the ledger has the task, and the sweeper rings again within seconds. So when one ring fails, those
    waiting behind it are dropped too instead of each waiting for a frozen Redis in turn; and when too many wait, new ones
    are dropped.
    """

    def __init__(self, job_queue: JobQueue, board: StatusBoard, reach: Reach = pass_by) -> None:
        self._job_queue = job_queue
        self._board = board
        self._reach = reach
        self._waiting: queue.Queue[Task | str | None] = queue.Queue(WAITING_RINGS)
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    @property
    def waiting(self) -> int:
        """Tasks not yet rung for."""
        return self._waiting.qsize()

    def press(self, tasks: Sequence[Task] | Sequence[str]) -> None:
        """Ring for `tasks` soon; for one given by its id only, nothing is shown. Returns at once and raises nothing."""
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._ring_waiting, name="doorbell", daemon=True)
                self._thread.start()
        waiting: list[Task | str] = [*tasks]
        for position, task in enumerate(waiting):
            try:
                self._waiting.put_nowait(task)
            except queue.Full:
                log.warning("doorbell: %d rings dropped, too many wait; the sweeper rings", len(tasks) - position)
                return

    def close(self, seconds: float) -> None:
        """Let what waits be rung, for at most `seconds`, then stop."""
        deadline = time.monotonic() + seconds
        thread = self._thread
        if thread is None or not thread.is_alive():
            return
        try:
            self._waiting.put(None, timeout=seconds)
        except queue.Full:
            return
        thread.join(max(0.0, deadline - time.monotonic()))

    def _ring_waiting(self) -> None:
        while tasks := self._take_waiting():
            self._reach("ring:before")
            try:
                self._job_queue.ring([task if isinstance(task, str) else task.task_id for task in tasks])
                if shown := [view_of(task) for task in tasks if isinstance(task, Task)]:
                    self._board.post(shown, live=True)
            except Unavailable as error:
                log.warning("doorbell: %s; %d more rings dropped; the sweeper rings", error.message, self._drop_waiting())

    def _take_waiting(self) -> list[Task | str]:
        """What waits, together; nothing once the bell is closed."""
        taken: list[Task | str] = []
        task = self._waiting.get()
        while task is not None:
            taken.append(task)
            if len(taken) == RUNG_AT_ONCE or self._waiting.empty():
                return taken
            task = self._waiting.get()
        if taken:
            self._waiting.put(None)  # these first
        return taken

    def _drop_waiting(self) -> int:
        dropped = 0
        while True:
            try:
                task = self._waiting.get_nowait()
            except queue.Empty:
                return dropped
            if task is None:
                self._waiting.put_nowait(None)
                return dropped
            dropped += 1
