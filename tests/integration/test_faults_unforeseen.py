"""A fault the code did not expect: logged once with its trace and job, ended after bounded tries, nobody else held up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from fault_table import fault
from ncr_upload.domain.jobs import Status
from ncr_upload.entrypoints.embedded.product import Product
from outcomes import assert_told
from workplace import Workplace

PROGRAM = Path(__file__).parent.parent / "worker_program.py"


def run_worker(workplace: Workplace, place: str, *task_ids: str) -> list[dict[str, Any]]:
    """What the worker's program logs while it answers the rings for these tasks."""
    values = workplace.settings.model_dump(exclude_unset=True)
    plain = {name: value.get_secret_value() if isinstance(value, SecretStr) else value for name, value in values.items()}
    environment = {name.upper(): str(value) for name, value in plain.items() if value is not None}
    ran = subprocess.run(
        [sys.executable, PROGRAM, place, *task_ids],
        env={**os.environ, **environment, "LOG_FORMAT": "json"},
        cwd=workplace.settings.work_dir.parent,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stderr.splitlines()]


@pytest.mark.parametrize(
    "place",
    [
        "ncr_upload.adapters.sql.catalogue:SqlCatalogue.list_files",
        "ncr_upload.adapters.object_store:S3ObjectStore.fetch",
        "ncr_upload.adapters.zip_archive:ZipArchiver.stream",
        "ncr_upload.adapters.http_validator:HttpValidator.judge",
        "ncr_upload.adapters.sftp_dropoff.dropoff:SftpSession.stage",
    ],
)
@fault(
    "Worker: a fault the code did not foresee",
    injector="an adapter raises KeyError",
    invariants="LOPRH",
    outcome="logged once per attempt with trace and job; failed after three tries; other jobs go on",
)
def test_an_unforeseen_fault_is_logged_with_its_trace_and_ends_after_bounded_tries(
    workplace: Workplace, job_id: str, small: Product, place: str
) -> None:
    workplace.place(job_id, small)
    workplace.place(f"{job_id}-good", small)
    workplace.change(max_attempts=5, retry_base_seconds=1e-6)  # due again at once
    workplace.change(download_cache_bytes=0)  # what the good job has fetched would be there for the bad one
    (bad,), (good,) = workplace.submit(job_id), workplace.submit(f"{job_id}-good")
    lines = run_worker(workplace, place, f"!{bad.task_id}", good.task_id, *[f"!{bad.task_id}"] * 4)
    traces = [line for line in lines if line["level"] == "error"]
    assert [(line["task_id"], line["job_id"], line["attempt"]) for line in traces] == [
        (bad.task_id, job_id, n) for n in (1, 2, 3)
    ]
    assert all("raise_key_error" in line["exception"] and "KeyError" in line["exception"] for line in traces)
    assert json.dumps(lines).count("Traceback") == 3, "logged once each"

    ended, other = (workplace.ports().submissions.task(each.task_id) for each in (bad, good))
    assert (ended.status, ended.attempt, ended.problem.error_class) == (Status.FAILED, 3, "unknown")
    assert_told(workplace, ended, "unknown", "unexpected KeyError", bad.task_id, "attempt 1 of 5", "next try in")
    assert_told(workplace, ended, "unknown", "unexpected KeyError", "attempt 3 of 5", "given up")
    assert "hunter2" not in "\n".join([ended.message, *workplace.history(ended)])
    workplace.sweep(ended)
    assert workplace.delivered(job_id) is None
    assert workplace.leftovers() == []
    assert (other.status, other.attempt) == (Status.COMPLETED, 1)
    assert workplace.delivered(good.job_id) == small.delivered
    assert len(workplace.studio_rows("email")) == 1
