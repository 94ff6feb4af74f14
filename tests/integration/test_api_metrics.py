"""What monitoring is told over HTTP."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from api_server import Site
from ncr_upload.application.metrics import RETRIES, STAGE_SECONDS, MetricsRecorder
from ncr_upload.application.ports import Figures, Memory, WorkerReport
from ncr_upload.domain.batches import WorkerRoom
from ncr_upload.domain.jobs import Status

REPORT = WorkerReport("celery@w1", WorkerRoom(1, 4), Memory(900, 1000, "cgroup2"), 700, 10**9)


def scrape(site: Site) -> dict[tuple[str, ...], float]:
    answer = site.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.text)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_metrics_tell_jobs_queues_workers_and_memory(site: Site) -> None:
    site.ports.reports.report(REPORT)
    site.ports.statistics.told = Figures({Status.PENDING: 7}, {Status.COMPLETED: 3}, 12.5, 1)
    found = scrape(site)
    assert (found["ncr_jobs", "pending"], found["ncr_jobs", "uploading"]) == (7, 0)
    assert (found["ncr_jobs_ended_last_hour", "completed"], found["ncr_jobs_ended_last_hour", "failed"]) == (3, 0)
    assert (found[("ncr_oldest_due_seconds",)], found[("ncr_batches_stalled",)]) == (12.5, 1)
    assert found["ncr_queue_messages", "ncr_jobs"] == 0
    assert (found["ncr_worker_capacity", "celery@w1"], found["ncr_worker_resident_bytes", "celery@w1"]) == (1, 700)
    assert (found["ncr_up", "database"], found["ncr_up", "redis"]) == (1, 1)


def test_without_redis_the_rest_is_told(site: Site) -> None:
    site.queue.away = True
    found = scrape(site)
    assert (found["ncr_up", "database"], found["ncr_up", "redis"]) == (1, 0)
    assert ("ncr_jobs", "pending") in found
    assert ("ncr_queue_messages", "ncr_jobs") not in found


def test_memory_stats_tell_what_the_workers_said(site: Site) -> None:
    site.ports.reports.report(REPORT)
    (worker,) = site.http.get("/memory-stats").json()["workers"]
    assert (worker["worker"], worker["capacity"], worker["configured"]) == ("celery@w1", 1, 4)
    assert (worker["resident_bytes"], worker["used_percent"], worker["source"]) == (700, 90.0, "cgroup2")


def test_counters_and_histograms_of_all_processes_are_told(site: Site) -> None:
    before = scrape(site)
    assert before["ncr_jobs_ended_total", "completed"] == 0, "a series is there before its first count, so that rate() sees it"
    for seconds in (0.3, 7):
        recorder = MetricsRecorder(site.ports.metrics, flush_seconds=3600)
        recorder.job_ended(Status.COMPLETED)
        recorder.count(RETRIES, "transient")
        recorder.observe(STAGE_SECONDS, "download", seconds)
        recorder.flush()
    found = scrape(site)
    assert (found["ncr_jobs_ended_total", "completed"], found["ncr_retries_total", "transient"]) == (2, 2)
    assert (found["ncr_stage_seconds_count", "download"], found["ncr_stage_seconds_sum", "download"]) == (2, 7.3)
    buckets = [found["ncr_stage_seconds_bucket", bound, "download"] for bound in ("0.25", "0.5", "5.0", "10.0", "+Inf")]
    assert buckets == [0, 1, 1, 2, 2]
    assert found[("ncr_delivered_bytes_total",)] == 0
