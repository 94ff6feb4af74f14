"""The peer of the API's rates: what a submit and a status cost when FastAPI and Redis do nothing else. Nothing is durable."""

from __future__ import annotations

import json
import os
import sys
import uuid
from datetime import UTC, datetime
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from redis.asyncio import Redis

app = FastAPI()
redis: Redis = Redis(port=int(os.environ["REDIS_PORT"]), decode_responses=True)


class Job(BaseModel):
    job_id: str
    username: str
    campaign: str
    row_id: int | None = None


@app.post("/process-job", status_code=202)
async def process_job(job: Job) -> dict[str, Any]:
    task_id, now = str(uuid.uuid4()), datetime.now(UTC).isoformat()
    task = job.model_dump() | {"task_id": task_id, "status": "pending", "message": "accepted", "timestamp": now}
    async with redis.pipeline(transaction=False) as pipeline:
        pipeline.set(f"task:{task_id}", json.dumps(task))
        pipeline.lpush("tasks", task_id)
        await pipeline.execute()
    return {name: task[name] for name in ("job_id", "task_id", "status", "message", "timestamp")}


@app.get("/job-status/{task_id}")
async def job_status(task_id: str) -> dict[str, Any]:
    stored = await redis.get(f"task:{task_id}")
    if stored is None:
        raise HTTPException(404)
    task: dict[str, Any] = json.loads(stored)
    return task


if __name__ == "__main__":
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
