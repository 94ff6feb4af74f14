"""`ncr demo`: the main job on real parts, shown and checked."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.domain.errors import DeliveryError
from ncr_upload.entrypoints.embedded.demo_display import Display
from ncr_upload.entrypoints.embedded.demo_picture import Picture
from ncr_upload.entrypoints.embedded.dev import StopSignal, say
from ncr_upload.entrypoints.embedded.endpoints import Endpoints, read_endpoints
from ncr_upload.entrypoints.embedded.parts import BUCKET, PartMissing
from ncr_upload.entrypoints.embedded.product import Product, break_model, make_product
from ncr_upload.entrypoints.embedded.samples import place_product
from ncr_upload.entrypoints.embedded.stack import ENDPOINTS_NAME, Stack, StackRefused, StackRunning
from ncr_upload.entrypoints.embedded.studio import read_rows
from ncr_upload.entrypoints.embedded.supervisor import PartFailed
from ncr_upload.entrypoints.embedded.tour import (
    Chapter,
    TourStopped,
    check_delivered,
    check_refused,
    list_delivered,
    run_job,
)

USERNAME, CAMPAIGN = "demo-artist", "demo-campaign"
_FOLDER = "demo"

# A laptop that is busy with other things must not be told that it has no memory left for the demo.
_ENVIRONMENT = {"MAX_MEMORY_USAGE_PERCENT": os.environ.get("MAX_MEMORY_USAGE_PERCENT", "98")}


def run_demo(state_dir: Path, json_output: bool = False, keep: bool = False, picture: Path | None = None) -> int:
    """Deliver one product and have one refused; returns 0 only if everything that was promised held, else 1; 130 when
    interrupted.

    Starts a stack of its own in `state_dir`, or uses the one that runs there. `keep` leaves it up until SIGINT or SIGTERM.
    `picture` names an SVG to write when all held.
    """
    if picture is not None and not picture.parent.is_dir():
        say(f"error: {picture.parent} is not a folder. Create it, or name a picture in a folder that exists.")
        return 1
    drawn = Picture()
    code = _start_and_play(state_dir, Display(quiet=json_output, picture=drawn), keep)
    if picture is not None and code == 0:
        drawn.save(picture)
    return code


def _start_and_play(state_dir: Path, display: Display, keep: bool) -> int:
    try:
        stack = Stack(state_dir, environment=_ENVIRONMENT, tell=say)
    except StackRunning as running:
        return _use_running(running, display)
    except StackRefused as refused:
        say(f"error: {refused}")
        return 1
    return asyncio.run(_run(stack, display, keep))


def _use_running(running: StackRunning, display: Display) -> int:
    path = running.state_dir / ENDPOINTS_NAME
    if not path.exists():
        say(f"error: {running}; it is not ready yet")
        return 1
    display.say(f"using the stack that runs in {running.state_dir}")
    return _tell_result(_play(read_endpoints(path), display), display)


async def _run(stack: Stack, display: Display, keep: bool) -> int:
    stopped = StopSignal(stack)
    began = time.monotonic()
    try:
        display.say(f"starting the stack in {stack.site.state_dir}")
        _remove_former_runs(stack.site.state_dir)
        await stopped.or_done(asyncio.create_task(stack.start()))
        if stopped.is_set():
            return _say_interrupted()
        display.ready(f"all seven parts are ready after {time.monotonic() - began:.1f} s")
        playing = asyncio.create_task(asyncio.to_thread(_play, stack.endpoints, display))
        await stopped.or_done(playing)
        if stopped.is_set():
            return _say_interrupted()
        code = _tell_result(playing.result(), display)
        if keep:
            display.say(f"the stack stays up: {stack.site.url('api')}/docs, keys in {stack.site.state_dir / ENDPOINTS_NAME}")
            await stopped.wait()
    except (PartFailed, PartMissing, DeliveryError) as error:
        say(f"error: {error}")
        return 1
    finally:
        await stack.stop()
    return code


def _say_interrupted() -> int:
    say("interrupted before the end; stopping the stack")
    return 130


def _play(endpoints: Endpoints, display: Display) -> dict[str, Any]:
    """Both jobs, shown and checked, as one JSON document."""
    began = time.monotonic()
    engine = open_engine(endpoints["database"]["url"], pool_size=1)
    failures: list[str] = []
    chapters: dict[str, Chapter] = {}
    run = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    try:
        product = make_product(f"{_FOLDER}/{run}", "VASE-2001", seed=7)
        display.product(product)
        chapters["delivered"] = _deliver(endpoints, engine, product, f"demo-{run}", display)
        broken = break_model(make_product(f"{_FOLDER}/{run}-broken", "VASE-2002", seed=8))
        chapters["refused"] = _refuse(endpoints, engine, broken, f"demo-{run}-broken", display)
    except TourStopped as stopped:
        failures.append(str(stopped))
    finally:
        engine.dispose()
    failures += [failure for chapter in chapters.values() for failure in chapter.failures]
    return {
        "ok": not failures,
        "failures": failures,
        "took_seconds": round(time.monotonic() - began, 2),
        **{name: chapter.to_json() for name, chapter in chapters.items()},
    }


def _deliver(endpoints: Endpoints, engine: Engine, product: Product, job_id: str, display: Display) -> Chapter:
    chapter = _run_chapter(endpoints, engine, product, job_id, display)
    check_delivered(chapter, product.delivered, Path(endpoints["sftp"]["root"]))
    display.delivered(chapter, Path(endpoints["sftp"]["root"]))
    return chapter


def _refuse(endpoints: Endpoints, engine: Engine, product: Product, job_id: str, display: Display) -> Chapter:
    display.broken("the same kind of product with a broken model (a triangle uses a vertex that does not exist):")
    chapter = _run_chapter(endpoints, engine, product, job_id, display)
    check_refused(chapter, Path(endpoints["sftp"]["root"]))
    display.refused(chapter)
    return chapter


def _run_chapter(endpoints: Endpoints, engine: Engine, product: Product, job_id: str, display: Display) -> Chapter:
    chapter = Chapter(job_id, product.sku)
    row_id = place_product(endpoints["s3"], engine, job_id, product, campaign=CAMPAIGN)
    chapter.rows_before = read_rows(engine, job_id, product.sku)
    began = time.monotonic()
    job = {"job_id": job_id, "username": USERNAME, "campaign": CAMPAIGN, "row_id": row_id}
    display.request(f"POST {endpoints['api']['url']}/process-job {json.dumps(job)}", f"POST /process-job {json.dumps(job)}")
    with display.progress() as on_status:
        chapter.status, chapter.timeline = run_job(endpoints, job, on_status)
    chapter.took_seconds = round(time.monotonic() - began, 2)
    chapter.rows_after = read_rows(engine, job_id, product.sku)
    chapter.files = list_delivered(Path(endpoints["sftp"]["root"]), job_id)
    return chapter


def _tell_result(result: dict[str, Any], display: Display) -> int:
    if display.quiet:
        sys.stdout.write(json.dumps(result, indent=2, default=str) + "\n")
        sys.stdout.flush()
    display.result(result["failures"], result["took_seconds"])
    return 0 if result["ok"] else 1


def _remove_former_runs(state_dir: Path) -> None:
    """What earlier demos put into this folder's bucket and destination; only while the parts are down."""
    for folder in [state_dir / "s3" / BUCKET / _FOLDER, *(state_dir / "sftp").glob("demo-*")]:
        shutil.rmtree(folder, ignore_errors=True)
