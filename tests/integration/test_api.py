"""The HTTP API as its callers know it, over a real socket, on the ledger's twin and on SQLite."""

from __future__ import annotations

import re
from typing import Any

import pytest

from api_server import JOB, Site, assert_problem
from ledger_twin import MemoryHost
from ncr_upload.application.views import VIEW_FIELDS, view_of
from ncr_upload.domain.errors import CancelRequested
from ncr_upload.domain.jobs import Problem, Stage, Status

NEVER = "00000000-0000-4000-8000-000000000000"
ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


# --- sending a job


def test_a_job_is_accepted_with_the_fields_of_the_readme(site: Site) -> None:
    answer = site.http.post("/process-job", json=JOB)
    assert answer.status_code == 202
    body = answer.json()
    assert set(body) == {"job_id", "task_id", "status", "message", "timestamp"}
    assert (body["job_id"], body["status"]) == ("job-1", "pending")
    assert ISO.fullmatch(body["timestamp"])
    assert site.task(body["task_id"]).row_id == 7


def test_row_id_may_be_left_out(site: Site) -> None:
    job = {name: value for name, value in JOB.items() if name != "row_id"}
    assert site.http.post("/process-job", json=job).status_code == 202


def test_a_job_in_flight_is_answered_409_with_its_task(site: Site) -> None:
    task_id = site.submit()
    body = assert_problem(site.http.post("/process-job", json=JOB), 409, "already_running")
    assert body["task_id"] == task_id
    assert body["running"] == [{"job_id": "job-1", "task_id": task_id}]


def test_an_ended_job_may_be_sent_again(site: Site) -> None:
    first = site.submit()
    site.claims.finish(site.claim(first), status=Status.FAILED, stage=Stage.LOOKUP, message="no", problem=None)
    assert site.submit() != first


def test_too_little_memory_is_503_with_the_figures_and_when_to_come_again(site: Site) -> None:
    site.host.figures = MemoryHost(used=91).figures
    answer = site.http.post("/process-job", json=JOB)
    body = assert_problem(answer, 503, "memory_pressure")
    assert int(answer.headers["retry-after"]) == body["retry_after_seconds"] > 0
    assert body["memory"] == {
        "used_bytes": 91,
        "total_bytes": 100,
        "used_percent": 91.0,
        "limit_percent": 80.0,
        "source": "host",
    }
    assert site.http.get("/jobs/active").json()["count"] == 0


# --- following a job


def test_a_task_is_shown_with_every_field_from_acceptance_to_its_end(site: Site) -> None:
    task_id = site.submit()
    waiting = site.http.get(f"/job-status/{task_id}").json()
    assert tuple(waiting) == VIEW_FIELDS
    assert (waiting["status"], waiting["stage"], waiting["progress"], waiting["attempt"]) == ("pending", "queued", 0.0, 0)
    claim = site.claim(task_id)
    running = site.http.get(f"/job-status/{task_id}").json()
    assert (running["status"], running["attempt"]) == ("processing", 1)
    assert ISO.fullmatch(running["started_at"])
    problem = Problem("object_missing", "rejected", "a/b.glb is not in the bucket", "Upload it.")
    site.claims.finish(claim, status=Status.FAILED, stage=Stage.DOWNLOAD, message="failed", problem=problem)
    ended = site.http.get(f"/job-status/{task_id}").json()
    assert ended["status"] == "failed"
    assert ISO.fullmatch(ended["finished_at"])
    assert ended["problem"] == {
        "code": "object_missing",
        "class": "rejected",
        "message": "a/b.glb is not in the bucket",
        "next_step": "Upload it.",
    }


def test_live_progress_from_redis_is_shown(site: Site) -> None:
    task_id = site.submit()
    claim = site.claim(task_id)
    site.board.post([view_of(claim.task) | {"stage": "download", "progress": 33.3}], live=True, fence=claim.fence)
    view = site.http.get(f"/job-status/{task_id}").json()
    assert (view["stage"], view["progress"]) == ("download", 33.3)


def test_a_view_left_in_redis_never_contradicts_an_ended_task(site: Site) -> None:
    task_id = site.submit()
    claim = site.claim(task_id)
    site.claims.finish(claim, status=Status.FAILED, stage=Stage.LOOKUP, message="no", problem=None)
    site.board.post([view_of(claim.task)], live=True, fence=claim.fence)
    assert site.http.get(f"/job-status/{task_id}").json()["status"] == "failed"


@pytest.mark.parametrize("end", [None, Status.FAILED, Status.VALIDATION_FAILED, Status.CANCELLED])
def test_every_task_ever_accepted_is_shown_with_redis_away(site: Site, end: Status | None) -> None:
    task_id = site.submit()
    if end is not None:
        site.claims.finish(site.claim(task_id), status=end, stage=Stage.VALIDATE, message="no", problem=None)
    site.board.away = True
    shown = site.http.get(f"/job-status/{task_id}")
    assert (shown.status_code, shown.json()["status"]) == (200, end or "pending")


def test_an_id_never_issued_is_404(site: Site) -> None:
    for unknown in (NEVER, "x", "%00", "..%2f", "é", "' OR 1=1", NEVER.upper() + "A"):
        assert site.http.get(f"/job-status/{unknown}").status_code == 404
    assert_problem(site.http.get(f"/job-status/{NEVER}"), 404, "task_unknown")
    assert_problem(site.http.get(f"/jobs/{NEVER}/history"), 404, "task_unknown")
    assert_problem(site.http.get(f"/batch-status/{NEVER}"), 404, "batch_unknown")


def test_the_history_has_every_step_in_order(site: Site) -> None:
    task_id = site.submit()
    site.claims.finish(site.claim(task_id), status=Status.FAILED, stage=Stage.LOOKUP, message="no files", problem=None)
    body = site.http.get(f"/jobs/{task_id}/history").json()
    assert body["task_id"] == task_id
    assert [event["kind"] for event in body["events"]] == ["accepted", "claimed", "failed"]
    assert body["events"][1]["actor"] == "w1"
    assert set(body["events"][0]) == {"at", "attempt", "stage", "kind", "actor", "message"}
    assert all(ISO.fullmatch(event["at"]) for event in body["events"])


def test_active_jobs_are_filtered_and_paged(site: Site) -> None:
    for number in range(5):
        site.submit(job_id=f"job-{number}", username="ann" if number % 2 else "bob", campaign=f"c{number}")

    def found(**query: Any) -> list[str]:
        body = site.http.get("/jobs/active", params=query).json()
        assert body["count"] == len(body["active_jobs"])
        return [job["job_id"] for job in body["active_jobs"]]

    assert found() == [f"job-{number}" for number in range(5)]
    assert found(username="ann") == ["job-1", "job-3"]
    assert found(campaign="c4") == ["job-4"]
    assert found(status="processing") == []
    seen, cursor = [], None
    while True:
        page = site.http.get("/jobs/active", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        assert page["total"] == 5
        seen += [job["job_id"] for job in page["active_jobs"]]
        cursor = page["cursor"]
        if cursor is None:
            break
    assert seen == [f"job-{number}" for number in range(5)]


# --- the state of the service


def test_the_root_names_the_service_and_links_its_documentation(site: Site) -> None:
    body = site.http.get("/").json()
    assert {"name", "version", "links"} <= set(body)
    for link in body["links"].values():
        assert site.http.get(link).status_code == 200


def test_health_tells_of_every_part(site: Site) -> None:
    body = site.http.get("/health").json()
    assert (body["status"], body["redis"], body["database"], body["worker"]) == ("healthy", *["connected"] * 3)
    assert "s3" not in body
    assert ISO.fullmatch(body["timestamp"])


def test_deep_health_asks_the_outside_parts_and_says_what_is_wrong(site: Site) -> None:
    answer = site.http.get("/health?deep=true")
    body = answer.json()
    assert (answer.status_code, body["status"]) == (200, "degraded")
    assert (body["s3"], body["sftp"]) == ("connected", "unavailable")
    assert "sftp.partner:22" in body["problems"]["sftp"]


def test_without_redis_jobs_are_accepted_and_health_is_degraded(site: Site) -> None:
    site.board.away = site.queue.away = True
    task_id = site.submit()
    assert site.http.get(f"/job-status/{task_id}").json()["status"] == "pending"
    answer = site.http.get("/health")
    assert (answer.status_code, answer.json()["status"], answer.json()["redis"]) == (200, "degraded", "unavailable")
    assert site.http.get("/readyz").status_code == 200


def test_memory_stats_tell_what_is_used_and_what_it_allows(site: Site) -> None:
    body = site.http.get("/memory-stats").json()
    assert body["system"]["used_percent"] == 20.0
    assert body["process"]["rss_bytes"] == 1
    assert body["accepting_jobs"] is True
    assert body["recommended_concurrency"] >= 1
    site.host.figures = MemoryHost(used=91).figures
    assert site.http.get("/memory-stats").json()["accepting_jobs"] is False


def test_celery_stats_have_the_workers_and_the_queue(site: Site) -> None:
    body = site.http.get("/celery-stats").json()
    assert {"active", "scheduled", "stats", "workers", "queues", "timestamp"} <= set(body)
    assert body["workers"] == ["celery@here"]
    assert body["queues"] == {"ncr_jobs": 0}


def test_a_waiting_task_is_cancelled_at_once(site: Site) -> None:
    task_id = site.submit()
    answer = site.http.post(f"/jobs/{task_id}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
    assert site.http.get(f"/job-status/{task_id}").json()["status"] == "cancelled"
    assert site.http.post(f"/jobs/{task_id}/cancel").status_code == 202
    assert site.submit() != task_id


def test_a_running_task_is_asked_to_stop(site: Site) -> None:
    task_id = site.submit()
    claim = site.claim(task_id)
    assert site.http.post(f"/jobs/{task_id}/cancel").json()["status"] == "cancelling"
    with pytest.raises(CancelRequested):
        site.claims.renew(claim)


def test_a_task_that_is_being_published_or_has_ended_is_not_cancelled(site: Site) -> None:
    task_id = site.submit()
    claim = site.claim(task_id)
    for status in (Status.VALIDATION_PASSED, Status.UPLOADING):
        site.claims.advance(claim, status=status, stage=Stage.PUBLISH, message="", announce_publish=True)
    assert_problem(site.http.post(f"/jobs/{task_id}/cancel"), 409, "being_published")
    site.claims.finish(claim, status=Status.COMPLETED, stage=Stage.DONE, message="", problem=None)
    assert_problem(site.http.post(f"/jobs/{task_id}/cancel"), 409, "already_ended")
    assert_problem(site.http.post(f"/jobs/{NEVER}/cancel"), 404, "task_unknown")


def test_a_task_whose_publish_nobody_saw_end_says_so_and_is_cancelled_once_it_did_not_happen(site: Site) -> None:
    task_id = site.submit()
    claim = site.claim(task_id)
    for status in (Status.VALIDATION_PASSED, Status.UPLOADING):
        site.claims.advance(claim, status=status, stage=Stage.PUBLISH, message="", announce_publish=True)
    lost = Problem("sftp_unreachable", "transient", "no answer", "It is tried again.")
    site.claims.put_back(claim, problem=lost, message="", delay_seconds=0, spend_attempt=True)
    answer = site.http.post(f"/jobs/{task_id}/cancel")
    assert_problem(answer, 409, "being_published")
    assert "may be visible" in answer.json()["detail"]
    claim = site.claim(task_id)
    site.claims.advance(claim, status=Status.PROCESSING, stage=Stage.LOOKUP, message="", retract_publish=True)
    assert site.http.post(f"/jobs/{task_id}/cancel").json()["status"] == "cancelling"


def test_a_failed_task_is_tried_again_as_a_new_one_that_names_it(site: Site) -> None:
    task_id = site.submit()
    assert_problem(site.http.post(f"/jobs/{task_id}/retry"), 409, "already_running")
    site.claims.finish(site.claim(task_id), status=Status.FAILED, stage=Stage.LOOKUP, message="", problem=None)
    again = site.http.post(f"/jobs/{task_id}/retry")
    assert again.status_code == 202
    body = again.json()
    assert body["retry_of"] == task_id
    view = site.http.get(f"/job-status/{body['task_id']}").json()
    assert {name: view[name] for name in JOB} == JOB
    assert task_id in site.http.get(f"/jobs/{body['task_id']}/history").json()["events"][0]["message"]
    assert_problem(site.http.post(f"/jobs/{NEVER}/retry"), 404, "task_unknown")


def test_a_delivered_task_is_not_tried_again(site: Site) -> None:
    task_id = site.submit()
    claim = site.claim(task_id)
    for status in (Status.VALIDATION_PASSED, Status.UPLOADING):
        site.claims.advance(claim, status=status, stage=Stage.UPLOAD, message="")
    site.claims.finish(claim, status=Status.COMPLETED, stage=Stage.DONE, message="", problem=None)
    assert_problem(site.http.post(f"/jobs/{task_id}/retry"), 409, "already_ended")


def test_a_request_repeated_with_its_key_is_answered_as_the_first_time(site: Site) -> None:
    headers = {"Idempotency-Key": "k-1"}
    first = site.http.post("/process-job", json=JOB, headers=headers)
    again = site.http.post("/process-job", json=JOB, headers=headers)
    assert (again.status_code, again.json()) == (202, first.json())
    other = site.http.post("/process-job", json=JOB | {"job_id": "another"}, headers=headers)
    assert_problem(other, 422, "idempotency_key_reused")
    jobs = [JOB | {"job_id": f"batch-{n}"} for n in range(3)]
    batch = site.http.post("/process-batch", json=jobs, headers={"Idempotency-Key": "k-2"})
    assert site.http.post("/process-batch", json=jobs, headers={"Idempotency-Key": "k-2"}).json() == batch.json()
    assert_problem(site.http.post("/process-job", json=JOB, headers={"Idempotency-Key": "x" * 256}), 422, "invalid_request")
