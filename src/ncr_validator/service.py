"""The HTTP service: the contract of docs/contract.md, section 4, around `judgement`."""

from __future__ import annotations

import asyncio
import hmac
import logging
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ncr_validator.archive import NoRoom
from ncr_validator.bench import Bench, Undecided
from ncr_validator.judgement import judge_package
from ncr_validator.limits import MB, Limits
from ncr_validator.problems import Problem
from ncr_validator.turns import Turns
from ncr_validator.uploads import Body, receive_zip
from ncr_validator.verdicts import Report

_log = logging.getLogger("ncr_validator")


def make_app(key: str, limits: Limits) -> FastAPI:
    """The service. Callers send `key` in X-API-Key. Raises `EngineMissing`."""
    benches = [Bench(limits) for _ in range(limits.concurrency)]
    turns = Turns(limits, benches)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.warm_up = asyncio.create_task(asyncio.to_thread(benches[0].warm_up))
        try:
            yield
        finally:
            await asyncio.gather(app.state.warm_up, return_exceptions=True)
            for bench in benches:
                bench.close()

    app = FastAPI(title="NCR bundled validator", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_exception_handler(HTTPException, _plain)
    app.add_exception_handler(Exception, _unexpected)

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """200 once the engine has answered; 503 before that or when it cannot start."""
        return _health(app.state.warm_up, benches[0], turns)

    @app.post("/validate/{sku_id}", responses=_CONTRACT, openapi_extra=_UPLOAD)
    async def validate(sku_id: str, request: Request) -> JSONResponse:
        """Judge the package of `sku_id`: multipart field `zip_file`, key in X-API-Key."""
        body = Body(request, limits.upload_idle_seconds)
        try:
            given = request.headers.get("x-api-key", "")
            if not hmac.compare_digest(given.encode(), key.encode()):
                raise Problem(401, "bad_api_key", "The header X-API-Key is missing or wrong.")
            with turns.place():
                async with receive_zip(body, limits.max_upload_mb * MB) as upload, turns.bench() as bench:
                    report = await asyncio.to_thread(_judge, upload, sku_id, limits, bench)
        except Problem as problem:
            await body.drain()
            return problem.response()
        _log.info("judged %s: %s, %d files, %d issues", sku_id, report.result, len(report.files), len(report.issues))
        return JSONResponse({"data": [report.to_json()]})

    return app


def _judge(upload: IO[bytes], sku: str, limits: Limits, bench: Bench) -> Report:
    try:
        with tempfile.TemporaryDirectory(prefix="ncr-validator-", dir=limits.work_dir) as folder:
            return judge_package(upload, sku, Path(folder), limits, bench)
    except Undecided as error:
        _log.warning("no verdict on %s: %s", sku, error)
        raise Problem(503, "no_verdict", f"{error}. This is no verdict; try again.", retry_after_seconds=10) from error
    except NoRoom as error:
        _log.warning("no verdict on %s: %s", sku, error)
        raise Problem(503, "disk_full", f"{error}. This is no verdict; try again.", retry_after_seconds=60) from error
    except OSError as error:
        _log.exception("no verdict on %s", sku)
        raise Problem(503, "no_verdict", f"The validator's disk or system failed: {error.strerror}.", 30) from error


def _health(warm_up: asyncio.Task[None], bench: Bench, turns: Turns) -> JSONResponse:
    engines = bench.engines()
    state = "ok" if engines["gltf-validator"] else "engine_failed" if warm_up.done() else "starting"
    body = {"status": state, "engines": engines, "profile": bench.profile.name, "places": turns.places}
    return JSONResponse(body, 200 if state == "ok" else 503)


async def _plain(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return Problem(error.status_code, "http_error", str(error.detail)).response()


async def _unexpected(_request: Request, _error: Exception) -> JSONResponse:
    return Problem(500, "internal_error", "The validator failed; its log has the reason. This is no verdict.").response()


_PROBLEM: dict[str, Any] = {"content": {"application/problem+json": {}}}
_CONTRACT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The verdict",
        "content": {"application/json": {"example": {"data": [{"result": "Valid", "sku_id": "SKU1", "issues": []}]}}},
    },
    **{
        status: {"description": text, **_PROBLEM}
        for status, text in {
            400: "The multipart body is damaged",
            401: "No key or a wrong one",
            408: "The upload stalled",
            413: "The upload is too large",
            415: "No multipart body",
            422: "No zip_file in it",
            503: "Busy, or a part failed: no verdict, try again",
        }.items()
    },
}
_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["zip_file"],
                    "properties": {"zip_file": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}
