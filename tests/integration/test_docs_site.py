"""The documentation's site is built from the repository, without a warning, and needs nothing from elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "var/docs/site"
ZENSICAL = Path(sys.executable).with_name("zensical")


@pytest.fixture(scope="module")
def site() -> Path:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/docs_site.py")], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return SITE


def test_every_page_of_the_documents_is_in_the_site(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    pages |= {Path(name) for name in ("index.html", "api.html", "settings.html", "security.html", "contributing.html")}
    assert {page for page in pages if not (site / page).is_file()} == set()


def test_every_page_is_in_the_navigation_once(site: Path) -> None:
    listed = re.findall(r'"([\w./-]+\.md)"', site.with_name("zensical.toml").read_text())
    source = site.with_name("source")
    assert sorted(listed) == sorted(path.relative_to(source).as_posix() for path in source.rglob("*.md"))


def test_the_reference_has_every_endpoint_with_its_codes(site: Path) -> None:
    text = (site / "api.html").read_text()
    for endpoint in ("POST /process-job", "GET /job-status/{task_id}", "POST /process-batch", "GET /health"):
        assert endpoint in text
    assert {"already_running", "memory_pressure", "idempotency_key_reused"} <= set(re.findall(r"<code>(\w+)</code>", text))


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    text = "".join(path.read_text() for path in site.rglob("*.html"))
    assert re.findall(r'<(?:script|img)[^>]*src="https?://[^"]*"|<link[^>]*href="https?://[^"]*"', text) == []


def test_a_link_to_a_page_that_is_not_there_ends_the_build(site: Path, tmp_path: Path) -> None:
    shutil.copytree(site.with_name("source"), tmp_path / "source")
    shutil.copy(site.with_name("zensical.toml"), tmp_path)
    with (tmp_path / "source/glossary.md").open("a") as page:
        page.write("\n[a page](nowhere.md)\n")
    command = [ZENSICAL, "build", "--strict", "--config-file", tmp_path / "zensical.toml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "page does not exist" in done.stdout + done.stderr
