"""PRODUCTION_DEPLOYMENT.md tells of every alarm, and docker-compose.yml holds to what the guide says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ncr_upload.application.metrics import FAMILIES
from ncr_upload.entrypoints.settings import Settings

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "PRODUCTION_DEPLOYMENT.md").read_text()
COMPOSE = (ROOT / "docker-compose.yml").read_text()
SOURCES = sorted((ROOT / "src/ncr_upload").rglob("*.py"))
ALARM = re.compile(r"log\.(?:warning|error|critical|exception)\(\s*f?\"([a-z_]+)")
FIGURE = re.compile(r'gauge\(\s*f?"(ncr_[a-z_{}]+)"')


def list_alarms() -> list[str]:
    return sorted({name for path in SOURCES for name in ALARM.findall(path.read_text())})


def test_the_alarms_are_found_where_they_are_made() -> None:
    assert {"destination_parked", "task_settled", "batch_stalled", "memory", "doorbell"} <= set(list_alarms())


@pytest.mark.parametrize("name", list_alarms())
def test_what_is_logged_as_a_warning_or_an_error_is_in_the_guide(name: str) -> None:
    assert re.search(rf"`{name}(:[^`]*)?`", GUIDE), f"{name} is logged, and the guide says nothing of it"


def test_every_metric_that_the_guide_names_is_one() -> None:
    source = (ROOT / "src/ncr_upload/entrypoints/api/metrics.py").read_text()
    known = set(FIGURE.findall(source)) - {"ncr_worker_{name}"}
    known |= {f"ncr_worker_{name}" for name in re.findall(r'^    "([a-z_]+)": \("', source, re.MULTILINE)}
    known |= {family.name if family.buckets else f"{family.name}_total" for family in FAMILIES}
    named = set(re.findall(r"`(ncr_[a-z_]+)", GUIDE)) - {"ncr_"}
    assert named == known


def test_the_queries_of_the_guide_ask_for_series_that_there_are() -> None:
    queries = "\n".join(re.findall(r"```promql\n(.*?)```", GUIDE, re.DOTALL))
    asked = set(re.findall(r"\bncr_[a-z_]+", queries))
    counted = {
        f"{family.name}_{end}" for family in FAMILIES for end in (("bucket", "count", "sum") if family.buckets else ("total",))
    }
    assert asked
    assert asked <= counted
    assert {name.rsplit("_", 1)[0] for name in asked} == {family.name for family in FAMILIES}, "each has its query"


def test_a_worker_is_given_longer_than_its_longest_stage() -> None:
    minutes = int(re.search(r"stop_grace_period: (\d+)m", COMPOSE).group(1))  # type: ignore[union-attr]
    assert minutes * 60 > Settings.model_fields["validator_timeout_seconds"].default
    assert f"WORKER_STOP_SECONDS={minutes * 60}" in (ROOT / "deploy.sh").read_text()
