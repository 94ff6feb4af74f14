"""The doorbell on a real Redis: messages that are Celery's own, in order, also over a connection that Redis has closed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from ncr_upload.adapters.celery_queue import QUEUE, RECOVERED_QUEUE, RUN_JOB, CeleryQueue, make_app
from ncr_upload.domain.errors import Unavailable
from valkey_server import ValkeyServer


@pytest.fixture
def redis(valkey: ValkeyServer) -> Iterator[Redis]:
    with Redis.from_url(valkey.url) as client:
        client.flushall()
        yield client


@pytest.fixture
def app(valkey: ValkeyServer) -> Celery:
    return make_app(valkey.url, concurrency=1, max_tasks_per_child=1, max_memory_per_child_kb=1)


def take(redis: Redis, queue: str) -> dict[str, Any]:
    """The message that a worker would take next."""
    found: dict[str, Any] = json.loads(redis.rpop(queue))  # type: ignore[arg-type]
    return found


def told(message: dict[str, Any]) -> dict[str, Any]:
    """Without what is another in every message."""
    del message["headers"]["origin"], message["properties"]["reply_to"]
    ids = [message["headers"].pop(name) for name in ("id", "root_id")] + [message["properties"].pop("correlation_id")]
    assert len({*ids}) == 1
    assert message["properties"].pop("delivery_tag") != ids[0]
    return message


def test_a_ring_is_the_message_that_celery_itself_sends(app: Celery, redis: Redis) -> None:
    CeleryQueue(app, "here").ring(["t-1"])
    app.send_task(RUN_JOB, args=["t-1"], queue=QUEUE)
    assert told(take(redis, QUEUE)) == told(take(redis, QUEUE))


def test_rings_are_heard_in_order_and_those_of_one_queue_counted(app: Celery, redis: Redis) -> None:
    bell = CeleryQueue(app, "here")
    task_ids = [f"t-{number}" for number in range(1201)]
    bell.ring(task_ids)
    bell.ring(["first"], first=True)
    bell.ring_duty("janitor")
    assert (bell.depth(), bell.depth(first=True)) == (1201, 2)
    assert [take(redis, QUEUE)["headers"]["argsrepr"] for _ in task_ids] == [repr([task_id]) for task_id in task_ids]
    duty = [take(redis, RECOVERED_QUEUE)["headers"] for _ in range(2)][1]
    assert (duty["task"], duty["argsrepr"]) == ("ncr.run_duty", "['janitor']")


def test_a_connection_that_redis_has_closed_is_replaced_at_once(app: Celery, redis: Redis) -> None:
    bell = CeleryQueue(app, "here")
    bell.ring(["t-1"])
    redis.client_kill_filter(_type="normal", skipme=True)
    bell.ring(["t-2"])
    assert bell.depth() == 2


def test_without_redis_a_ring_says_so(app: Celery, valkey: ValkeyServer) -> None:
    valkey.kill()
    try:
        with pytest.raises(Unavailable) as raised:
            CeleryQueue(app, "here").ring(["t-1"])
        assert "here" in raised.value.message
    finally:
        valkey.start_again()
