"""The phases of a run, in order, each timed, under one load."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

from sqlalchemy import Engine, text

from deploy.bad_input import refuse_while_running
from deploy.load import POLLED, Load
from deploy.report import Failed, Report, say, wait
from deploy.site import Site

SETTLE_SECONDS = 1.0
BROKEN = """FROM {image}
USER root
RUN echo 'raise SystemExit("this release is broken")' >/opt/ncr/src/ncr_upload/entrypoints/api_server.py
USER ncr
"""


class Phases:
    """`first` is the release that the checkout was given as its name; the later ones are r3 and r4."""

    def __init__(self, site: Site, load: Load, engine: Engine, report: Report) -> None:
        self.site, self.load, self.engine, self.report = site, load, engine, report
        self.first = ""

    def run(self) -> None:
        self.phase("deploy 1", self.deploy_checkout)
        self.phase("deploy 2", lambda: self.deploy("r3"))
        self.phase("a broken release", self.deploy_broken)
        self.phase("rollback", self.roll_back)
        for moment in ("preflight", "backup", "start", "switch", "beat"):
            self.phase(f"deploy.sh killed at {moment}", lambda moment=moment: self.kill_deploy(moment))  # type: ignore[misc]
        self.phase("deploy 3, finishing what was killed", self.finish)
        self.phase("a worker killed", self.kill_worker)
        self.phase("backup, loss and restore", self.restore)
        self.phase("Redis and its volume lost", self.lose_redis)
        self.phase("bad input", lambda: refuse_while_running(self.site, self.report))
        self.phase("health, monitor, dry run, cleanup", self.watch)

    def phase(self, name: str, act: Callable[[], object]) -> None:
        say(name)
        self.load.phase = name
        began, before = time.monotonic(), sum(self.load.requests.values())
        try:
            act()
        except Failed as failed:
            self.report.expect(False, f"{name}: {failed}")
        took = time.monotonic() - began
        time.sleep(SETTLE_SECONDS)
        self.report.phases[name] = {
            "seconds": round(took, 1),
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
        """Over what was started by hand, as in production: with a key. Without a name: it gets one of its own."""
        self.site.write_env(API_ANONYMOUS="loopback")
        self.site.deploy("deploy")
        self.first = self.site.journal()["current"]
        self.runs(self.first)
        command = ("curl", "-so", "/dev/null", "-w", "%{http_code}", "-H", "X-API-Key: wrong", f"{self.site.url}/jobs/active")
        if (answer := self.site.run(*command).stdout) != "401":
            raise Failed(f"a wrong key is answered {answer}")

    def deploy_broken(self) -> None:
        before = self.site.everything()
        image = self.site.settings["NCR_IMAGE"]
        (self.site.folder / "Dockerfile.broken").write_text(BROKEN.format(image=f"{image}:r3"))
        self.site.run("docker", "build", "-q", "-t", f"{image}:broken", "-f", "Dockerfile.broken", ".")
        done = self.site.deploy("deploy", "broken", "--no-build", expect=1)
        if "was taken back" not in done.stderr or "this release is broken" not in done.stderr:
            raise Failed(f"it does not say what became of it and why: {done.stderr[-500:]}")
        if self.site.everything() != before:
            raise Failed("the old release was touched")
        self.runs("r3")

    def roll_back(self) -> None:
        self.site.deploy("rollback")
        self.runs(self.first)

    def kill_deploy(self, moment: str) -> None:
        """A deploy of r4, killed with -9. It first undoes or finishes what the one before had left."""
        site = self.site
        reached: dict[str, Callable[[], bool]] = {
            "preflight": lambda: bool(site.containers("migrate")) and self.is_locked(),
            "backup": lambda: (site.folder / "var/backups/.partial").exists(),
            "start": lambda: site.journal().get("step") == "start" and "r4" in site.releases("web"),
            "switch": lambda: site.journal().get("step") == "switch",
            "beat": lambda: "r4" in site.releases("beat"),
        }
        site.kill_deploy("r4", reached[moment])
        old = {each: site.releases(each).count(self.first) for each in ("web", "worker", "beat")}
        if moment in ("preflight", "backup", "start") and old != {"web": 2, "worker": 2, "beat": 1}:
            raise Failed(f"a deploy killed at {moment} had gone too far: of the old release run {old}")

    def is_locked(self) -> bool:
        """Raises `Failed` unless a second deploy.sh is refused."""
        done = self.site.deploy("cleanup", expect=2)
        if "another deploy.sh is at work here" not in done.stderr:
            raise Failed(f"a second deploy.sh is told {done.stderr!r}")
        return True

    def finish(self) -> None:
        self.site.deploy("deploy", "r4")
        self.runs("r4")
        if "nothing to do" not in self.site.deploy("deploy", "r4", "--no-build").stderr:
            raise Failed("a second deploy of the same release did something")

    def kill_worker(self) -> None:
        """As the kernel would: the container's first process, and with it all others."""
        victim = self.site.containers("worker")[0]
        os.kill(self.site.inspect(victim)["State"]["Pid"], 9)

        def is_back() -> bool:
            state = self.site.inspect(victim)
            return bool(state["RestartCount"] >= 1 and state["State"]["Health"]["Status"] == "healthy")

        wait(is_back, "a killed worker did not come back", 120)

    def lose_redis(self) -> None:
        """As the guide's table has it: `deploy` starts it, empty. One that is killed then takes nothing back: all of it ran."""
        serving = self.site.containers("web")
        self.site.run("docker", "rm", "-f", "-v", *self.site.containers("redis"))
        self.site.run("docker", "volume", "rm", f"{self.site.project}_redis")
        self.site.kill_deploy("r4", lambda: self.site.journal().get("step") == "start")
        self.site.deploy("deploy", "r4", "--no-build")
        self.runs("r4")
        if self.site.containers("web") != serving:
            raise Failed("web containers that had nothing to do with it were replaced")
        if not self.site.containers("redis"):
            raise Failed("deploy did not start Redis again")

    def restore(self) -> None:
        """Half the tasks that have ended are lost and put back, but for those that callers ask for just then: until a task
        is put back, nobody knows it. Those in flight go on meanwhile."""
        with self.engine.connect() as connection:
            saved = connection.execute(text("SELECT max(id) FROM ncr_jobs")).scalar_one() - 2 * POLLED
        folder = self.site.deploy("backup").stdout.strip()
        with self.engine.begin() as connection:
            ended = "SELECT task_id FROM ncr_jobs WHERE status = 'completed' AND id % 2 = 0 AND id <= :saved"
            for task_id in connection.execute(text(ended), {"saved": saved}).scalars().all():
                for table in ("ncr_jobs", "ncr_events", "ncr_files"):
                    connection.execute(text(f"DELETE FROM {table} WHERE task_id = :t"), {"t": task_id})
        told = self.site.deploy("restore", folder, "--yes").stdout
        self.report.facts["restore"] = told.strip()
        with self.engine.connect() as connection:
            count = connection.execute(text("SELECT count(*) FROM ncr_events WHERE kind = 'restored'")).scalar_one()
        self.report.facts["live_tasks_restored"] = count

    def watch(self) -> None:
        """The commands that only look, and those of the guide that nothing else has run."""
        self.site.deploy("health")
        seen = json.loads(self.site.deploy("monitor", "--once", "--json").stdout)
        if seen["release"] != "r4" or len(seen["containers"]) < 10 or "status" not in seen["health"]:
            raise Failed(f"monitor says {seen}")
        self.site.watch("./deploy.sh", "monitor", until="health")
        for service in ("web", "worker", "redis", "beat"):
            self.site.watch("./deploy.sh", "logs", service, until=f"{service}-")
        self.site.compose("run", "--rm", "--no-deps", "migrate", "doctor")
        for service in ("worker", "redis"):
            extra = ("--no-build",) if service == "worker" else ()
            self.site.compose("up", "--detach", "--no-deps", *extra, service)
        self.site.deploy("deploy", "--dry-run")
        self.runs("r4")
        self.site.deploy("cleanup")
