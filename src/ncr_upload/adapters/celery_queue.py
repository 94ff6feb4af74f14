"""The doorbell: one small Celery message that says which task to look at."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from celery import Celery
from kombu.entity import Queue
from kombu.exceptions import OperationalError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as ConnectionLost
from redis.exceptions import RedisError
from redis.retry import Retry

from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.redaction import NO_SECRETS, Redactor
from ncr_upload.domain.text import bound_json

QUEUE = "ncr_jobs"
RECOVERED_QUEUE = "ncr_recovered"
"""Read before QUEUE: what a dead worker left must not wait behind thousands of new jobs."""

RUN_JOB = "ncr.run_job"
RUN_DUTY = "ncr.run_duty"
INSPECT_SECONDS = 1.0
MAX_ANSWERS_BYTES = 2_000_000
"""Of what all workers say of themselves."""
PUSHED_AT_ONCE = 500
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
        worker_send_task_events=False,  # three messages for each task; Flower asks for them while it runs
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
            "ack_emulation": False,  # two round trips a message, to keep what the sweeper rings for again anyway
        },
        timezone="UTC",
        enable_utc=True,
    )
    return app


def _queue(name: str) -> Queue:
    return Queue(name, routing_key=name)  # type: ignore[no-untyped-call]


def make_message(task: str, argument: str, queue: str) -> str:
    """A message by Celery's protocol 2 in kombu's envelope for Redis, as `send_task` would put it into the queue (see
    docs.celeryq.dev, "Message Protocol"; a test compares). `send_task` itself takes a millisecond of Python for each."""
    message_id = str(uuid.uuid4())
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    headers: dict[str, Any] = {
        "lang": "py",
        "task": task,
        "id": message_id,
        "root_id": message_id,
        **dict.fromkeys(("parent_id", "group", "group_index", "shadow", "eta", "expires", "ignore_result", "stamped_headers")),
        "retries": 0,
        "replaced_task_nesting": 0,
        "timelimit": [None, None],
        "argsrepr": repr([argument]),
        "kwargsrepr": "{}",
        "origin": "ncr",
        "stamps": {},
    }
    properties = {
        "correlation_id": message_id,
        "reply_to": "",
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": queue},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": str(uuid.uuid4()),
    }
    body = base64.b64encode(json.dumps([[argument], {}, embed]).encode()).decode()
    envelope = {"content-encoding": "utf-8", "content-type": "application/json", "headers": headers, "properties": properties}
    return json.dumps({"body": body, **envelope})


class CeleryQueue:
    """`JobQueue` on Celery."""

    def __init__(self, app: Celery, place: str, redactor: Redactor = NO_SECRETS) -> None:
        self._app = app
        self._redactor = redactor
        self._place = place
        self._redis: Redis = Redis.from_url(
            app.conf.broker_url,
            socket_timeout=SOCKET_SECONDS,
            socket_connect_timeout=SOCKET_SECONDS,
            # A connection that Redis has closed is replaced at once; one that is silent is not waited for twice.
            retry=Retry(NoBackoff(), 1, supported_errors=(ConnectionLost,)),
        )

    def ring(self, task_ids: Sequence[str], *, first: bool = False) -> None:
        """See `JobQueue.ring`."""
        self._send(RUN_JOB, task_ids, RECOVERED_QUEUE if first else QUEUE)

    def ring_duty(self, name: str) -> None:
        """See `JobQueue.ring_duty`."""
        self._send(RUN_DUTY, [name], RECOVERED_QUEUE)

    def _send(self, task: str, arguments: Sequence[str], queue: str) -> None:
        with self._translated_errors():
            for start in range(0, len(arguments), PUSHED_AT_ONCE):
                chunk = arguments[start : start + PUSHED_AT_ONCE]
                self._redis.lpush(queue, *(make_message(task, argument, queue) for argument in chunk))

    def depth(self, *, first: bool = False) -> int:
        """See `JobQueue.depth`."""
        with self._translated_errors():
            return int(self._redis.llen(RECOVERED_QUEUE if first else QUEUE))

    def workers(self) -> dict[str, Any]:
        """See `JobQueue.workers`. The three questions are asked side by side, since each waits for stragglers."""

        def ask(question: str) -> dict[str, Any]:
            answer = getattr(self._app.control.inspect(timeout=INSPECT_SECONDS), question)()
            return answer or {}

        questions = ("active", "scheduled", "stats")
        with self._translated_errors(), ThreadPoolExecutor(len(questions)) as threads:
            told = dict(zip(questions, threads.map(ask, questions), strict=True))
        shown: dict[str, Any] = self._redactor.redact_json(bound_json(told, MAX_ANSWERS_BYTES))
        return shown

    def is_worker_alive(self) -> bool:
        """See `JobQueue.is_worker_alive`."""
        with self._translated_errors():
            return bool(self._app.control.inspect(timeout=INSPECT_SECONDS, limit=1).ping())

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except (OperationalError, RedisError, OSError) as error:
            raise Unavailable(
                "redis_unavailable",
                f"the queue in Redis at {self._place} did not answer: {type(error).__name__}",
                "Check that Redis runs there and that REDIS_PASSWORD is right. Jobs are safe in SQL meanwhile.",
            ) from error
