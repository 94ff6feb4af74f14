"""The observer and the judge see what they are there for: each test doctors a folder or a row."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chaos.judge import Asked, Finding, Found, Leftovers, judge_job, judge_leftovers
from chaos.observer import PASSES_LOST, Observer, read_folder

VERSION_1 = {"SKU/SKU.glb": "hash-1", "SKU/obj/SKU.obj": "hash-2"}
VERSION_2 = {"SKU/SKU.glb": "hash-3", "SKU/obj/SKU.obj": "hash-4"}
SIZES = {"SKU/SKU.glb": 4, "SKU/obj/SKU.obj": 3}


def task(task_id: str = "t1", status: str = "completed", code: str | None = None) -> dict[str, Any]:
    return {"task_id": task_id, "status": status, "stage": "done", "message": "said so", "problem_code": code}


def ends(*tasks: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"task_id": each["task_id"], "kind": each["status"]} for each in tasks]


def found(*tasks: dict[str, Any], delivered: dict[str, str] | None, count: int) -> Found:
    """A job whose rows all say that it was delivered `count` times."""
    return Found(list(tasks), ends(*tasks), count, count, count, delivered, count)


@pytest.fixture
def asked() -> Asked:
    return Asked("job", versions=[VERSION_1], accepted={"t1"})


@pytest.fixture
def good() -> Found:
    return found(task(), delivered=VERSION_1, count=1)


def kinds(findings: list[Finding]) -> set[str]:
    return {finding.kind for finding in findings}


# --- the judge ----------------------------------------------------------------------------------------------------------


def test_a_delivery_that_was_made_and_recorded_once_is_no_finding(asked: Asked, good: Found) -> None:
    assert judge_job(asked, good) == []


@pytest.mark.parametrize("doctored", ["uploads", "emails", "history", "published"])
def test_whatever_is_there_twice_is_duplicated(asked: Asked, good: Found, doctored: str) -> None:
    assert kinds(judge_job(asked, replace(good, **{doctored: 2}))) == {"duplicated"}


@pytest.mark.parametrize("doctored", ["uploads", "emails", "history"])
def test_a_delivery_without_its_row_is_lost(asked: Asked, good: Found, doctored: str) -> None:
    assert kinds(judge_job(asked, replace(good, **{doctored: 0}))) == {"lost"}


def test_a_task_that_ended_twice_is_duplicated(asked: Asked, good: Found) -> None:
    assert kinds(judge_job(asked, replace(good, events=ends(task(), task())))) == {"duplicated"}


def test_two_completed_tasks_for_one_upload_are_duplicated(asked: Asked) -> None:
    twice = found(task("t1"), task("t2"), delivered=VERSION_1, count=2)
    assert kinds(judge_job(asked, twice)) == {"duplicated"}


def test_an_accepted_task_that_the_ledger_does_not_know_is_lost(asked: Asked, good: Found) -> None:
    asked.accepted.add("t2")
    assert kinds(judge_job(asked, good)) == {"lost"}


def test_a_task_that_has_not_ended_is_stuck(asked: Asked) -> None:
    waiting = found(task(status="uploading"), delivered=None, count=0)
    assert kinds(judge_job(asked, waiting)) == {"stuck", "lost"}


@pytest.mark.parametrize(
    ("status", "code"), [("failed", "worker_died"), ("validation_failed", "x"), ("cancelled", "cancelled")]
)
def test_a_good_product_that_ends_otherwise_is_lost(asked: Asked, status: str, code: str) -> None:
    assert kinds(judge_job(asked, found(task(status=status, code=code), delivered=None, count=0))) == {"lost"}


def test_where_attempts_are_scarce_a_failure_is_an_end_but_not_with_a_visible_package(asked: Asked) -> None:
    asked.scarce = True
    failed = task(status="failed", code="worker_died")
    assert judge_job(asked, found(failed, delivered=None, count=0)) == []
    assert kinds(judge_job(asked, found(failed, delivered=VERSION_1, count=0))) == {"lost"}


def test_completed_without_the_package_is_lost(asked: Asked, good: Found) -> None:
    assert kinds(judge_job(asked, replace(good, delivered=None))) == {"lost"}


def test_wrong_bytes_at_the_destination_are_no_whole_package(asked: Asked, good: Found) -> None:
    mixed = {"SKU/SKU.glb": "hash-1", "SKU/obj/SKU.obj": "hash-4"}
    assert kinds(judge_job(asked, replace(good, delivered=mixed))) == {"partially_visible"}


def test_the_older_version_after_a_redelivery_is_lost(asked: Asked) -> None:
    asked.versions.append(VERSION_2)
    old = found(task("t1"), task("t2"), delivered=VERSION_1, count=2)
    assert kinds(judge_job(asked, old)) == {"lost"}
    assert judge_job(asked, replace(old, delivered=VERSION_2)) == []


def test_what_was_answered_as_cancelled_must_not_arrive(asked: Asked, good: Found) -> None:
    asked.cancelled, asked.cancel_confirmed = {"t1"}, {"t1"}
    assert kinds(judge_job(asked, good)) == {"lost"}
    assert judge_job(asked, found(task(status="cancelled", code="cancelled"), delivered=None, count=0)) == []


def test_a_refused_or_missing_product_must_not_arrive() -> None:
    refused = Asked("job", expected="refused")
    assert judge_job(refused, found(task(status="validation_failed"), delivered=None, count=0)) == []
    assert kinds(judge_job(refused, found(task(), delivered=VERSION_1, count=1))) == {"duplicated"}
    missing = Asked("job", expected="missing")
    assert judge_job(missing, found(task(status="failed", code="object_missing"), delivered=None, count=0)) == []
    assert kinds(judge_job(missing, found(task(status="failed", code="unexpected"), delivered=None, count=0))) == {"lost"}


@pytest.mark.parametrize("what", ["staging", "workspaces", "temporary", "leases", "redis_keys"])
def test_whatever_is_left_behind_is_leaked(what: str) -> None:
    assert judge_leftovers(Leftovers()) == []
    assert kinds(judge_leftovers(Leftovers(**{what: ["one"]}))) == {"leaked"}


def test_a_previous_delivery_that_is_gone_before_the_new_one_is_whole_is_found_out(asked: Asked, good: Found) -> None:
    assert kinds(judge_job(asked, replace(good, previous_lost=["version 1 is nowhere"]))) == {"previous_lost"}


def test_where_folders_are_copied_a_part_may_be_seen_but_not_in_the_end(asked: Asked, good: Found) -> None:
    asked.copied = True
    assert judge_job(asked, replace(good, partial=["a file less"], published=3)) == []
    half = {"SKU/SKU.glb": "hash-1"}
    assert kinds(judge_job(asked, replace(good, delivered=half))) == {"partially_visible"}
    assert kinds(judge_job(asked, replace(good, previous_lost=["nowhere"]))) == {"previous_lost"}


# --- the observer ---------------------------------------------------------------------------------------------------------


def deliver(folder: Path, sizes: dict[str, int] = SIZES) -> Path:
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    return folder


@pytest.fixture
def observer(tmp_path: Path) -> Observer:
    watching = Observer(tmp_path)
    watching.watch("job", SIZES)
    return watching


def test_absent_and_whole_are_both_fine(observer: Observer, tmp_path: Path) -> None:
    observer.look()
    deliver(tmp_path / "job")
    observer.look()
    assert (observer.partial, observer.published("job")) == ([], 1)


@pytest.mark.parametrize("doctor", ["a file less", "a file more", "a file short", "nothing in it"])
def test_a_folder_that_is_not_whole_is_seen(observer: Observer, tmp_path: Path, doctor: str) -> None:
    folder = deliver(tmp_path / "job")
    match doctor:
        case "a file less":
            (folder / "SKU/SKU.glb").unlink()
        case "a file more":
            (folder / "SKU/part").touch()
        case "a file short":
            os.truncate(folder / "SKU/SKU.glb", 3)
        case _:
            (folder / "SKU").rename(tmp_path / "elsewhere")
    observer.look()
    assert [sighting.job_id for sighting in observer.partial] == ["job"]


def test_a_second_folder_at_the_final_name_is_counted(observer: Observer, tmp_path: Path) -> None:
    deliver(tmp_path / "job")
    observer.look()
    deliver(tmp_path / "new")
    (tmp_path / "job").rename(tmp_path / "previous")
    (tmp_path / "new").rename(tmp_path / "job")
    observer.look()
    assert observer.published("job") == 2


def test_a_folder_renamed_away_while_it_is_read_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is being removed by then; whoever lists the final name does not see it."""
    folder, walk = deliver(tmp_path / "job"), os.fwalk

    def renamed_first(*arguments: Any, **named: Any) -> Any:
        folder.rename(tmp_path / "previous")
        return walk(*arguments, **named)

    monkeypatch.setattr(os, "fwalk", renamed_first)
    assert read_folder(folder) is None


def passes(observer: Observer) -> list[str]:
    for _ in range(PASSES_LOST + 1):
        observer.look()
    return observer.lost.get("job", [])


def test_a_delivery_that_is_set_aside_or_replaced_by_a_whole_one_is_not_lost(observer: Observer, tmp_path: Path) -> None:
    newer = {"SKU/SKU.glb": 9}
    observer.watch("job", newer)
    deliver(tmp_path / "job")
    assert passes(observer) == []
    aside = tmp_path / ".ncr-staging/task-1/previous/job"
    aside.parent.mkdir(parents=True)
    (tmp_path / "job").rename(aside)
    assert passes(observer) == []
    deliver(tmp_path / "job", newer)
    assert passes(observer) == []
    aside.rename(tmp_path / "removed")
    assert passes(observer) == []


@pytest.mark.parametrize("put", ["nothing", "half of the new one", "a file of another size"])
def test_a_delivery_that_went_for_less_is_lost(observer: Observer, tmp_path: Path, put: str) -> None:
    observer.watch("job", {"SKU/SKU.glb": 9, "SKU/obj/SKU.obj": 9})
    assert passes(observer) == []
    folder = deliver(tmp_path / "job")
    assert passes(observer) == []
    folder.rename(tmp_path / "removed")
    if put == "half of the new one":
        deliver(tmp_path / "job", {"SKU/SKU.glb": 9})
    elif put != "nothing":
        deliver(tmp_path / "job", {**SIZES, "SKU/SKU.glb": 5})
    assert len(passes(observer)) == 1
