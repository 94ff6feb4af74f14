"""The shell scripts, and the files that build and run the containers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from parts import require

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / "deploy.sh", ROOT / "docker/ncr", *sorted(ROOT.glob("docker/*.sh")), *sorted(ROOT.glob("scripts/*.sh"))]
PARTS_OF_DEPLOY = sorted(ROOT.glob("scripts/deploy/*.sh"))
FILES = [ROOT / "Dockerfile", ROOT / "docker-compose.yml", ROOT / "env_sample", *SCRIPTS, *PARTS_OF_DEPLOY]


@pytest.mark.real
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    """With what it sources."""
    command = [require("shellcheck"), "--external-sources", "--check-sourced", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_deploy_sh_sources_each_of_its_parts() -> None:
    sourced = re.findall(r"^\. (\S+)$", (ROOT / "deploy.sh").read_text(), re.MULTILINE)
    assert sorted(sourced) == [str(part.relative_to(ROOT)) for part in PARTS_OF_DEPLOY]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_names_a_package_registry_or_holds_a_secret(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"--(extra-)?index-url|registry=|pypi\.|npmjs\.", text)
    assert not re.search(
        r"^\w*(PASSWORD|SECRET|_KEY|BASIC_AUTH)=\S", text.replace("VALIDATOR_API_KEY_HEADER=X-API-Key", ""), re.M
    )


def test_deploy_sh_without_a_command_shows_how_it_is_used() -> None:
    done = subprocess.run([ROOT / "deploy.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ./deploy.sh COMMAND")


def test_a_container_whose_program_shows_no_life_is_not_healthy(tmp_path: Path) -> None:
    probe = ["python3", "-IS", str(ROOT / "docker/probe.py"), "beat"]
    alive = tmp_path / "alive"
    ask = lambda: subprocess.run(probe, env={"NCR_ALIVE_FILE": str(alive), "PATH": "/usr/bin:/bin:/usr/local/bin"}, check=False)  # noqa: E731
    assert ask().returncode == 1
    alive.touch()
    assert ask().returncode == 0
    import os

    os.utime(alive, (1, 1))
    assert ask().returncode == 1


def test_a_health_check_loads_no_http_library_and_nothing_of_ours() -> None:
    command = ["python3", "-X", "importtime", "-IS", str(ROOT / "docker/probe.py"), "flower"]
    done = subprocess.run(command, env={"FLOWER_PORT": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    loaded = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "socket" in loaded
    assert not {"http.client", "urllib.request", "email", "ssl", "csv", "ncr_upload"} & loaded
