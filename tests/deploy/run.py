"""Deployments on a real Docker engine under load: no failed request, no lost and no doubled job.

Refusals first, with nothing to touch; then, while callers submit, poll and send slow requests and jobs run: three deploys,
a release that does not start, a rollback, deploy.sh killed with -9 before and after its point of no return, a worker killed,
and a backup that is restored. In the end every accepted job must have been delivered, once. The control, `docker compose up -d
--force-recreate` under the same load, must fail requests, or this program could not see any.

  python tests/deploy/run.py                 writes deploy.json; exit status 0 only if all of it held
  python tests/deploy/run.py --keep          leaves the site up
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
from sqlalchemy import Engine, make_url, text

from deploy.load import Load
from deploy.site import REPOSITORY, Failed, Site, make_site
from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.entrypoints.embedded.product import make_product
from ncr_upload.entrypoints.embedded.samples import put_objects
from ncr_upload.entrypoints.embedded.studio import Listed, add_job

JOBS = 600
JOBS_END_SECONDS = 180
SKU = "VASE-7001"
GUIDE = REPOSITORY / "PRODUCTION_DEPLOYMENT.md"
PLACEHOLDERS = ("HOST", "PORT", "BACKUP")
RESTORED = """
SELECT job_id, problem_code FROM ncr_jobs WHERE task_id IN (SELECT task_id FROM ncr_events WHERE kind = 'restored')
"""
BROKEN = """FROM {image}
USER root
RUN echo 'raise SystemExit("this release is broken")' >/opt/ncr/src/ncr_upload/entrypoints/api_server.py
USER ncr
"""


@dataclass
class Report:
    """What deploy.json holds."""

    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.wrong.append(otherwise)
            say(f"WRONG: {otherwise}")


def say(line: str) -> None:
    sys.stderr.write(f"[{time.strftime('%H:%M:%S')}] {line}\n")
    sys.stderr.flush()


def refusals(site: Site, report: Report) -> None:
    """Bad input: refused with exit status 2, what is wrong and what next, before anything runs."""
    taken = socket.create_server(("127.0.0.1", int(site.settings["API_PORT"])))
    env = site.folder / ".env"
    whole = env.read_text()

    def without(name: str) -> None:
        env.write_text("\n".join(line for line in whole.splitlines() if not line.startswith(f"{name}=")) + "\n")

    cases: list[tuple[str, Callable[[], object], tuple[str, ...], dict[str, str], str]] = [
        ("no engine", lambda: None, ("deploy",), {"DOCKER_HOST": "unix:///nowhere.sock"}, "no Docker engine answers"),
        ("no .env", env.unlink, ("deploy",), {}, "there is no .env"),
        ("a setting missing", lambda: without("SFTP_HOST"), ("deploy",), {}, "not set in .env: SFTP_HOST"),
        ("a taken port", lambda: None, ("deploy",), {}, f"port {site.settings['API_PORT']} is taken"),
        ("a full disk", lambda: None, ("deploy",), {"DEPLOY_MIN_FREE_MB": "900000000"}, "MB are free"),
        ("no earlier release", lambda: None, ("rollback",), {}, "no earlier release"),
        ("a release that is no tag", lambda: None, ("deploy", "a b"), {}, "cannot be a release"),
        ("no such command", lambda: None, ("explode",), {}, "there is no command 'explode'"),
        ("no such backup", lambda: None, ("restore", "nowhere"), {}, "no release is deployed here"),
    ]
    for name, spoil, arguments, environment, words in cases:
        spoil()
        done = site.deploy(*arguments, expect=None, **environment)
        env.write_text(whole)
        env.chmod(0o600)
        told = words in done.stderr and "next: " in done.stderr
        report.expect(done.returncode == 2 and told, f"{name}: ended with {done.returncode}, saying {done.stderr[-300:]!r}")
    taken.close()
    env.unlink()
    site.deploy("init")
    report.expect(env.stat().st_mode & 0o777 == 0o600, "init writes an .env that others may read")
    report.expect(site.deploy("init", expect=None).returncode == 2, "init overwrites an .env")
    env.write_text(whole)
    report.expect(site.deploy("--help").stdout.startswith("usage:"), "--help shows no usage")
    report.expect(not site.containers("web") and not site.containers("redis"), "a refused deploy started something")


def newcomer(site: Site) -> None:
    """The first README's request, on what `docker compose up` alone has started."""
    site.compose("--profile", "embedded", "up", "--detach")
    client = httpx.Client(base_url=site.url, headers={"X-API-Key": site.settings["API_KEY"]}, timeout=30, trust_env=False)
    wait(lambda: client.get("/readyz").status_code == 200, "the API is not ready")
    job = {"job_id": "your-job-id", "username": "your-username", "campaign": "your-campaign", "row_id": 123}
    task_id = client.post("/process-job", json=job).json()["task_id"]
    wait(lambda: client.get(f"/job-status/{task_id}").json()["status"] == "completed", "the first job is not delivered")
    found = site.compose("exec", "-T", "sftp", "find", "sftp", "-type", "f").stdout.split()
    if "sftp/your-job-id/VASE-1001/VASE-1001.glb" not in found:
        raise Failed(f"the first job's files are not at the destination: {found}")
    if client.get("/jobs/active", headers={"X-API-Key": "wrong"}).status_code != 401:
        raise Failed("a wrong key is let in")
    scanned = site.run("ssh-keyscan", "-t", "ed25519", "-p", "2222", site.address("sftp")).stdout
    if site.settings["SFTP_HOST_KEY"] not in scanned:
        raise Failed(f"ssh-keyscan shows another key than the one that is pinned: {scanned}")


def wait(holds: Callable[[], bool], otherwise: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(httpx.TransportError):
            if holds():
                return
        if time.monotonic() > deadline:
            raise Failed(otherwise)
        time.sleep(0.5)


def place_jobs(site: Site, engine: Engine) -> list[str]:
    """One product, and many jobs that it is listed for."""
    product = make_product("load", SKU, seed=7)
    bucket = {"access_key": site.settings["WASABI_ACCESS_KEY"], "secret_key": site.settings["WASABI_SECRET_KEY"]}
    put_objects({"endpoint": f"http://{site.address('s3')}:9000", "bucket": "studio", **bucket}, product.files)
    listed = [Listed(key, datetime(2026, 11, 1, 10, tzinfo=UTC).replace(tzinfo=None)) for key in product.files]
    job_ids = [f"load-{number:04}" for number in range(JOBS)]
    for job_id in job_ids:
        add_job(engine, job_id, SKU, listed, campaign="deploy")
    return job_ids[::-1]


def open_database(site: Site) -> Engine:
    url = make_url(site.settings["DATABASE_URL"]).set(host=site.address("database"))
    return open_engine(url.render_as_string(hide_password=False), pool_size=2)


class Play:
    """The phases in order, each timed, under one load."""

    def __init__(self, site: Site, load: Load, engine: Engine, report: Report) -> None:
        self.site, self.load, self.engine, self.report = site, load, engine, report
        self.first = ""

    def phase(self, name: str, act: Callable[[], object]) -> None:
        say(name)
        self.load.phase = name
        began, before = time.monotonic(), sum(self.load.requests.values())
        try:
            act()
        except Failed as failed:
            self.report.expect(False, f"{name}: {failed}")
        time.sleep(1.5)
        self.report.phases[name] = {
            "seconds": round(time.monotonic() - began, 1),
            "requests": sum(self.load.requests.values()) - before,
            "failed": len(self.load.failed_in(name)),
        }
        say(f"  {self.report.phases[name]}")
        for failure in self.load.failed_in(name)[:3]:
            say(f"  {failure}")

    def runs(self, release: str) -> None:
        """Raises `Failed` unless it is this release, alone, that runs everywhere."""
        for service, number in (("web", 2), ("worker", 2), ("beat", 1), ("flower", 1)):
            found = self.site.releases(service)
            if found != [release] * number:
                raise Failed(f"{service} runs {found} instead of {number} of {release}")
        journal = self.site.journal()
        if journal["current"] != release or journal["step"]:
            raise Failed(f"the journal says {journal}")

    def deploy(self, release: str) -> None:
        self.site.deploy("deploy", release)
        self.runs(release)

    def deploy_checkout(self) -> None:
        """Without a name: it gets one of its own."""
        self.site.deploy("deploy")
        self.first = self.site.journal()["current"]
        self.runs(self.first)

    def deploy_broken(self) -> None:
        before = {service: self.site.containers(service) for service in ("web", "worker", "beat", "flower", "proxy", "redis")}
        image = self.site.settings["NCR_IMAGE"]
        (self.site.folder / "Dockerfile.broken").write_text(BROKEN.format(image=f"{image}:r3"))
        self.site.run("docker", "build", "-q", "-t", f"{image}:broken", "-f", "Dockerfile.broken", ".")
        done = self.site.deploy("deploy", "broken", "--no-build", expect=1)
        if "was taken back" not in done.stderr or "this release is broken" not in done.stderr:
            raise Failed(f"it does not say what became of it and why: {done.stderr[-500:]}")
        after = {service: self.site.containers(service) for service in before}
        if after != before:
            raise Failed("the old release was touched")
        self.runs("r3")

    def roll_back(self) -> None:
        self.site.deploy("rollback")
        self.runs(self.first)

    def kill_while_starting(self) -> None:
        def started() -> bool:
            return self.site.journal().get("step") == "start" and "r4" in self.site.releases("web")

        self.site.kill_deploy("r4", started)
        if set(self.site.releases("beat")) != {self.first}:
            raise Failed("a killed deploy had gone too far")

    def kill_while_switching(self) -> None:
        """Its beginning also undoes what the first one left."""
        self.site.kill_deploy("r4", lambda: self.site.journal().get("step") == "switch")

    def finish(self) -> None:
        self.site.deploy("deploy", "r4")
        self.runs("r4")
        if "nothing to do" not in self.site.deploy("deploy", "r4", "--no-build").stderr:
            raise Failed("a second deploy of the same release did something")

    def kill_worker(self) -> None:
        """As the kernel would: the container's first process, and with it all others."""
        victim = self.site.containers("worker")[0]
        os.kill(self.site.inspect(victim)["State"]["Pid"], 9)
        deadline = time.monotonic() + 120
        while True:
            state = self.site.inspect(victim)
            if state["RestartCount"] >= 1 and state["State"]["Health"]["Status"] == "healthy":
                return
            if time.monotonic() > deadline:
                raise Failed(f"a killed worker did not come back: {state['State']}")
            time.sleep(1)

    def restore(self) -> None:
        """Half the tasks that have ended are lost and put back; those in flight go on meanwhile."""
        folder = self.site.deploy("backup").stdout.strip()
        with self.engine.begin() as connection:
            lost = connection.execute(text("SELECT task_id FROM ncr_jobs WHERE status = 'completed' AND id % 2 = 0")).scalars()
            for task_id in list(lost):
                for table in ("ncr_jobs", "ncr_events", "ncr_files"):
                    connection.execute(text(f"DELETE FROM {table} WHERE task_id = :t"), {"t": task_id})
        told = self.site.deploy("restore", folder, "--yes").stdout
        self.report.facts["restore"] = told.strip()
        with self.engine.connect() as connection:
            count = connection.execute(text("SELECT count(*) FROM ncr_events WHERE kind = 'restored'")).scalar_one()
        self.report.facts["live_tasks_restored"] = count

    def watch(self) -> None:
        """The commands that only look."""
        self.site.deploy("health")
        seen = json.loads(self.site.deploy("monitor", "--once", "--json").stdout)
        if seen["release"] != "r4" or len(seen["containers"]) < 10 or "status" not in seen["health"]:
            raise Failed(f"monitor says {seen}")
        for command in (("monitor",), ("logs", "worker")):  # until interrupted
            if not self.site.run("timeout", "15", "./deploy.sh", *command, expect=None).stdout.strip():
                raise Failed(f"deploy.sh {' '.join(command)} shows nothing")
        self.site.compose("run", "--rm", "--no-deps", "migrate", "doctor")
        self.site.compose("up", "--detach", "--no-deps", "--no-build", "worker")
        self.site.deploy("deploy", "--dry-run")
        self.runs("r4")
        self.site.deploy("cleanup")


def await_jobs(engine: Engine, load: Load, report: Report) -> None:
    """Every accepted job has ended as delivered, once; and nothing else was.

    One that was in flight in the backup, delivered since and then lost from the ledger counts too: it is found out by the
    studio's row, and says so (`not_awaiting_upload`); that it was delivered is seen in its folder and its upload_count.
    """
    deadline = time.monotonic() + JOBS_END_SECONDS
    while True:
        with engine.connect() as connection:
            rows = connection.execute(text("SELECT job_id, task_id, status, message FROM ncr_jobs")).all()
            counts = connection.execute(
                text("SELECT job_id, upload_count FROM job_details WHERE campaign = 'deploy' AND upload_count > 0")
            ).all()
            restored = connection.execute(text(RESTORED)).all()
            told = connection.execute(text("SELECT count(*) FROM email WHERE sku = :s"), {"s": SKU}).scalar_one()
        if all(row.status in ("completed", "failed", "validation_failed", "cancelled") for row in rows):
            break
        if time.monotonic() > deadline:
            break
        time.sleep(1)
    delivered_before = {row.job_id for row in restored if row.problem_code == "not_awaiting_upload"}
    completed = {row.job_id for row in rows if row.status == "completed"} | delivered_before
    lost = [
        f"{job_id}: {next((row.status for row in rows if row.job_id == job_id), 'gone')}"
        for job_id in load.accepted.keys() - completed
    ]
    doubled = [row.job_id for row in counts if row.upload_count != 1]
    report.facts |= {"accepted": len(load.accepted), "delivered": len(completed), "lost": lost, "doubled": doubled}
    report.facts["restored_after_delivery"] = len(delivered_before)
    report.expect(not lost, f"{len(lost)} accepted jobs were not delivered: {lost[:5]}")
    report.expect(
        not doubled and told == len(counts), f"{len(doubled)} jobs were recorded twice; {told} mails for {len(counts)}"
    )
    report.expect(len(rows) == len({row.job_id for row in rows}), "a job has two tasks")


def check_guide(site: Site, report: Report) -> None:
    """Every command of the guide is among those that were run."""
    ran = re.findall(r"^\$ (?:timeout \d+ )?(.*)$", site.log.read_text(), re.MULTILINE)
    for block in re.findall(r"^```bash\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL):
        for command in block.splitlines():
            words = [r"\S+" if word in PLACEHOLDERS else re.escape(word) for word in re.split(r"(\W)", command)]
            found = any(re.fullmatch("".join(words), line) for line in ran)
            report.expect(found, f"{GUIDE.name} names a command that was not run: {command}")


def await_folders(site: Site, report: Report) -> None:
    """What the partner sees: one whole folder for each delivered job."""
    files = site.compose(
        "exec", "-T", "sftp", "find", "sftp", "-path", "*/load-*", "-type", "f", "-not", "-path", "*/.ncr-staging/*"
    )
    by_job: dict[str, int] = {}
    for path in files.stdout.split():
        job_id = path.split("/")[1]
        by_job[job_id] = by_job.get(job_id, 0) + 1
    expected = len(make_product("load", SKU, seed=7).delivered)
    partial = [job_id for job_id, count in by_job.items() if count != expected]
    report.expect(not partial, f"{len(partial)} delivered folders are not whole: {partial[:5]}")
    report.expect(
        len(by_job) == report.facts["delivered"], f"{len(by_job)} folders for {report.facts['delivered']} delivered jobs"
    )


def play(site: Site, report: Report) -> None:
    say("refusals")
    refusals(site, report)
    say("building")
    began = time.monotonic()
    site.compose("build", "--quiet", "web", "s3", "database")
    report.facts["build_seconds"] = round(time.monotonic() - began, 1)
    say("a newcomer's first job")
    began = time.monotonic()
    newcomer(site)
    report.facts["newcomer_seconds"] = round(time.monotonic() - began, 1)
    say("deploy r1 over what was started by hand")
    began = time.monotonic()
    site.deploy("deploy", "r1")
    report.facts["first_deploy_seconds"] = round(time.monotonic() - began, 1)
    report.facts["image_mb"] = round(
        int(site.run("docker", "image", "inspect", "-f", "{{.Size}}", f"{site.settings['NCR_IMAGE']}:r1").stdout) / 1e6
    )
    engine = open_database(site)
    load = Load(int(site.settings["API_PORT"]), site.settings["API_KEY"], place_jobs(site, engine))
    load.start()
    stage = Play(site, load, engine, report)
    try:
        stage.phase("deploy 1", stage.deploy_checkout)
        stage.phase("deploy 2", lambda: stage.deploy("r3"))
        stage.phase("a broken release", stage.deploy_broken)
        stage.phase("rollback", stage.roll_back)
        stage.phase("deploy.sh killed while it starts", stage.kill_while_starting)
        stage.phase("deploy.sh killed while it switches", stage.kill_while_switching)
        stage.phase("deploy 3, finishing what was killed", stage.finish)
        stage.phase("a worker killed", stage.kill_worker)
        stage.phase("backup, loss and restore", stage.restore)
        stage.phase("health, monitor, dry run, cleanup", stage.watch)
        report.facts |= {"failed_requests": len(load.failures), "answers_of_an_overloaded_database": load.busy}
        report.expect(load.busy * 100 <= sum(load.requests.values()), f"{load.busy} requests met an overloaded database")
        report.expect(not load.failures, f"{len(load.failures)} requests failed: {load.failures[:3]}")
        stage.phase(
            "control: up --force-recreate", lambda: site.compose("up", "-d", "--force-recreate", "--no-deps", "web", "proxy")
        )
        control = len(load.failed_in("control: up --force-recreate"))
        report.expect(control > 0, "the control failed no request: this load would not have seen one")
    finally:
        load.stop()
    report.facts |= {"control_failed_requests": control, "requests": dict(load.requests)}
    await_jobs(engine, load, report)
    await_folders(site, report)
    check_guide(site, report)
    engine.dispose()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("deploy.json"))
    parser.add_argument("--keep", action="store_true", help="leave the site up")
    arguments = parser.parse_args()
    report, began = Report(), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="ncr-deploy-"))
    log = arguments.json.absolute().with_suffix(".log")
    log.unlink(missing_ok=True)
    site = make_site(folder / "ncr", log)
    try:
        play(site, report)
    except Failed as failed:
        report.expect(False, str(failed))
    finally:
        if not arguments.keep:
            site.remove()
    result = {
        "ok": not report.wrong,
        "wrong": report.wrong,
        "took_seconds": round(time.monotonic() - began),
        **report.facts,
        "phases": report.phases,
    }
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    outcome = "everything held" if not report.wrong else "NOT everything held"
    say(f"{outcome}: {arguments.json}, {result['took_seconds']} s; every command is in {log}")
    return 0 if not report.wrong else 1


if __name__ == "__main__":
    raise SystemExit(main())
