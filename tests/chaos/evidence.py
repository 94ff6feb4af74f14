"""Collects what the judge looks at: rows, folders, keys. Everything is read past the proxies and past the product."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, text

from chaos.judge import Found, Leftovers
from chaos.observer import Observer
from chaos.stack import ChaosStack
from ncr_upload.application.download_cache import FOLDER as CACHE

QUIET_KEYS = ("_kombu.", "ncr_jobs", "unacked", "celery", "/")
"""Celery's own, of which there are a fixed few."""


def find_job(stack: ChaosStack, observer: Observer, job_id: str, sku: str) -> Found:
    with stack.engine.connect() as connection:
        tasks = _rows(connection, "SELECT * FROM ncr_jobs WHERE job_id = :v ORDER BY id", job_id)
        events = [
            event
            for task in tasks
            for event in _rows(connection, "SELECT * FROM ncr_events WHERE task_id = :v ORDER BY id", task["task_id"])
        ]
        uploads = _rows(connection, "SELECT upload_count FROM job_details WHERE job_id = :v", job_id)
        emails = _rows(connection, "SELECT id FROM email WHERE sku = :v", sku)
        history = _rows(connection, "SELECT id FROM history_log WHERE sku_id = :v", sku)
    return Found(
        tasks=tasks,
        events=events,
        uploads=sum(int(row["upload_count"]) for row in uploads),
        emails=len(emails),
        history=len(history),
        delivered=hash_folder(stack.destination.root / job_id),
        published=observer.published(job_id),
        previous_lost=observer.lost.get(job_id, []),
        partial=[f"{seen.by}: {seen.nearest}" for seen in observer.partial if seen.job_id == job_id],
    )


def _rows(connection: Connection, query: str, value: str) -> list[dict[str, Any]]:
    return [dict(row) for row in connection.execute(text(query), {"v": value}).mappings()]


def hash_folder(folder: Path) -> dict[str, str] | None:
    """Path below the folder → SHA-256; None where there is none."""
    if not folder.is_dir():
        return None
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def find_leftovers(stack: ChaosStack) -> Leftovers:
    with stack.engine.connect() as connection:
        held = connection.execute(
            text(
                "SELECT task_id FROM ncr_jobs WHERE finished_at IS NOT NULL AND "
                "(claimable_at IS NOT NULL OR staging_due_at IS NOT NULL)"
            )
        )
        leases = [str(row.task_id) for row in held]
    return Leftovers(
        staging=_names(stack.destination.root / ".ncr-staging"),
        workspaces=[name for name in _names(stack.work_dir) if name != CACHE],
        temporary=[name for name in _names(stack.tmp) if not _is_multiprocessings(stack.tmp / name)],
        leases=leases,
        redis_keys=_lasting_keys(stack),
    )


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _is_multiprocessings(path: Path) -> bool:
    """Celery's pool keeps an empty folder while it runs; a killed one cannot remove it."""
    return path.name.startswith("pymp-") and not any(path.iterdir())


def _lasting_keys(stack: ChaosStack) -> list[str]:
    """Keys without an expiry that are none of the queue's own; and the queue itself, if messages lie in it."""
    with stack.redis() as client:
        names = [key.decode() for key in client.scan_iter(count=1000)]
        lasting = [name for name in names if client.ttl(name) == -1 and not name.startswith(QUIET_KEYS)]
        waiting = int(client.llen("ncr_jobs"))
    return lasting + ([f"ncr_jobs ({waiting} messages)"] if waiting else [])


def tell_history(found: Found) -> list[str]:
    """The job's timeline, for a person."""
    order: list[Mapping[str, Any]] = sorted(found.events, key=lambda event: (event["at"], event["id"]))
    return [
        f"{event['at']:.3f} {event['task_id'][:8]} attempt {event['attempt']} {event['stage']}/{event['kind']} "
        f"{event['actor']}: {str(event['message'])[:300]}"
        for event in order
    ]
