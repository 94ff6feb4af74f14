"""Two workers that both believe the job is theirs: one publishes, its package is the one that is seen, it is recorded once."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fault_table import fault
from ncr_upload.adapters.sftp_dropoff import SftpDropoff
from ncr_upload.application.ports import LocalFile
from ncr_upload.domain.errors import DeliveryError
from ncr_upload.domain.jobs import Status
from ncr_upload.entrypoints.embedded.product import Product
from outcomes import recorded
from packages_on_disk import arriving, write_package
from servers import SftpServer
from workplace import Workplace

ROUNDS = 50
WORKER_ROUNDS = 6


@dataclass
class Racer:
    """One of two workers, in a thread of its own with a connection of its own. `won` is, by round, whether it published."""

    server: SftpServer
    folder: Path
    name: str
    fence: int
    start: threading.Barrier
    staged: threading.Barrier
    end: threading.Barrier
    won: list[bool] = field(default_factory=list)

    def contents(self, turn: int) -> dict[str, bytes]:
        return {f"S/{turn}-{self.name}-{number}.bin": f"{turn} {self.name}".encode() * 50 for number in range(3)}

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        dropoff = SftpDropoff(self.server.login, self.server.base_dir, channels=1, timeout_seconds=60)
        async with dropoff.session() as session:
            for turn in range(ROUNDS):
                files = write_package(self.folder / f"{self.name}-{turn}", self.contents(turn))
                self.start.wait(60)
                if self.fence == 1:
                    await session.adopt(f"task-{turn}", 1)
                    await session.stage(f"task-{turn}", 1, arriving(files), lambda _: None)
                self.staged.wait(60)
                await asyncio.sleep(random.uniform(0, 0.02))
                self.won.append(await (self._publish if self.fence == 1 else self._take_over)(session, turn, files))
                self.end.wait(60)

    async def _publish(self, session: object, turn: int, _: list[LocalFile]) -> bool:
        try:
            await session.publish(f"task-{turn}", 1, "job-1", lambda: None)  # type: ignore[attr-defined]
        except DeliveryError:
            return False
        return True

    async def _take_over(self, session: object, turn: int, files: list[LocalFile]) -> bool:
        """As the next attempt does: look first whether the other has published."""
        task = f"task-{turn}"
        await session.adopt(task, 2)  # type: ignore[attr-defined]
        if await session.is_published(task, 2):  # type: ignore[attr-defined]
            return False
        await session.stage(task, 2, arriving(files), lambda _: None)  # type: ignore[attr-defined]
        await session.publish(task, 2, "job-1", lambda: None)  # type: ignore[attr-defined]
        return True


@fault(
    "SFTP: two workers publish at once",
    injector=f"{ROUNDS} races of two connections to sshd",
    invariants="OP",
    outcome="one winner, whose package is seen whole; never a mixture",
)
@pytest.mark.timeout(300)
def test_of_two_workers_that_publish_at_once_one_wins_and_nothing_is_mixed(openssh: SftpServer, tmp_path: Path) -> None:
    """Each round replaces the delivery of the round before."""
    barriers = [threading.Barrier(3) for _ in range(3)]
    stale, newer = (Racer(openssh, tmp_path, name, fence, *barriers) for name, fence in (("stale", 1), ("newer", 2)))
    start, staged, end = barriers
    threads = [threading.Thread(target=racer.run) for racer in (stale, newer)]
    final = openssh.folder / "job-1" / "S"
    allowed: set[frozenset[str]] = {frozenset()}
    mixed: list[frozenset[str]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            with suppress(FileNotFoundError):
                seen = frozenset(path.name for path in final.iterdir())
                if seen not in allowed:
                    mixed.append(seen)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    for thread in (*threads, watcher):
        thread.start()
    try:
        for turn in range(ROUNDS):
            allowed |= {frozenset(Path(target).name for target in racer.contents(turn)) for racer in (stale, newer)}
            start.wait(60)
            staged.wait(60)
            end.wait(60)
            shown = {f"S/{path.name}": path.read_bytes() for path in final.iterdir()}
            assert shown in (stale.contents(turn), newer.contents(turn))
            by_stale = shown == stale.contents(turn)
            assert (stale.won[turn], newer.won[turn]) == (by_stale, not by_stale)
    except BaseException:
        for barrier in barriers:
            barrier.abort()
        raise
    finally:
        done.set()
        for thread in (*threads, watcher):
            thread.join(60)
    assert mixed == []
    assert True in stale.won, "the stale one never won: it was no race"
    assert True in newer.won, "the newer one never won: it was no race"


@fault(
    "Worker: two publish one job at once",
    injector=f"{WORKER_ROUNDS} races of a worker that stood still with the one that took over",
    invariants="LOPRH",
    outcome="published once, recorded once, by whichever comes first",
)
@pytest.mark.timeout(300)
def test_a_worker_that_wakes_up_while_its_successor_works_neither_publishes_nor_records_twice(
    workplace: Workplace, job_id: str, small: Product
) -> None:
    for turn in range(WORKER_ROUNDS):
        workplace.place(f"{job_id}-{turn}", small)
        (task,) = workplace.submit(f"{job_id}-{turn}")
        asleep, awake = threading.Event(), threading.Event()

        def stand_still(reached: str, asleep: threading.Event = asleep, awake: threading.Event = awake) -> None:
            if reached == "publish:before":
                asleep.set()
                awake.wait(60)
                time.sleep(random.uniform(0, 0.1))

        first = threading.Thread(target=workplace.attempt, args=(task, stand_still))
        first.start()
        assert asleep.wait(60)
        workplace.let_time_pass()
        awake.set()
        workplace.attempt(task)
        first.join(60)
        ended = workplace.attempt(task)
        assert (ended.status, ended.attempt) == (Status.COMPLETED, 2)
        assert workplace.delivered(task.job_id) == small.delivered
        workplace.sweep(ended)
        assert workplace.leftovers() == []
        rows = recorded(workplace)
        assert (rows["email"], rows["history_log"]) == (turn + 1, turn + 1)
