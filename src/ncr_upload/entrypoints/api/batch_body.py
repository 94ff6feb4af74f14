"""Read the jobs of a batch from its body, within bounded memory and without holding up other requests."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from ncr_upload.domain.jobs import NewJob
from ncr_upload.entrypoints.api.bodies import MAX_SMALL_BODY_BYTES
from ncr_upload.entrypoints.api.json_size import TooMuch, check_size
from ncr_upload.entrypoints.api.models import MAX_BATCH_JOBS, JobRequest
from ncr_upload.entrypoints.api.problems import ERRORS_SHOWN

MAX_CONTAINERS = MAX_BATCH_JOBS + 2
"""The list and its jobs; one more is for the parser to say how many there are."""

MAX_VALUES = 10 * MAX_BATCH_JOBS
"""A job has four. The rest is for fields that are none, which are named to the caller."""

MAX_GAP = 16 * 1024
"""A name of 128 characters takes 1536 bytes at most, where each is escaped."""

ERRORS_BUILT = 1000
"""Errors of at most so many are built: one takes a kilobyte."""

ITEMS_AT_ONCE = 100

SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {"$ref": "#/components/schemas/JobRequest"},
    "minItems": 1,
    "maxItems": MAX_BATCH_JOBS,
    "title": "Body",
}
REQUEST_BODY: dict[str, Any] = {"required": True, "content": {"application/json": {"schema": SCHEMA}}}

_batches = TypeAdapter(Annotated[list[JobRequest], Field(min_length=1, max_length=MAX_BATCH_JOBS)])
_parser = ThreadPoolExecutor(1, thread_name_prefix="batch")
"""One batch at a time is built, since building takes more memory than what is built."""


async def read_batch(request: Request) -> list[NewJob]:
    """Return the jobs of the body. Raises `RequestValidationError` naming what is wrong with them."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
    if not body:
        raise _invalid("missing", "Field required")
    if not _is_json(request.headers.get("content-type", "")):
        raise _invalid("list_type", "Input should be a valid list")
    if len(body) <= MAX_SMALL_BODY_BYTES:
        return parse_batch(body)
    return await asyncio.get_running_loop().run_in_executor(_parser, parse_batch, body)


def parse_batch(body: bytearray) -> list[NewJob]:
    """Count, then build. Empties `body`."""
    try:
        check_size(body, max_containers=MAX_CONTAINERS, max_values=MAX_VALUES, max_gap=MAX_GAP)
        return [job.to_job() for job in _batches.validate_json(body)]
    except TooMuch as error:
        words = f"holds {error}, and a batch may have {MAX_BATCH_JOBS} jobs of 4 fields"
        raise _invalid("value_error", words) from None
    except ValidationError as error:
        raise RequestValidationError(_first_errors(error, body)) from None
    finally:
        body.clear()


def _first_errors(error: ValidationError, body: bytearray) -> list[dict[str, Any]]:
    """Return the first ERRORS_SHOWN errors in full; the others are one and the same, to be counted."""
    count = error.error_count()
    found = _errors_of(error, 0) if count <= ERRORS_BUILT else _errors_item_by_item(body)
    return found[:ERRORS_SHOWN] + [{"type": "more", "loc": ("body",), "msg": ""}] * (count - ERRORS_SHOWN)


def _errors_item_by_item(body: bytearray) -> list[dict[str, Any]]:
    items: list[Any] = from_json(body)
    found: list[dict[str, Any]] = []
    for start in range(0, len(items), ITEMS_AT_ONCE):
        try:
            _batches.validate_python(items[start : start + ITEMS_AT_ONCE])
        except ValidationError as error:
            found += _errors_of(error, start)
        if len(found) >= ERRORS_SHOWN:
            break
    return found


def _errors_of(error: ValidationError, first_index: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for each in error.errors(include_url=False, include_input=False):
        path = each["loc"]
        if path and isinstance(path[0], int):
            path = (path[0] + first_index, *path[1:])
        found.append({**each, "loc": ("body", *path)})
    return found


def _is_json(content_type: str) -> bool:
    kind, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))


def _invalid(kind: str, words: str) -> RequestValidationError:
    return RequestValidationError([{"type": kind, "loc": ("body",), "msg": words}])
