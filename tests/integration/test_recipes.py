"""The recipes of CONTRIBUTING.md do what they say: each is carried out on a copy of the repository, with its own tests."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    (ROOT / "docs/destination_kind.md").read_text(),
    (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Recipes\n")[2],
]
COPIED = ("src", "tests", "benchmarks", "scripts", "pyproject.toml", "README.md", "env_sample", "docker-compose.yml")
TITLES = {title: page for page in reversed(PAGES) for title in re.findall(r"^### (.+)$", page, re.MULTILINE)}


def read_recipe(title: str) -> str:
    return TITLES[title].partition(f"\n### {title}\n")[2].partition("\n### ")[0]


def blocks(recipe: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", recipe, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(text) for _, text in found]


def apply(change: str, root: Path) -> None:
    """Make one change. Its lines without a mark, and those with a minus, must be in the file once, one after the other."""
    head, *lines = change.rstrip("\n").split("\n")
    path = root / head.removeprefix("# ")
    before = [line[1:].strip() for line in lines if not line.startswith("+")]
    text = path.read_text().split("\n")
    places = [at for at in range(len(text)) if [line.strip() for line in text[at : at + len(before)]] == before]
    assert len(places) == 1, f"{head}: {before} is there {len(places)} times"
    at = places[0]
    shown = next(line[1:] for line in lines if not line.startswith("+"))
    shift = len(text[at]) - len(text[at].lstrip()) - (len(shown) - len(shown.lstrip()))
    after, taken = [], 0
    for line in lines:
        if line.startswith("+"):
            after.append(" " * shift + line[1:] if line[1:] else "")
        else:
            after += [] if line.startswith("-") else [text[at + taken]]
            taken += 1
    path.write_text("\n".join([*text[:at], *after, *text[at + len(before) :]]))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_there_is_a_recipe_for_what_is_asked_most() -> None:
    assert {"Change a layout rule in ten minutes", "Add an endpoint", "Add a kind of destination"} == set(TITLES)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("title", TITLES)
def test_a_recipe_works_as_written(copy: Path, title: str) -> None:
    recipe = read_recipe(title)
    changes = blocks(recipe, "diff")
    (command,) = blocks(recipe, "bash")
    tests = shlex.split(command)
    assert tests[0] == ".venv/bin/python"
    tests = [sys.executable, *tests[1:], "-p", "no:cacheprovider", "-n0"]
    for change in [change for change in changes if change.startswith("# tests/")]:
        apply(change, copy)
    assert run([*tests, "--exitfirst"], copy).returncode != 0, "its tests pass without the change"
    for new in blocks(recipe, "python"):
        head, _, text = new.partition("\n")
        (copy / head.removeprefix("# ")).write_text(text)
    for change in [change for change in changes if not change.startswith("# tests/")]:
        apply(change, copy)
    done = run(tests, copy)
    assert done.returncode == 0, done.stdout[-3000:]
    for check in (["check", "src", "tests"], ["format", "--check", "src", "tests"]):
        done = run([str(Path(sys.executable).with_name("ruff")), *check], copy)
        assert done.returncode == 0, done.stdout + done.stderr
