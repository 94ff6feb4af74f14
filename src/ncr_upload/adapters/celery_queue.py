"""The doorbell: one small Celery message that says which task to look at."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from celery import Celery
from kombu.entity import Queue
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from ncr_upload.domain.errors import Unavailable

QUEUE = "ncr_jobs"
RECOVERED_QUEUE = "ncr_recovered"
"""Read before QUEUE: what a dead worker left must not wait behind thousands of new jobs."""

RUN_JOB = "ncr.run_job"
RUN_DUTY = "ncr.run_duty"
INSPECT_SECONDS = 1.0
SOCKET_SECONDS = 2.0
"""How long Redis may be silent before a call fails or a worker connects anew."""


def make_app(redis_url: str, *, concurrency: int, max_tasks_per_child: int, max_memory_per_child_kb: int) -> Celery:
    """The Celery application, for those who ring and those who answer.

    Messages may be lost or repeated, so they are acknowledged at once and no result is kept: SQL is the ledger.
    """
    app = Celery("ncr_upload", broker=redis_url)
    app.conf.update(
        task_default_queue=QUEUE,
        task_queues=[_queue(RECOVERED_QUEUE), _queue(QUEUE)],
        task_create_missing_queues=True,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_acks_late=False,
        task_publish_retry=False,
        task_send_sent_event=True,
        worker_send_task_events=True,
        worker_disable_prefetch=True,
        worker_prefetch_multiplier=1,
        worker_concurrency=concurrency,
        worker_max_tasks_per_child=max_tasks_per_child,
        worker_max_memory_per_child=max_memory_per_child_kb,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_timeout=3,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "max_retries": 0,  # else one call that cannot connect tries for 6 s; workers have a loop of their own
            "socket_timeout": SOCKET_SECONDS,
            "socket_connect_timeout": SOCKET_SECONDS,
            "socket_keepalive": True,
            "health_check_interval": 15,
            "queue_order_strategy": "priority",
        },
        timezone="UTC",
        enable_utc=True,
    )
    return app


def _queue(name: str) -> Queue:
    return Queue(name, routing_key=name)  # type: ignore[no-untyped-call]


class CeleryQueue:
    """`JobQueue` on Celery."""

    def __init__(self, app: Celery, place: str) -> None:
        self._app = app
        self._place = place

    def ring(self, task_id: str, *, first: bool = False) -> None:
        """See `JobQueue.ring`."""
        self._send(RUN_JOB, task_id, RECOVERED_QUEUE if first else QUEUE)

    def ring_duty(self, name: str) -> None:
        """See `JobQueue.ring_duty`."""
        self._send(RUN_DUTY, name, RECOVERED_QUEUE)

    def _send(self, task: str, argument: str, queue: str) -> None:
        try:
            self._app.send_task(task, args=[argument], queue=queue, retry=False)
        except (OperationalError, RedisError, OSError) as error:
            raise self._unavailable(error) from error

    def depth(self, *, first: bool = False) -> int:
        """See `JobQueue.depth`."""
        try:
            with self._app.connection_for_read() as connection:
                connection.ensure_connection(max_retries=0, timeout=2)
                return int(connection.default_channel.client.llen(RECOVERED_QUEUE if first else QUEUE))
        except (OperationalError, RedisError, OSError) as error:
            raise self._unavailable(error) from error

    def workers(self) -> dict[str, Any]:
        """See `JobQueue.workers`. The three questions are asked side by side, since each waits for stragglers."""

        def ask(question: str) -> dict[str, Any]:
            answer = getattr(self._app.control.inspect(timeout=INSPECT_SECONDS), question)()
            return answer or {}

        questions = ("active", "scheduled", "stats")
        try:
            with ThreadPoolExecutor(len(questions)) as threads:
                return dict(zip(questions, threads.map(ask, questions), strict=True))
        except (OperationalError, RedisError, OSError) as error:
            raise self._unavailable(error) from error

    def is_worker_alive(self) -> bool:
        """See `JobQueue.is_worker_alive`."""
        try:
            return bool(self._app.control.inspect(timeout=INSPECT_SECONDS, limit=1).ping())
        except (OperationalError, RedisError, OSError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> Unavailable:
        return Unavailable(
            "redis_unavailable",
            f"the queue in Redis at {self._place} did not answer: {type(error).__name__}",
            "Check that Redis runs there and that REDIS_PASSWORD is right. Jobs are safe in SQL meanwhile.",
        )
