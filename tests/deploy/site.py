"""A host with the service in containers, made anew: a copy of this checkout, its own project, ports and secrets."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.report import Failed

REPOSITORY = Path(__file__).parents[2]
SETTINGS = {
    "NCR_DRAIN_SECONDS": "4",
    "NCR_WORKER_CPUS": "1",
    "CELERY_WORKER_CONCURRENCY": "2",
    "MAX_MEMORY_USAGE_PERCENT": "97",
    "RETRY_BASE_SECONDS": "1",
    "NCR_BIND": "127.0.0.1",
}
PATIENT = {"DEPLOY_HEALTHY_SECONDS": "240", "DEPLOY_MIN_FREE_MB": "500"}


@dataclass
class Site:
    """`folder` is the checkout's copy; everything runs in the compose project `project`."""

    folder: Path
    project: str
    log: Path
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.settings['API_PORT']}"

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("NCR_", "COMPOSE_"))}
        return kept | PATIENT | {"COMPOSE_PROGRESS": "quiet"}

    def deploy(self, *arguments: str, expect: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run deploy.sh; raises `Failed` when it ends otherwise than expected."""
        return self.run("./deploy.sh", *arguments, expect=expect, environment=self.environment | environment)

    def compose(self, *arguments: str, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
        return self.run("docker", "compose", *arguments, expect=expect)

    def run(
        self, *command: str, expect: int | None = 0, environment: dict[str, str] | None = None, keep: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Raises `Failed` when it ends otherwise than expected. What it says goes to the log if `keep`."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment or self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n{done.stdout if keep else ''}{done.stderr}-> {done.returncode}\n")
        if expect is not None and done.returncode != expect:
            raise Failed(
                f"{' '.join(command)} ended with {done.returncode}, not {expect}: {(done.stdout + done.stderr)[-1500:]}"
            )
        return done

    def watch(self, *command: str, until: str, seconds: float = 60) -> None:
        """Run what shows things until it is interrupted, until it has shown `until`; raises `Failed` when it does not."""
        with tempfile.TemporaryFile("w+") as shown:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=shown,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            deadline = time.monotonic() + seconds
            text = ""
            while until not in text and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
                shown.seek(0)
                text = shown.read()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(command)}\n{text[-2000:]}-> stopped\n")
        if until not in text:
            raise Failed(f"{' '.join(command)} shows nothing of {until}: {text[-500:]}")

    def kill_deploy(self, release: str, when: Callable[[], bool], seconds: float = 240) -> None:
        """Start a deploy and kill -9 it once `when` holds. Raises `Failed` when that never is."""
        with self.log.open("a") as log:
            process = subprocess.Popen(
                ["./deploy.sh", "deploy", release],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + seconds
        try:
            while not when():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise Failed(f"deploy {release} was over before it could be killed")
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def journal(self) -> dict[str, str]:
        path = self.folder / "var/deploy/journal"
        lines = path.read_text().splitlines() if path.exists() else []
        return dict(line.split("=", 1) for line in lines)

    def containers(self, service: str) -> list[str]:
        wanted = [f"label=com.docker.compose.project={self.project}", f"label=com.docker.compose.service={service}"]
        found = self.run("docker", "ps", "-q", "--no-trunc", *(word for each in wanted for word in ("--filter", each)))
        return found.stdout.split()

    def everything(self) -> set[str]:
        """Every container that runs, with when it was started."""
        found = self.run("docker", "ps", "-q", "--filter", f"label=com.docker.compose.project={self.project}").stdout.split()
        shown = self.run("docker", "inspect", "-f", "{{.Id}} {{.State.StartedAt}}", *found)
        return set(shown.stdout.splitlines())

    def inspect(self, container: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("docker", "inspect", container, keep=False).stdout)[0]
        return found

    def releases(self, service: str) -> list[str]:
        return [self.inspect(each)["Config"]["Image"].rsplit(":", 1)[1] for each in self.containers(service)]

    def address(self, service: str) -> str:
        """Of its first container, as this host reaches it."""
        networks = self.inspect(self.containers(service)[0])["NetworkSettings"]["Networks"]
        return str(networks[f"{self.project}_inner"]["IPAddress"])

    def write_env(self, **settings: str) -> None:
        path = self.folder / ".env"
        lines = [line for line in path.read_text().splitlines() if line.partition("=")[0] not in settings]
        path.write_text("\n".join([*lines, *(f"{name}={value}" for name, value in settings.items())]) + "\n")
        self.settings = dict(re.findall(r"^(\w+)=(.*)$", path.read_text(), re.MULTILINE))

    def remove(self) -> None:
        """Everything of the project: containers, volumes, networks, images of its releases."""
        if (self.folder / ".env").exists():
            self.compose("--profile", "embedded", "down", "--volumes", "--remove-orphans", "--timeout", "1", expect=None)
        images = self.run("docker", "image", "ls", f"ncr-{self.project}", "--format", "{{.Repository}}:{{.Tag}}").stdout.split()
        if images:
            self.run("docker", "image", "rm", "--force", *images, expect=None)
        shutil.rmtree(self.folder, ignore_errors=True)


def copy_checkout(to: Path) -> None:
    """What git would commit of this checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        source = REPOSITORY / name
        if source.is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / name)


def free_port(taken: set[int]) -> int:
    while True:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port: int = server.getsockname()[1]
        if port not in taken:
            taken.add(port)
            return port


def make_site(folder: Path, log: Path) -> Site:
    """The copy with a .env for the embedded profile; nothing runs yet."""
    project = f"ncr{os.getpid()}"
    site = Site(folder, project, log)
    copy_checkout(folder)
    site.deploy("init", "--embedded")
    taken: set[int] = set()
    ports = {name: str(free_port(taken)) for name in ("API_PORT", "REDIS_PORT", "FLOWER_PORT")}
    site.write_env(COMPOSE_PROJECT_NAME=project, NCR_IMAGE=f"ncr-{project}", **ports, **SETTINGS)
    return site
