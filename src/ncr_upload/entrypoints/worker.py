"""The worker's Celery application: it answers the doorbell.

celery -A ncr_upload.entrypoints.worker worker
"""

from __future__ import annotations

import os
import socket
from functools import lru_cache
from typing import Any

import structlog
from celery import signals
from celery.worker import state as worker_state

from ncr_upload.application import duties
from ncr_upload.application.attempts import Settled, WorkerOptions, WorkerPorts, run_task
from ncr_upload.application.leaving import Leaving
from ncr_upload.application.metrics import MetricsRecorder
from ncr_upload.application.recovery import SweepPorts, release_and_ring
from ncr_upload.domain.errors import DeliveryError, DestinationParked, HandedOver, Unavailable
from ncr_upload.entrypoints.alive import show_alive
from ncr_upload.entrypoints.bootstrap.deliveries import make_worker_options, make_worker_ports
from ncr_upload.entrypoints.bootstrap.records import make_celery, make_metrics, make_release_limits, make_sweep_ports
from ncr_upload.entrypoints.crash import crash_points
from ncr_upload.entrypoints.drain import Drain, keep_from_children, listen_in_child
from ncr_upload.entrypoints.logs import set_up_logs
from ncr_upload.entrypoints.memory_monitor import WorkerMonitor
from ncr_upload.entrypoints.recycling import recycle_by_current_size
from ncr_upload.entrypoints.settings import load_settings

log = structlog.get_logger("ncr.worker")
settings = load_settings()
app = make_celery(settings)
app.steps["worker"].add(WorkerMonitor)
recycle_by_current_size(settings.celery_worker_max_memory_per_child)
reach = crash_points(os.environ)
leaving = Leaving()


@lru_cache(maxsize=1)
def _worker_parts(_process: int) -> tuple[WorkerPorts, WorkerOptions]:
    name = f"{socket.gethostname()}:{os.getpid()}"
    return make_worker_ports(settings, _recorder(_process)), make_worker_options(settings, name)


@lru_cache(maxsize=1)
def _recorder(_process: int) -> MetricsRecorder:
    return MetricsRecorder(make_metrics(settings))


@lru_cache(maxsize=1)
def _sweep_parts(_process: int) -> SweepPorts:
    return make_sweep_ports(settings, app)


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _keep_our_logs(**_: Any) -> None:
    set_up_logs(settings)


@signals.worker_ready.connect  # type: ignore[untyped-decorator]
def _when_ready(sender: Any, **_: Any) -> None:
    _listen(sender.pool)  # Celery says so again whenever it has connected anew


@signals.worker_init.connect  # type: ignore[untyped-decorator]
def _before_fork(**_: Any) -> None:
    keep_from_children()


@signals.worker_process_init.connect  # type: ignore[untyped-decorator]
def _after_fork(**_: Any) -> None:
    listen_in_child(leaving)


@signals.worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def _before_child_ends(**_: Any) -> None:
    _recorder(os.getpid()).flush(ended=True)


@lru_cache(maxsize=1)
def _listen(pool: Any) -> None:
    def stop_fetching() -> None:
        worker_state.should_stop = os.EX_OK

    def list_children() -> list[int]:
        try:
            return list(pool.info.get("processes", ()))
        except AttributeError:  # the pool has ended
            return []

    Drain(settings.worker_grace_seconds, stop_fetching, list_children).listen()


@signals.heartbeat_sent.connect  # type: ignore[untyped-decorator]
def _show_alive(**_: Any) -> None:
    show_alive()


@app.task(name="ncr.run_job")  # type: ignore[untyped-decorator]
def run_job(task_id: str) -> None:
    """Look at the task, and do one attempt at it if it is due and free. One that was being stopped leaves it to another."""
    if leaving.said:
        return
    with structlog.contextvars.bound_contextvars(task_id=task_id):
        try:
            ports, options = _worker_parts(os.getpid())
            settled = run_task(task_id, ports, options, reach, leaving)
        except Unavailable as error:
            log.warning("task_not_run", code=error.code, reason=error.message, next_step=error.next_step)
            return
        if settled is not None:
            _log(settled)
            if isinstance(settled.failure, HandedOver):
                _ring_again(task_id)
            if settled.task.batch_id is not None and settled.task.finished_at is not None:
                _release_next()


def _ring_again(task_id: str) -> None:
    try:
        _sweep_parts(os.getpid()).queue.ring([task_id], first=True)
    except Unavailable as error:
        log.info("ring_left_to_sweeper", code=error.code)


@app.task(name="ncr.run_duty")  # type: ignore[untyped-decorator]
def run_duty(name: str) -> None:
    """Look at the duty, and do it if it is due and nobody else does."""
    try:
        ports, options = _worker_parts(os.getpid())
        duties.run_duty(name, ports.pipeline, ports.duties, options.parking, options.janitor)
    except DeliveryError as error:
        log.warning("duty_not_done", duty=name, code=error.code, reason=error.message, next_step=error.next_step)


def _release_next() -> None:
    try:
        release_and_ring(_sweep_parts(os.getpid()), make_release_limits(settings))
    except Unavailable as error:
        log.info("release_left_to_sweeper", code=error.code)


def _log(settled: Settled) -> None:
    task, failure = settled.task, settled.failure
    facts = {"job_id": task.job_id, "status": task.status.value, "attempt": task.attempt, "outcome": task.message}
    if settled.unexpected:
        log.error("task_settled", **facts, exc_info=failure)
    elif isinstance(failure, DestinationParked):
        log.info("task_waits", **facts, code=failure.code)  # the warning is the destination's, once
    elif isinstance(failure, DeliveryError):
        log.warning("task_settled", **facts, code=failure.code)
    else:
        log.info("task_settled", **facts)
