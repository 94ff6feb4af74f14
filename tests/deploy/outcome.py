"""What became of every accepted job: in the ledger, in the studio's tables, at the partner's. And whether the guide holds."""

from __future__ import annotations

import re
import shutil
import time
from typing import Any

from sqlalchemy import Connection, Engine, text

from deploy.contained import OURS
from deploy.load import Load
from deploy.newcomer import ENDED, ask
from deploy.report import Failed, Report, wait
from deploy.site import REPOSITORY, Site

JOBS_END_SECONDS = 120
SWEEPS_SECONDS = 7
SKU = "VASE-7001"
GUIDE = REPOSITORY / "PRODUCTION_DEPLOYMENT.md"
PLACEHOLDERS = ("HOST", "PORT", "BACKUP")
RESTORED = "SELECT job_id, problem_code FROM ncr_jobs WHERE task_id IN (SELECT task_id FROM ncr_events WHERE kind = 'restored')"
TABLES = "SELECT tablename FROM pg_tables WHERE tablename LIKE 'ncr\\_%'"
UPLOADS = "SELECT job_id, upload_count FROM job_details WHERE upload_count > 0"
SPARE_JOB = "load-spare"


def await_jobs(engine: Engine, load: Load, report: Report) -> None:
    """Every accepted job has ended as delivered, once; and nothing else was.

    One that was in flight in the backup, delivered since and then lost from the ledger counts too: it is found out by the
    studio's row, and says so (`not_awaiting_upload`); that it was delivered is seen in its folder and its upload_count.
    """
    deadline = time.monotonic() + JOBS_END_SECONDS
    while True:
        with engine.connect() as connection:
            rows = connection.execute(text("SELECT job_id, task_id, status, message FROM ncr_jobs")).all()
            counts = connection.execute(text(f"{UPLOADS} AND campaign = 'deploy'")).all()
            restored = connection.execute(text(RESTORED)).all()
            told = connection.execute(text("SELECT count(*) FROM email WHERE sku = :s"), {"s": SKU}).scalar_one()
        if all(row.status in ENDED for row in rows) or time.monotonic() > deadline:
            break
        time.sleep(1)
    delivered_before = {row.job_id for row in restored if row.problem_code == "not_awaiting_upload"}
    completed = {row.job_id for row in rows if row.status == "completed"} | delivered_before
    lost = [
        f"{job_id}: {next((row.status for row in rows if row.job_id == job_id), 'gone')}"
        for job_id in load.accepted.keys() - completed
    ]
    doubled = [row.job_id for row in counts if row.upload_count != 1]
    report.facts |= {"accepted": len(load.accepted), "delivered": len(counts), "lost": lost, "doubled": doubled}
    report.facts["restored_after_delivery"] = len(delivered_before)
    report.expect(not lost, f"{len(lost)} accepted jobs were not delivered: {lost[:5]}")
    report.expect(
        not doubled and told == len(counts), f"{len(doubled)} jobs were recorded twice; {told} mails for {len(counts)}"
    )
    report.expect(len(rows) == len({row.job_id for row in rows}), "a job has two tasks")


def check_folders(site: Site, report: Report, files_each: int) -> None:
    """What the partner sees: one whole folder for each delivered job."""
    files = site.compose(
        "exec", "-T", "sftp", "find", "sftp", "-path", "*/load-*", "-type", "f", "-not", "-path", "*/.ncr-staging/*"
    )
    by_job: dict[str, int] = {}
    for path in files.stdout.split():
        job_id = path.split("/")[1]
        by_job[job_id] = by_job.get(job_id, 0) + 1
    partial = [job_id for job_id, count in by_job.items() if count != files_each]
    report.expect(not partial, f"{len(partial)} delivered folders are not whole: {partial[:5]}")
    report.expect(
        len(by_job) == report.facts["delivered"], f"{len(by_job)} folders for {report.facts['delivered']} delivered jobs"
    )


def lose_tables(site: Site, engine: Engine) -> None:
    """Disaster: workers stopped, the service's own tables gone, restored from the backup, deployed. Raises `Failed` unless
    every task is back as it was and nothing was delivered again."""
    folder = site.deploy("backup").stdout.strip()
    site.compose("stop", "worker")
    with engine.begin() as connection:
        before = _recorded(connection)
        for table in connection.execute(text(TABLES)).scalars().all():
            connection.execute(text(f'DROP TABLE "{table}" CASCADE'))
    site.deploy("restore", folder, "--yes")
    site.deploy("deploy", "r4", "--no-build")
    time.sleep(SWEEPS_SECONDS)
    with engine.connect() as connection:
        after = _recorded(connection)
    if after != before:
        raise Failed(f"restored is not what was lost: {set(map(str, before)) ^ set(map(str, after))}")


def lose_host(site: Site) -> None:
    """Disaster: a new host, with the checkout and `.env` alone. Raises `Failed` unless a new job is delivered there."""
    ours = [each for service in (*OURS, "proxy", "redis") for each in site.containers(service)]
    site.run("docker", "rm", "-f", "-v", *ours)
    site.run("docker", "volume", "rm", f"{site.project}_redis", f"{site.project}_work", expect=None)
    shutil.rmtree(site.folder / "var")
    site.deploy("deploy", "r4", "--no-build")
    key = site.settings["API_KEY"]
    job = f'{{"job_id": "{SPARE_JOB}", "username": "load", "campaign": "spare"}}'
    header = f"-H 'X-API-Key: {key}'"
    post = f"curl {header} -H 'Content-Type: application/json' -d '{job}' http://localhost:8001/process-job"
    task_id = ask(site, post)["task_id"]
    status = f"curl {header} http://localhost:8001/job-status/{task_id}"
    wait(lambda: ask(site, status)["status"] == "completed", "on a new host a new job is not delivered", 60)


def _recorded(connection: Connection) -> tuple[Any, ...]:
    tasks = connection.execute(text("SELECT task_id, job_id, status FROM ncr_jobs ORDER BY task_id")).all()
    uploads = connection.execute(text(f"{UPLOADS} ORDER BY job_id")).all()
    return (*tasks, *uploads, connection.execute(text("SELECT count(*) FROM email")).scalar_one())


def check_guide(site: Site, report: Report) -> None:
    """Every command of the guide, in a block or within a sentence, is among those that were run."""
    ran = re.findall(r"^\$ (.*)$", site.log.read_text(), re.MULTILINE)
    guide = GUIDE.read_text()
    commands = [line for block in re.findall(r"^```bash\n(.*?)^```", guide, re.M | re.S) for line in block.splitlines()]
    commands += re.findall(r"`((?:\./deploy\.sh|docker|curl|grep|ssh-keyscan) [^`]+)`", guide)
    report.expect(len(commands) > 15, f"{GUIDE.name} names only {len(commands)} commands: is it read rightly?")
    for command in commands:
        words = [r"\S+" if word in PLACEHOLDERS else re.escape(word) for word in re.split(r"(\W)", command)]
        found = any(re.fullmatch("".join(words), line) for line in ran)
        report.expect(found, f"{GUIDE.name} names a command that was not run: {command}")
