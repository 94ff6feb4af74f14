"""What Prometheus scrapes: asked of the parts when it asks, each within the time an answer may take."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from ncr_upload.application import queries
from ncr_upload.application.metrics import FAMILIES, Counts, histogram_of
from ncr_upload.application.ports import Figures, WorkerReport
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import LIVE, TERMINAL, Status
from ncr_upload.entrypoints.api.access import documented
from ncr_upload.entrypoints.api.context import Context, In
from ncr_upload.entrypoints.api.problems import document

router = APIRouter(tags=["Monitoring"])


@router.get(
    "/metrics",
    response_class=Response,
    responses=document() | {200: {"description": "Prometheus text format.", "content": {"text/plain": {}}}},
    summary="Metrics for Prometheus",
    dependencies=[documented],
)
async def metrics(api: In) -> Response:
    """Jobs by status, queues, workers and memory; counters and histograms of all processes. What a part did not answer in time
    is left out, and `ncr_up` of that part is 0."""
    figures, depths, reports, counts = await asyncio.gather(
        queries.read_figures(api.ports, api.settings.batch_timeout),
        queries.read_depths(api.ports),
        queries.read_reports(api.ports, api.settings.memory_check_interval),
        queries.read_counts(api.ports),
    )
    return Response(_render(api, figures, depths, reports, counts), media_type=CONTENT_TYPE_LATEST)


def _render(
    api: Context,
    figures: Figures | Unavailable,
    depths: Mapping[str, int] | Unavailable,
    reports: list[WorkerReport] | Unavailable,
    counts: Counts | Unavailable,
) -> bytes:
    registry = CollectorRegistry()

    def gauge(name: str, text: str, values: Mapping[Any, float], *labels: str) -> None:
        metric = Gauge(name, text, labels, registry=registry)
        for key, value in values.items():
            (metric.labels(*key) if labels else metric).set(value)

    answers = {"database": figures, "redis": depths}
    up = {(part,): 0.0 if isinstance(answer, Unavailable) else 1.0 for part, answer in answers.items()}
    gauge("ncr_up", "Whether the part answered this scrape.", up, "part")
    if isinstance(figures, Figures):
        gauge("ncr_jobs", "Jobs that have not ended.", _by_status(figures.live, LIVE), "status")
        gauge("ncr_jobs_ended_last_hour", "Jobs that ended.", _by_status(figures.ended_last_hour, TERMINAL), "status")
        gauge("ncr_oldest_due_seconds", "How long the longest due job has waited.", {(): figures.oldest_due_seconds})
        gauge(
            "ncr_batches_stalled",
            "Batches that wait: none of their jobs has started or ended for BATCH_TIMEOUT.",
            {(): figures.stalled_batches},
        )
    if not isinstance(depths, Unavailable):
        gauge("ncr_queue_messages", "Messages waiting.", {(name,): depth for name, depth in depths.items()}, "queue")
    memory = api.ports.host.memory()
    gauge("ncr_memory_used_bytes", "Of this API's container or host.", {(): memory.used})
    gauge("ncr_memory_total_bytes", "Of this API's container or host.", {(): memory.total})
    gauge("ncr_memory_limit_percent", "MAX_MEMORY_USAGE_PERCENT.", {(): api.limits.admission.max_memory_percent})
    gauge("ncr_api_resident_bytes", "This API process.", {(): api.ports.host.process_memory()})
    if not isinstance(reports, Unavailable):
        for name, (text, read) in _OF_WORKERS.items():
            gauge(f"ncr_worker_{name}", text, {(report.worker,): read(report) for report in reports}, "worker")
    if not isinstance(counts, Unavailable):
        registry.register(_Counted(counts))
    return generate_latest(registry)


class _Counted(Collector):
    """What all processes have counted, as Prometheus wants it."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        for family in FAMILIES:
            labels = () if family.label is None else (family.label,)
            if family.buckets:
                histogram = HistogramMetricFamily(family.name, family.text, labels=labels)
                for value in family.values:
                    buckets, total = histogram_of(family, value, self._counts)
                    histogram.add_metric(
                        [value], [(str(float(bound)).replace("inf", "+Inf"), count) for bound, count in buckets], total
                    )
                yield histogram
            else:
                counter = CounterMetricFamily(family.name, family.text, labels=labels)
                for value in family.values:
                    counter.add_metric([value] if labels else [], self._counts.get(family.key(value), 0.0))
                yield counter


_OF_WORKERS: dict[str, tuple[str, Any]] = {
    "resident_bytes": ("The worker with its children.", lambda report: report.resident_bytes),
    "memory_used_bytes": ("Of the worker's container or host.", lambda report: report.memory.used),
    "memory_total_bytes": ("Of the worker's container or host.", lambda report: report.memory.total),
    "free_disk_bytes": ("Where its WORK_DIR is; its cache of downloads counts as free.", lambda report: report.free_disk_bytes),
    "capacity": ("Jobs at once it has room for now.", lambda report: report.room.capacity),
    "configured": ("Jobs at once it is set to.", lambda report: report.room.configured),
}


def _by_status(counts: Mapping[Status, int], statuses: frozenset[Status]) -> dict[tuple[str, ...], float]:
    """Every status, so that a series does not vanish when nothing is in it."""
    return {(status.value,): counts.get(status, 0) for status in sorted(statuses)}
