"""Batches over HTTP, on the ledger's twin and on SQLite."""

from __future__ import annotations

import re
from typing import Any

import pytest

from api_server import Site, assert_problem
from ncr_upload.domain.jobs import Stage, Status

NEVER = "00000000-0000-4000-8000-000000000000"
ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


def batch_of(*job_ids: str) -> list[dict[str, Any]]:
    return [{"job_id": job_id, "username": "ann", "campaign": "spring"} for job_id in job_ids]


def test_a_batch_is_accepted_and_followed(site: Site) -> None:
    answer = site.http.post("/process-batch", json=batch_of("a", "b", "c"))
    assert answer.status_code == 202
    body = answer.json()
    assert set(body) == {"batch_id", "total_jobs", "jobs", "conflicts", "status", "message", "timestamp"}
    assert (body["total_jobs"], body["status"]) == (3, "pending")
    assert [job["job_id"] for job in body["jobs"]] == ["a", "b", "c"]
    claim = site.claim(body["jobs"][0]["task_id"])
    site.claims.finish(claim, status=Status.FAILED, stage=Stage.LOOKUP, message="no", problem=None)
    view = site.http.get(f"/batch-status/{body['batch_id']}").json()
    assert (view["batch_id"], view["status"], view["total_jobs"]) == (body["batch_id"], "processing", 3)
    assert {status: count for status, count in view["counts"].items() if count} == {"pending": 2, "failed": 1}
    assert view["percentage"] == pytest.approx(33.3)
    assert (view["stalled"], view["finished_at"], view["conflicts"]) == (False, None, [])
    assert ISO.fullmatch(view["started_at"])
    assert view["estimated_end"] > view["started_at"]
    assert [job["status"] for job in view["jobs"]] == ["failed", "pending", "pending"]
    assert {job["batch_id"] for job in view["jobs"]} == {body["batch_id"]}


def test_a_batch_is_paged(site: Site) -> None:
    batch_id = site.http.post("/process-batch", json=batch_of("a", "b", "c")).json()["batch_id"]
    first = site.http.get(f"/batch-status/{batch_id}?limit=2").json()
    rest = site.http.get(f"/batch-status/{batch_id}", params={"limit": 2, "cursor": first["cursor"]}).json()
    assert [job["job_id"] for page in (first, rest) for job in page["jobs"]] == ["a", "b", "c"]
    assert rest["cursor"] is None


def test_two_batches_of_one_user_are_two(site: Site) -> None:
    batches = [site.http.post("/process-batch", json=batch_of(job_id)).json()["batch_id"] for job_id in ("a", "b")]
    assert [site.http.get(f"/batch-status/{batch}").json()["jobs"][0]["job_id"] for batch in batches] == ["a", "b"]


def test_a_job_named_twice_refuses_the_batch_naming_both_places(site: Site) -> None:
    body = assert_problem(site.http.post("/process-batch", json=batch_of("a", "b", "a")), 422, "duplicate_jobs")
    assert body["errors"] == [{"field": "[2].job_id", "message": "[0].job_id and [2].job_id are both 'a'."}]
    assert site.http.get("/jobs/active").json()["count"] == 0


def test_a_job_in_flight_is_left_out_of_the_batch_and_named_in_its_report(site: Site) -> None:
    running = {job_id: site.submit(job_id=job_id) for job_id in ("b", "d")}
    body = site.http.post("/process-batch", json=batch_of("a", "b", "c", "d")).json()
    assert [job["job_id"] for job in body["jobs"]] == ["a", "c"]
    assert body["message"] == "accepted 2 jobs; 2 left out, in flight already"
    view = site.http.get(f"/batch-status/{body['batch_id']}").json()
    for told in (body["conflicts"], view["conflicts"]):
        assert {job["job_id"]: job["task_id"] for job in told} == running
    assert view["total_jobs"] == 2


@pytest.mark.parametrize(("job_ids", "on_conflict"), [("abcd", "reject"), ("bd", "skip")])
def test_a_batch_with_nothing_left_or_told_to_reject_is_refused_whole(site: Site, job_ids: str, on_conflict: str) -> None:
    running = {job_id: site.submit(job_id=job_id) for job_id in ("b", "d")}
    answer = site.http.post("/process-batch", params={"on_conflict": on_conflict}, json=batch_of(*job_ids))
    body = assert_problem(answer, 409, "already_running")
    assert {job["job_id"]: job["task_id"] for job in body["running"]} == running
    assert site.http.get("/jobs/active").json()["count"] == 2


def test_an_unknown_wish_for_conflicts_is_refused(site: Site) -> None:
    answer = site.http.post("/process-batch", params={"on_conflict": "ignore"}, json=batch_of("a"))
    assert "on_conflict" in assert_problem(answer, 422, "invalid_request")["detail"]


def end(site: Site, task_id: str, status: Status) -> None:
    site.claims.finish(site.claim(task_id), status=status, stage=Stage.LOOKUP, message="no", problem=None)


def test_a_batch_is_cancelled_and_says_how_many_were_in_time(site: Site) -> None:
    sent = site.http.post("/process-batch", json=batch_of("a", "b", "c")).json()
    end(site, sent["jobs"][0]["task_id"], Status.FAILED)
    site.claim(sent["jobs"][1]["task_id"])
    answer = site.http.post(f"/batches/{sent['batch_id']}/cancel")
    assert answer.status_code == 202
    body = answer.json()
    assert body["message"] == "2 of 3 jobs are cancelled or stop within seconds."
    assert [body[name] for name in ("cancelled", "cancelling", "publishing", "ended")] == [1, 1, 0, 1]


def test_the_unsuccessful_jobs_of_a_batch_are_tried_again_as_a_new_batch(site: Site) -> None:
    sent = site.http.post("/process-batch", json=batch_of("a", "b")).json()
    for job, status in zip(sent["jobs"], (Status.FAILED, Status.VALIDATION_FAILED), strict=True):
        end(site, job["task_id"], status)
    again = site.http.post(f"/batches/{sent['batch_id']}/retry-failed")
    assert again.status_code == 202
    assert [job["job_id"] for job in again.json()["jobs"]] == ["a", "b"]
    assert again.json()["retry_of"] == sent["batch_id"] != again.json()["batch_id"]
    history = site.http.get(f"/jobs/{again.json()['jobs'][0]['task_id']}/history").json()
    assert sent["batch_id"] in history["events"][0]["message"]
    assert_problem(site.http.post(f"/batches/{sent['batch_id']}/retry-failed"), 409, "already_running")


def test_a_batch_in_which_nothing_failed_has_nothing_to_try_again(site: Site) -> None:
    sent = site.http.post("/process-batch", json=batch_of("a")).json()
    assert_problem(site.http.post(f"/batches/{sent['batch_id']}/retry-failed"), 409, "nothing_failed")


@pytest.mark.parametrize("action", ["cancel", "retry-failed"])
@pytest.mark.parametrize("batch_id", [NEVER, "no-id"])
def test_an_unknown_batch_is_neither_cancelled_nor_tried_again(site: Site, action: str, batch_id: str) -> None:
    assert_problem(site.http.post(f"/batches/{batch_id}/{action}"), 404, "batch_unknown")


def test_one_bad_job_refuses_the_batch_naming_its_place(site: Site) -> None:
    jobs = batch_of("a", "b", "c")
    jobs[1]["job_id"] = "../b"
    body = assert_problem(site.http.post("/process-batch", json=jobs), 422, "invalid_request")
    assert [error["field"] for error in body["errors"]] == ["[1].job_id"]
    assert site.http.get("/jobs/active").json()["count"] == 0
