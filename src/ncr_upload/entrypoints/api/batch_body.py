"""Read the jobs of a batch from its body, within bounded memory and without holding up other requests."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, TypeAdapter, ValidationError

from ncr_upload.domain.jobs import NewJob
from ncr_upload.entrypoints.api.bodies import MAX_SMALL_BODY_BYTES
from ncr_upload.entrypoints.api.json_size import TooManyValues, check_size
from ncr_upload.entrypoints.api.models import MAX_BATCH_JOBS, JobRequest
from ncr_upload.entrypoints.api.problems import ERRORS_SHOWN

MAX_CONTAINERS = MAX_BATCH_JOBS + 2
"""The list and its jobs; one more is for the parser to say how many there are."""

MAX_VALUES = 10 * MAX_BATCH_JOBS
"""A job has four. The rest is for fields that are none, which are named to the caller."""

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
        check_size(body, max_containers=MAX_CONTAINERS, max_values=MAX_VALUES)
        return [job.to_job() for job in _batches.validate_json(body)]
    except TooManyValues as error:
        words = f"holds {error}, and a batch may have {MAX_BATCH_JOBS} jobs of 4 fields"
        raise _invalid("value_error", words) from None
    except ValidationError as error:
        raise RequestValidationError(_described(error)) from None
    finally:
        body.clear()


def _described(error: ValidationError) -> list[dict[str, Any]]:
    """Return the first errors in full; the others are only counted."""
    found = error.errors(include_url=False, include_input=False, include_context=True)
    return [{**each, "loc": ("body", *each["loc"])} for each in found[:ERRORS_SHOWN]] + [
        {"type": each["type"], "loc": ("body",), "msg": ""} for each in found[ERRORS_SHOWN:]
    ]


def _is_json(content_type: str) -> bool:
    kind, _, subtype = content_type.partition(";")[0].strip().lower().partition("/")
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))


def _invalid(kind: str, words: str) -> RequestValidationError:
    return RequestValidationError([{"type": kind, "loc": ("body",), "msg": words}])
