"""A short run of `make chaos`, and that its judge is awake: with a saboteur at work the same run must fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fault_table import fault
from parts import require

SECONDS = 100
RUN = Path(__file__).with_name("run.py")

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


def run(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    for part in ("rclone", "sshd", "postgres"):
        require(part)
    report = folder / "chaos.json"
    done = subprocess.run(
        [sys.executable, str(RUN), "--json", str(report), *options], cwd=folder, capture_output=True, text=True, check=False
    )
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    return done, json.loads(report.read_text())


@fault(
    "Everything: faults at random, one to three at once",
    injector="tests/chaos: signals, crash points, fault proxies, a small disk, FLUSHALL, locks",
    invariants="LOPSKR",
    outcome="every job ends as it must, once, and nothing stays behind",
)
def test_under_faults_nothing_is_lost_doubled_half_visible_stuck_or_left_behind(tmp_path: Path) -> None:
    done, report = run(tmp_path, "--databases", "sqlite,postgresql", "--seconds", str(SECONDS))
    counts = {name: report[name] for name in ("lost", "duplicated", "partially_visible", "stuck", "leaked", "previous_lost")}
    assert (done.returncode, set(counts.values())) == (0, {0}), done.stdout[-8000:]
    assert done.stdout.startswith(f"seed {report['seed']}")
    assert report["trials"] >= 2
    assert set(report["databases"]) == {"sqlite", "postgresql"}
    assert report["outcomes"].get("completed", 0) > 0
    assert sum(report["faults"].values()) > 0
    assert min(report["listings"].values()) > 0


def test_a_saboteur_at_the_destination_is_found_out(tmp_path: Path) -> None:
    """It takes a file out of each delivery as soon as it is there."""
    done, report = run(tmp_path, "--databases", "sqlite", "--trials", "1", "--seed", "5", "--sabotage")
    assert done.returncode == 1
    assert report["partially_visible"] > 0
    assert report["failures"][0]["history"]
    assert "make chaos SEED=5" in done.stdout
