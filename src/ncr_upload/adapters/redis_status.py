"""Live status in Redis: one hash per task, written in one step, never scanned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.redaction import NO_SECRETS, Redactor
from ncr_upload.domain.text import PROBLEM, STATUS

KEY = "ncr:status:{task_id}"
LIVE_SECONDS = 10
"""A live view fades after this long unless it is posted again, so a status that lost its worker is not shown for long."""

ANSWER_SECONDS = 0.5

# Keeps the newest view: an older fence, or a live view after the final one of the same fence, changes nothing.
POST = """
local fence = tonumber(ARGV[1])
local stored = redis.call('HMGET', KEYS[1], 'fence', 'live')
if stored[1] then
  if tonumber(stored[1]) > fence then return 0 end
  if tonumber(stored[1]) == fence and stored[2] == '0' and ARGV[2] == '1' then return 0 end
end
redis.call('HSET', KEYS[1], 'fence', ARGV[1], 'live', ARGV[2], 'view', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return 1
"""


@dataclass(frozen=True, slots=True)
class RedisFacts:
    """What a Redis server says of itself. `max_memory_bytes` 0: no limit, so that nothing is ever evicted."""

    version: str
    max_memory_bytes: int
    eviction: str
    append_only: bool


class RedisStatusBoard:
    """`StatusBoard` on Redis or Valkey."""

    def __init__(
        self,
        url: str,
        place: str,
        *,
        final_seconds: float,
        answer_seconds: float = ANSWER_SECONDS,
        redactor: Redactor = NO_SECRETS,
    ) -> None:
        self._place = place
        self._redactor = redactor
        self._final_milliseconds = int(final_seconds * 1000)
        self._redis: Redis = Redis.from_url(
            url,
            socket_timeout=answer_seconds,
            socket_connect_timeout=answer_seconds,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )

    def post(self, views: Sequence[dict[str, Any]], *, live: bool, fence: int = 0) -> None:
        """See `StatusBoard.post`."""
        milliseconds = LIVE_SECONDS * 1000 if live else self._final_milliseconds
        with self._translated_errors(), self._redis.pipeline(transaction=False) as pipeline:
            for view in views:
                key, told = KEY.format(task_id=view["task_id"]), json.dumps(self._shown(view))
                pipeline.eval(POST, 1, key, fence, int(live), told, milliseconds)
            pipeline.execute()

    def _shown(self, view: dict[str, Any]) -> dict[str, Any]:
        """The view with its free texts bounded and without secrets: what is posted while a job runs was in no ledger yet."""
        shown = view | {"message": self._redactor.bound(view["message"], STATUS)}
        if (problem := view["problem"]) is not None:
            words = {name: self._redactor.bound(problem[name], PROBLEM) for name in ("message", "next_step")}
            shown["problem"] = problem | words
        return shown

    def read(self, task_ids: Sequence[str]) -> list[dict[str, Any] | None]:
        """See `StatusBoard.read`."""
        with self._translated_errors(), self._redis.pipeline(transaction=False) as pipeline:
            for task_id in task_ids:
                pipeline.hget(KEY.format(task_id=task_id), "view")
            return [None if stored is None else json.loads(stored) for stored in pipeline.execute()]

    def ping(self) -> None:
        with self._translated_errors():
            self._redis.ping()

    def describe(self) -> RedisFacts:
        """For `ncr doctor`. Raises `Unavailable`."""
        with self._translated_errors():
            told: dict[str, Any] = {}
            for section in ("server", "memory", "persistence"):
                told |= self._redis.info(section)
        name = "Valkey" if "valkey_version" in told else "Redis"
        return RedisFacts(
            version=f"{name} {told.get('valkey_version') or told.get('redis_version', '?')}",
            max_memory_bytes=int(told.get("maxmemory", 0)),
            eviction=str(told.get("maxmemory_policy", "?")),
            append_only=str(told.get("aof_enabled", "0")) == "1",
        )

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except RedisError as error:
            raise Unavailable(
                "redis_unavailable",
                f"Redis at {self._place} did not answer: {type(error).__name__}",
                "Check that Redis runs there and that REDIS_PASSWORD is right. Jobs are safe in SQL meanwhile.",
            ) from error
