"""The peer of the overhead: Celery as it comes, with tasks that do nothing."""

from __future__ import annotations

import os

from celery import Celery
from redis import Redis

app = Celery("bare", broker=os.environ["BARE_BROKER"])
app.conf.task_ignore_result = True


@app.task
def nothing(_task_id: str) -> None:
    pass


@app.task
def tell(key: str) -> None:
    """The last message: says that those before it have been taken."""
    Redis.from_url(os.environ["BARE_BROKER"]).set(key, 1)
