"""A newcomer's first minutes: `docker compose --profile embedded up`, then the first README's commands, as they stand there."""

from __future__ import annotations

import json
from typing import Any

import httpx

from deploy.report import Failed, wait
from deploy.site import Site

FIRST_JOB = """curl -X POST "http://localhost:8001/process-job" \
     -H "Content-Type: application/json" \
     -d '{
       "job_id": "your-job-id",
       "username": "your-username",
       "campaign": "your-campaign",
       "row_id": 123
     }'"""
FIRST_BATCH = """curl -X POST "http://localhost:8001/process-batch" \
     -H "Content-Type: application/json" \
     -d '[
       {
         "job_id": "job-1",
         "username": "user1",
         "campaign": "campaign1"
       },
       {
         "job_id": "job-2",
         "username": "user2",
         "campaign": "campaign2"
       }
     ]'"""
LOOKS = {
    "curl http://localhost:8001/memory-stats": "system",
    "curl http://localhost:8001/celery-stats": "active",
    'curl "http://localhost:8001/health"': "status",
    'curl "http://localhost:8001/jobs/active"': "active_jobs",
}
ENDED = ("completed", "failed", "validation_failed", "cancelled")


def deliver_first_jobs(site: Site) -> None:
    """Raises `Failed` unless one job and one batch are delivered, without a key and with nothing prepared."""
    site.compose("--profile", "embedded", "up", "--detach")
    wait(lambda: httpx.get(f"{site.url}/readyz", timeout=30, trust_env=False).status_code == 200, "the API is not ready")
    task_id = ask(site, FIRST_JOB)["task_id"]
    batch_id = ask(site, FIRST_BATCH)["batch_id"]
    wait(
        lambda: ask(site, f'curl "http://localhost:8001/job-status/{task_id}"')["status"] in ENDED, "the first job does not end"
    )
    batch = f'curl "http://localhost:8001/batch-status/{batch_id}"'
    wait(lambda: sum(ask(site, batch)["counts"].get(status, 0) for status in ENDED) == 2, "the first batch does not end")
    for command, member in LOOKS.items():
        if member not in (answer := ask(site, command)):
            raise Failed(f"{command} answers {answer}")
    found = set(site.compose("exec", "-T", "sftp", "find", "sftp", "-type", "f").stdout.split())
    for folder, sku in (("your-job-id", "VASE-1001"), ("job-1", "VASE-1002"), ("job-2", "VASE-1003")):
        if f"sftp/{folder}/{sku}/{sku}.glb" not in found:
            raise Failed(f"the files of {folder} are not at the destination: {sorted(found)}")
    scanned = site.run("ssh-keyscan", "-t", "ed25519", "-p", "2222", site.address("sftp")).stdout
    if site.settings["SFTP_HOST_KEY"] not in scanned:
        raise Failed(f"ssh-keyscan shows another key than the one that is pinned: {scanned}")


def ask(site: Site, command: str) -> dict[str, Any]:
    """The README's command, at this site's port; raises `Failed` when what comes is no JSON object."""
    done = site.run("sh", "-c", command.replace("localhost:8001", f"localhost:{site.settings['API_PORT']}"))
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise Failed(f"{command} answers {done.stdout[:300]!r}") from None
    if not isinstance(answer, dict):
        raise Failed(f"{command} answers {answer}")
    return answer
