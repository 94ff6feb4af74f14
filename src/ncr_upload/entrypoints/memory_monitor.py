"""What a worker's main process does for its host: looks at memory and disk every MEMORY_CHECK_INTERVAL seconds, and sweeps
WORK_DIR every SWEEP_SECONDS."""

from __future__ import annotations

from typing import Any

import structlog
from celery import bootsteps

from ncr_upload.application.monitoring import MemoryWatch, observe
from ncr_upload.application.ports import WorkerReport
from ncr_upload.domain.errors import Unavailable
from ncr_upload.entrypoints.bootstrap.deliveries import make_host, make_limits
from ncr_upload.entrypoints.bootstrap.records import make_cache, open_reports, sweep_work_dir
from ncr_upload.entrypoints.settings import Settings, load_settings

log = structlog.get_logger("ncr.memory")


class WorkerMonitor(bootsteps.StartStopStep):  # type: ignore[misc]
    """In the worker's main process, between its other work: no thread, so nothing is half done when a child is forked; and
    each report has a connection of its own, so none is carried into one."""

    requires = ("celery.worker.components:Timer",)

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self._settings = load_settings()
        self._watch = MemoryWatch(self._settings.max_memory_usage_percent)

    def start(self, parent: Any) -> None:
        interval = self._settings.memory_check_interval
        configured = parent.concurrency or self._settings.celery_worker_concurrency
        parent.timer.call_after(0, self._check, (parent.hostname, configured))
        parent.timer.call_repeatedly(interval, self._check, (parent.hostname, configured))
        parent.timer.call_repeatedly(self._settings.sweep_seconds, self._sweep)

    def stop(self, parent: Any) -> None:
        try:
            with open_reports(self._settings) as reports:
                reports.leave(parent.hostname)
        except Unavailable as error:
            log.info("report_not_removed", code=error.code)

    def _sweep(self) -> None:
        """On every host that has a WORK_DIR: beat may run elsewhere. A thread would do it beside the forks of children, and
        a child forked while it holds a lock hangs for ever."""
        try:
            if removed := sweep_work_dir(self._settings):
                log.info("workspaces_swept", removed=removed)
        except Unavailable as error:
            log.info("workspaces_left_for_now", code=error.code, reason=error.message)

    def _check(self, worker: str, configured: int) -> None:
        host = make_host()
        if host.memory().used_percent > self._settings.max_memory_usage_percent:
            make_cache(self._settings).forget_pages()
        self._watch.look(host)
        try:
            report = look_around(self._settings, worker, configured)
            with open_reports(self._settings) as reports:
                reports.report(report)
        except Unavailable as error:
            log.warning("report_not_written", code=error.code, reason=error.message)


def look_around(settings: Settings, worker: str, configured: int) -> WorkerReport:
    """How this worker and its host are now. Raises `Unavailable`."""
    return observe(
        make_host(),
        worker,
        configured=configured,
        child_bytes=settings.celery_worker_max_memory_per_child * 1024,
        work_dir=settings.work_dir,
        limits=make_limits(settings),
        cache=make_cache(settings),
    )
