"""The record of a parked destination: who is told, who probes, and that every job that waited goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from databases import SERVERS, Databases
from ledgers import Ledger, memory_ledger, sql_ledger
from ncr_upload.domain.jobs import Claim, Problem, Status, Task
from ncr_upload.domain.parking import Parked
from studio_rows import open_database

FULL = Problem("disk_full", "parked", "the disk is full", "Make room.")
DENIED = Problem("permission_denied", "parked", "permission denied", "Grant it.")
PLACE, ELSEWHERE = "partner@sftp:22:/", "partner@elsewhere:22:/"


@pytest.fixture(params=["sqlite", *SERVERS, "memory"])
def ledger(request: pytest.FixtureRequest, databases: Databases, tmp_path: Path) -> Iterator[Ledger]:
    if request.param == "memory":
        yield memory_ledger()
        return
    engine = open_database(databases.create(request.param, tmp_path))
    yield sql_ledger(engine)
    engine.dispose()


def wait_for(ledger: Ledger, claim: Claim, destination: str = PLACE) -> None:
    ledger.claims.put_back(claim, problem=FULL, message="waits", delay_seconds=90, spend_attempt=False, waits_for=destination)


def find(ledger: Ledger, task: Task) -> Task:
    found = ledger.submissions.task(task.task_id)
    assert found is not None
    return found


def tell(parked: Parked) -> str:
    return f"still parked: {parked.message}, {parked.probes} probes"


def stay_parked(ledger: Ledger, park_seconds: float = 3600) -> None:
    ledger.parking.stay_parked(PLACE, DENIED, tell=tell, wait_seconds=60, park_seconds=park_seconds)


def test_the_first_to_park_a_destination_is_told_so_and_its_cause_stands(ledger: Ledger) -> None:
    assert ledger.parking.find_parked(PLACE) is None
    parked, new = ledger.parking.park(PLACE, FULL, 30)
    again, new_again = ledger.parking.park(PLACE, DENIED, 30)
    assert (new, new_again) == (True, False)
    assert (parked.code, parked.message, parked.next_step, parked.probes) == ("disk_full", "the disk is full", "Make room.", 0)
    assert again.code == "disk_full"
    assert again.since == parked.since
    assert parked.probe_at == pytest.approx(parked.since + 30, abs=1)
    assert 0 < again.seconds_to_probe <= 30
    assert ledger.parking.find_parked(ELSEWHERE) is None


def test_of_many_that_park_at_once_one_is_first(ledger: Ledger) -> None:
    told: list[bool] = []

    def park() -> None:
        told.append(ledger.parking.park(PLACE, FULL, 30)[1])

    threads = [threading.Thread(target=park) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == [False] * 5 + [True]


def test_a_probe_is_taken_by_one_worker_when_it_is_due(ledger: Ledger) -> None:
    assert not ledger.parking.take_probe(PLACE, 60)
    ledger.parking.park(PLACE, FULL, 30)
    assert not ledger.parking.probe_due()
    assert not ledger.parking.take_probe(PLACE, 60)
    ledger.make_probe_due(1)
    assert ledger.parking.probe_due()
    taken: list[bool] = []
    threads = [threading.Thread(target=lambda: taken.append(ledger.parking.take_probe(PLACE, 60))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False] * 5 + [True]
    assert not ledger.parking.probe_due()


def test_a_destination_that_nobody_probes_any_more_is_forgotten_and_may_be_parked_anew(ledger: Ledger) -> None:
    ledger.parking.park(PLACE, FULL, 30)
    ledger.make_probe_due(3700)
    assert not ledger.parking.probe_due()
    assert not ledger.parking.take_probe(PLACE, 60)
    assert ledger.parking.find_parked(PLACE) is None
    parked, new = ledger.parking.park(PLACE, DENIED, 30)
    assert (parked.code, new) == ("permission_denied", True)


def test_a_failed_probe_tells_every_job_that_waits_and_sets_the_next(ledger: Ledger) -> None:
    waiting, running, elsewhere = ledger.accept("waiting", "running", "elsewhere")
    ledger.parking.park(PLACE, FULL, 30)
    wait_for(ledger, ledger.claim(waiting))
    wait_for(ledger, ledger.claim(elsewhere), ELSEWHERE)
    ledger.claim(running)
    ledger.make_probe_due(1)
    assert ledger.parking.take_probe(PLACE, 60)
    stay_parked(ledger)
    parked, task = ledger.parking.find_parked(PLACE), find(ledger, waiting)
    assert parked is not None
    assert (parked.probes, parked.code) == (1, "permission_denied")
    assert (task.status, task.attempt, task.message) == (Status.PENDING, 0, "still parked: permission denied, 1 probes")
    assert task.problem == DENIED
    assert task.due_at == pytest.approx(parked.probe_at + 60, abs=1)
    assert find(ledger, elsewhere).message == "waits"
    assert find(ledger, running).status is Status.PROCESSING


def test_a_job_waits_no_longer_than_it_may(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    ledger.parking.park(PLACE, FULL, 30)
    wait_for(ledger, ledger.claim(task))
    stay_parked(ledger, park_seconds=5)
    assert find(ledger, task).due_at == pytest.approx(task.created_at + 5, abs=1)


def test_a_healed_destination_lets_every_waiting_job_go_on_at_once(ledger: Ledger) -> None:
    waiting, cancelled, elsewhere = ledger.accept("waiting", "cancelled", "elsewhere")
    ledger.parking.park(PLACE, FULL, 30)
    wait_for(ledger, ledger.claim(waiting))
    wait_for(ledger, ledger.claim(cancelled))
    wait_for(ledger, ledger.claim(elsewhere), ELSEWHERE)
    ledger.submissions.cancel(cancelled.task_id)
    assert ledger.recovery.due(10) == []
    assert ledger.parking.heal(PLACE, "it works again") == 1
    assert ledger.parking.find_parked(PLACE) is None
    assert ledger.recovery.due(10) == [waiting.task_id]
    task = find(ledger, waiting)
    assert (task.message, task.problem, task.attempt) == ("it works again", None, 0)
    assert ledger.submissions.history(waiting.task_id)[-1].message == "it works again"
    assert ledger.parking.heal(PLACE, "it works again") == 0
    assert ledger.claim(waiting).task.attempt == 1


def test_a_destination_that_is_parked_again_soon_is_probed_less_often(ledger: Ledger) -> None:
    for seconds in (30, 60, 120, 240, 480, 480):
        parked, new = ledger.parking.park(PLACE, FULL, 30)
        assert new
        assert parked.probe_at - parked.since == pytest.approx(seconds, abs=1)
        ledger.parking.heal(PLACE, "it works again")


def test_a_duty_is_done_by_one_worker_every_so_often(ledger: Ledger) -> None:
    assert ledger.duties.due_duties(["janitor", "other"]) == ["janitor", "other"]
    taken: list[bool] = []
    threads = [threading.Thread(target=lambda: taken.append(ledger.duties.take_duty("janitor", 60))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False] * 5 + [True]
    assert ledger.duties.due_duties(["janitor", "other"]) == ["other"]
    assert ledger.duties.take_duty("other", -1)
    assert ledger.duties.take_duty("other", 60), "its time has come again"
