"""Beat's Celery application: it sweeps.

celery -A ncr_upload.entrypoints.beat beat -S ncr_upload.entrypoints.beat:SweepScheduler
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import structlog
from celery import signals
from celery.beat import ScheduleEntry, Scheduler

from ncr_upload.application.metrics import FOLD_IDLE_SECONDS, FOLDED_KEPT_SECONDS, MetricsRecorder, MetricsStore
from ncr_upload.application.monitoring import BatchWatch
from ncr_upload.application.ports import History, Statistics
from ncr_upload.application.recovery import SweepPorts, sweep
from ncr_upload.domain.errors import Unavailable
from ncr_upload.entrypoints.alive import show_alive
from ncr_upload.entrypoints.bootstrap.records import (
    make_celery,
    make_history,
    make_metrics,
    make_release_limits,
    make_statistics,
    make_sweep_ports,
)
from ncr_upload.entrypoints.logs import set_up_logs
from ncr_upload.entrypoints.settings import load_settings

log = structlog.get_logger("ncr.beat")
PRUNE_SECONDS = 10.0
PRUNED_AT_ONCE = 500
settings = load_settings()
app = make_celery(settings)
app.conf.beat_schedule = {
    "sweep": {"task": "ncr.sweep", "schedule": settings.sweep_seconds},
    "prune": {"task": "ncr.prune", "schedule": PRUNE_SECONDS},
    "look-at-batches": {"task": "ncr.look_at_batches", "schedule": settings.memory_check_interval},
}
batch_watch = BatchWatch(settings.batch_timeout)
app.conf.beat_max_loop_interval = settings.sweep_seconds


@lru_cache(maxsize=1)
def _sweep_parts() -> SweepPorts:
    return make_sweep_ports(settings, app, _recorder().job_ended)


@lru_cache(maxsize=1)
def _metrics() -> MetricsStore:
    return make_metrics(settings)


@lru_cache(maxsize=1)
def _recorder() -> MetricsRecorder:
    return MetricsRecorder(_metrics())


@lru_cache(maxsize=1)
def _history() -> History:
    return make_history(settings)


@lru_cache(maxsize=1)
def _statistics() -> Statistics:
    return make_statistics(settings)


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _keep_our_logs(**_: Any) -> None:
    set_up_logs(settings)


@app.task(name="ncr.sweep")  # type: ignore[untyped-decorator]
def run_sweep() -> None:
    """One sweep: see `application.recovery`."""
    try:
        swept = sweep(_sweep_parts(), make_release_limits(settings))
    except Unavailable as error:
        log.warning("sweep_incomplete", code=error.code, reason=error.message, next_step=error.next_step)
        return
    finally:
        _recorder().flush()  # beat may be ended at any moment
    if swept.rung or swept.released or swept.given_up:
        log.info("swept", rung=swept.rung, released=swept.released, given_up=list(swept.given_up))


@app.task(name="ncr.prune")  # type: ignore[untyped-decorator]
def prune_history() -> None:
    """Let some of what ended over HISTORY_DAYS ago go, and fold the counts of processes that are gone."""
    try:
        pruned = _history().prune(settings.history_days * 86400, PRUNED_AT_ONCE)
        _metrics().fold(FOLD_IDLE_SECONDS, FOLDED_KEPT_SECONDS)
    except Unavailable as error:
        log.warning("prune_incomplete", code=error.code, reason=error.message, next_step=error.next_step)
        return
    if pruned:
        log.info("pruned", tasks=pruned)


@app.task(name="ncr.look_at_batches")  # type: ignore[untyped-decorator]
def look_at_batches() -> None:
    """Tell of batches that have stalled, once of each."""
    try:
        stalled, going_on = batch_watch.look(_statistics())
    except Unavailable as error:
        log.warning("batches_not_looked_at", code=error.code, reason=error.message, next_step=error.next_step)
        return
    for batch_id in stalled:
        log.warning(
            "batch_stalled",
            batch_id=batch_id,
            reason=f"no job of it has started or ended for {settings.batch_timeout:g} s (BATCH_TIMEOUT)",
            next_step="Look whether workers run (/celery-stats) and what its jobs wait for (/batch-status); its jobs stay.",
        )
    for batch_id in going_on:
        log.info("batch_not_stalled", batch_id=batch_id)


class SweepScheduler(Scheduler):  # type: ignore[misc]
    """Runs what is due in beat's own process, so that sweeping needs neither Redis nor a free worker."""

    producer = None

    def apply_entry(self, entry: ScheduleEntry, producer: Any = None) -> None:  # noqa: ARG002 - Celery's signature
        show_alive()
        try:
            self.app.tasks[entry.task].run()
        except Exception:
            log.exception("schedule_failed", schedule=entry.name)
