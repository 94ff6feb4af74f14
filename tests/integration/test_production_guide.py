"""PRODUCTION_DEPLOYMENT.md tells of every alarm, and docker-compose.yml holds to what the guide says of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from api_server import Site
from ncr_upload.application.metrics import FAMILIES
from ncr_upload.application.ports import Memory, WorkerReport
from ncr_upload.domain.batches import WorkerRoom
from ncr_upload.entrypoints.settings import Settings

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "PRODUCTION_DEPLOYMENT.md").read_text()
COMPOSE = (ROOT / "docker-compose.yml").read_text()
SOURCES = sorted((ROOT / "src/ncr_upload").rglob("*.py"))
ALARMING = {"warning", "error", "critical", "exception"}
MAKERS = {"getLogger", "get_logger"}
REPORT = WorkerReport("celery@w1", WorkerRoom(1, 4), Memory(900, 1000, "cgroup2"), 700, 10**9)


def list_alarms(tree: ast.Module) -> Iterator[str]:
    """Yield the event of each call of a module's loggers at the level of a warning or above."""
    loggers = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and _last_name(node.value.func) in MAKERS
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=level), args=[first, *_]) if (
                name in loggers and level in ALARMING
            ):
                yield _event(first)


def _last_name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _event(argument: ast.expr) -> str:
    """Return the words before the colon of a message that begins with literal text."""
    first = argument.values[0] if isinstance(argument, ast.JoinedStr) else argument
    assert isinstance(first, ast.Constant), f"line {argument.lineno}: the event has no fixed name"
    return str(first.value).partition(":")[0]


ALARMS = sorted({event for path in SOURCES for event in list_alarms(ast.parse(path.read_text()))})


def test_alarms_are_found_however_they_are_written() -> None:
    source = """
import logging, structlog
log = structlog.get_logger("a")
other = logging.getLogger(__name__)
log.warning(
    "over_lines", key=1)
other.error(f"formatted: {log}")
other.exception('quoted: %s', 1)
log.info("no_alarm")
warnings.warning("no_logger")
# log.warning("a_comment")
"""
    assert list(list_alarms(ast.parse(source))) == ["over_lines", "formatted", "quoted"]
    with pytest.raises(AssertionError, match="no fixed name"):
        list(list_alarms(ast.parse("log = get_logger()\nlog.error(message)")))
    assert {"destination_parked", "task_settled", "batch_stalled", "memory", "doorbell"} <= set(ALARMS)


@pytest.mark.parametrize("name", ALARMS)
def test_what_is_logged_as_a_warning_or_an_error_is_in_the_guide(name: str) -> None:
    assert re.search(rf"`{name}(:[^`]*)?`", GUIDE), f"{name} is logged, and the guide says nothing of it"


@pytest.mark.parametrize("backing", ["memory"], indirect=True)
def test_the_guide_names_every_metric_that_the_api_answers_with_and_no_other(site: Site) -> None:
    site.ports.reports.report(REPORT)
    families = text_string_to_metric_families(site.http.get("/metrics").text)
    answered = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    assert set(re.findall(r"`(ncr_[a-z_]+)", GUIDE)) - {"ncr_"} == answered


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
