"""The two short ways through the API (ADR 12) answer exactly as the framework's own ways do."""

from __future__ import annotations

from typing import Any

import pytest

from api_server import JOB, Site
from ncr_upload.domain.jobs import Stage, Status

STATUS_FIRST = "ncr_upload.entrypoints.api.status_first._asked_for"


def ended(site: Site) -> str:
    task_id = site.submit(job_id="ended")
    site.claims.finish(site.claim(task_id), status=Status.FAILED, stage=Stage.LOOKUP, message="no", problem=None)
    return task_id


@pytest.mark.parametrize("which", ["waiting", "running", "ended", "unknown"])
def test_a_status_is_the_same_before_the_router_and_through_it(site: Site, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    task_id = ended(site) if which == "ended" else site.submit()
    if which == "running":
        site.claim(task_id)
    if which == "unknown":
        task_id = "00000000-0000-4000-8000-000000000000"
    asked = [site.http.get(f"/job-status/{task_id}")]
    with monkeypatch.context() as patched:
        patched.setattr(STATUS_FIRST, lambda _scope: None)
        asked.append(site.http.get(f"/job-status/{task_id}"))
    first, through = asked
    assert first.status_code == through.status_code == (404 if which == "unknown" else 200)
    assert first.json() == through.json()
    assert first.headers["content-type"] == through.headers["content-type"]


def shape(answer: Any) -> tuple[int, str, dict[str, type]]:
    body = answer.json()
    return answer.status_code, answer.headers["content-type"], {name: type(value) for name, value in body.items()}


@pytest.mark.parametrize("change", [{}, {"row_id": None}, {"row_id": "x"}, {"job_id": ""}, {"more": 1}])
def test_a_submit_is_answered_the_same_by_the_lean_route_and_by_the_framework(site: Site, change: dict[str, Any]) -> None:
    plain = site.http.post("/process-job", json=JOB | {"job_id": "plain"} | change)
    other = site.http.post(
        "/process-job",
        json=JOB | {"job_id": "other"} | change,
        headers={"Content-Type": "application/json; charset=utf-8"},
    )
    assert shape(plain) == shape(other)
