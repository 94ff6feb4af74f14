"""The one table from what went wrong to HTTP: `application/problem+json` (RFC 9457) with a stable `code`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ncr_upload.domain.errors import DeliveryError, Unavailable
from ncr_upload.domain.redaction import Redactor

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:ncr-upload:problem:"
ERRORS_SHOWN = 100
TEXT_SHOWN = 300
RETRY_AFTER_SECONDS = 5
ADDRESSES = "GET /docs shows every address, and what may be sent there."
WORDS = {
    "extra_forbidden": "is no field of this request",
    "list_type": "must be a JSON list",
    "missing": "is missing",
    "model_attributes_type": "must be a JSON object",
    "model_type": "must be a JSON object",
    "too_long": "has {actual_length} items, and may have {max_length} at most",
    "too_short": "has {actual_length} items, and needs {min_length} at least",
}
"""What is said of a field, where the library's own words are for its programmers."""
NOT_THE_JSON_ASKED_FOR = frozenset({"missing", "model_attributes_type", "model_type", "list_type"})


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of problem: its stable code, HTTP status and title, and an example for the documentation, whose `next_step` is
    told wherever the problem is raised without one of its own."""

    code: str
    status: int
    title: str
    detail: str
    example: dict[str, Any]


_KINDS = (
    Kind(
        "unauthorized",
        401,
        "Not allowed",
        "This request needs the API key.",
        {"next_step": "Send the header X-API-Key with the value of API_KEY."},
    ),
    Kind(
        "malformed_request",
        400,
        "Not HTTP",
        "What was sent cannot be read as an HTTP request.",
        {"next_step": "Send HTTP/1.1 without TLS, with an address below 64 KiB and one Content-Length that is right."},
    ),
    Kind("not_found", 404, "No such address", "There is nothing at /nowhere.", {"next_step": ADDRESSES}),
    Kind(
        "task_unknown",
        404,
        "No such task",
        "There is no task '0b9f4b1e'.",
        {
            "next_step": "Use a task_id as /process-job answered it; GET /jobs/active lists those that run. Tasks that ended "
            "more than HISTORY_DAYS ago are forgotten."
        },
    ),
    Kind(
        "batch_unknown",
        404,
        "No such batch",
        "There is no batch '9d1c2a52'.",
        {
            "next_step": "Use a batch_id as /process-batch answered it. Batches that ended more than HISTORY_DAYS ago are "
            "forgotten."
        },
    ),
    Kind("method_not_allowed", 405, "Method not allowed", "GET is not answered here; send POST.", {"next_step": ADDRESSES}),
    Kind(
        "already_running",
        409,
        "Already in flight",
        "Job job-1 is already in flight.",
        {
            "task_id": "0b9f4b1e-8c1d-4c52-9c53-0f1b9f1e8a11",
            "running": [{"job_id": "job-1", "task_id": "0b9f4b1e-8c1d-4c52-9c53-0f1b9f1e8a11"}],
            "next_step": "Follow that task, or send the job again once it has ended.",
        },
    ),
    Kind(
        "already_ended",
        409,
        "Already ended",
        "The task has already ended as 'completed'.",
        {"next_step": "Nothing to do: see its history."},
    ),
    Kind(
        "being_published",
        409,
        "Too late to cancel",
        "The package is being published.",
        {"next_step": "Follow the task: it ends within seconds."},
    ),
    Kind(
        "body_timeout",
        408,
        "Request too slow",
        "Only 65536 bytes of the body arrived in 10 s.",
        {"next_step": "Send the request again over a faster connection, or split the batch; nothing was accepted."},
    ),
    Kind(
        "body_too_large",
        413,
        "Request too large",
        "The body is larger than 16777216 bytes.",
        {"next_step": "Split the batch; nothing was accepted."},
    ),
    Kind(
        "encoding_unsupported",
        415,
        "Encoded body",
        "A body with Content-Encoding: gzip is not read.",
        {"next_step": "Send the JSON as it is, without Content-Encoding; nothing was accepted."},
    ),
    Kind(
        "invalid_request",
        422,
        "Bad input",
        "username: is missing",
        {
            "errors": [{"field": "username", "message": "is missing"}],
            "next_step": "Correct what is named and send it again; GET /docs shows each request. Nothing was accepted.",
        },
    ),
    Kind(
        "duplicate_jobs",
        422,
        "A job is named twice",
        "[0].job_id and [2].job_id are both 'job-1'.",
        {
            "errors": [{"field": "[2].job_id", "message": "[0].job_id and [2].job_id are both 'job-1'."}],
            "next_step": "Name each job once and send the batch again. Nothing was accepted.",
        },
    ),
    Kind(
        "idempotency_key_reused",
        422,
        "Key used for another request",
        "The Idempotency-Key 'k-1' was used before, for another request.",
        {"next_step": "Use a new key for a new request."},
    ),
    Kind(
        "internal_error",
        500,
        "Unexpected error",
        "Something unexpected happened here; it is in the log under this reference.",
        {"reference": "3f0c9a52d7e1", "next_step": "Tell the operator the reference."},
    ),
    Kind(
        "nothing_failed",
        409,
        "Nothing to try again",
        "No job of the batch has failed.",
        {"next_step": "Nothing to do; see the batch's status."},
    ),
    Kind(
        "bodies_in_flight",
        503,
        "Too many large requests now",
        "As many request bodies are being read as fit into this process's memory.",
        {"retry_after_seconds": 2, "next_step": "Send the request again later; nothing was accepted."},
    ),
    Kind(
        "memory_pressure",
        503,
        "Too little memory now",
        "Memory is at 91.3 %, the limit is 80 %.",
        {
            "retry_after_seconds": 30,
            "memory": {"used_bytes": 1960574976, "total_bytes": 2147483648, "used_percent": 91.3, "limit_percent": 80.0},
            "next_step": "Send the request again later; nothing was accepted.",
        },
    ),
    Kind(
        "unavailable",
        503,
        "A part does not answer",
        "the database did not answer within 2.5 s",
        {"retry_after_seconds": 5, "next_step": "Check that the database runs; send the request again."},
    ),
)
KINDS = {kind.code: kind for kind in _KINDS}
"""Every kind, by code. An `Unavailable` keeps its own code (``database_unavailable``) and takes the rest from `unavailable`."""


class ProblemFound(Exception):
    """Raised by a route to answer with a problem."""

    def __init__(self, code: str, detail: str, *, headers: dict[str, str] | None = None, **extra: Any) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.headers = headers
        self.extra = extra


def problem(
    code: str, detail: str, *, kind: str | None = None, headers: dict[str, str] | None = None, **extra: Any
) -> JSONResponse:
    """The answer for a problem of `kind` (default: the kind named as its code). `extra` are further members;
    `retry_after_seconds` among them is sent as the header Retry-After too, and `next_step` is the kind's unless given."""
    known = KINDS[kind or code]
    extra.setdefault("next_step", known.example["next_step"])
    headers = dict(headers or {})
    if "retry_after_seconds" in extra:
        headers["Retry-After"] = str(extra["retry_after_seconds"])
    body = {"type": TYPE_PREFIX + code, "title": known.title, "status": known.status, "code": code, "detail": detail, **extra}
    return JSONResponse(body, known.status, headers, MEDIA_TYPE)


def unavailable_problem(error: Unavailable) -> JSONResponse:
    """503 with the reason, the next step and when to come again."""
    seconds = RETRY_AFTER_SECONDS if error.retry_after_seconds is None else max(1, math.ceil(error.retry_after_seconds))
    return problem(error.code, error.message, kind="unavailable", next_step=error.next_step, retry_after_seconds=seconds)


def internal_problem(reference: str) -> JSONResponse:
    """500: says where to look, nothing of what happened."""
    kind = KINDS["internal_error"]
    return problem(kind.code, kind.detail, reference=reference)


def render_problems(app: FastAPI, redactor: Redactor) -> None:
    """Answer every error that has a place in the table by it. The rest is `internal_error`, see `middleware.RequestLog`. What
    an outside part said goes through the redactor; what the caller sent comes back as it is."""

    async def found(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ProblemFound)
        return problem(error.code, error.detail, headers=error.headers, **error.extra)

    async def delivery(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, DeliveryError)
        redactor.redact_error(error)
        if isinstance(error, Unavailable):
            return unavailable_problem(error)
        return problem(error.code, error.message, kind="invalid_request", next_step=error.next_step)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _invalid_problem(error.errors())

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _http_problem(request, error)

    app.add_exception_handler(ProblemFound, found)
    app.add_exception_handler(DeliveryError, delivery)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _http_problem(request: Request, error: HTTPException) -> JSONResponse:
    headers = dict(error.headers or {})
    match error.status_code:
        case 404:
            return problem("not_found", f"There is nothing at {shown(request.url.path)}.", headers=headers)
        case 405:
            allowed = headers["Allow"] = headers.get("Allow", "").replace("GET", "GET, HEAD")
            told = f"{shown(request.method)} is not answered here; send {allowed.replace(', ', ' or ')}."
            return problem("method_not_allowed", told, headers=headers)
        case 408:
            return problem("body_timeout", error.detail, headers=headers)
        case 413:
            return problem("body_too_large", error.detail, headers=headers)
        case _:  # the framework's only other one: 400, a body it cannot parse
            unread = [{"field": "body", "message": "cannot be read as JSON in UTF-8"}]
            return problem("invalid_request", "body: cannot be read as JSON in UTF-8", headers=headers, errors=unread)


def too_large_problem(limit_bytes: int) -> JSONResponse:
    """413; the connection ends too, since the rest of the body is not read."""
    detail = f"The body is larger than {limit_bytes} bytes."
    return problem("body_too_large", detail, headers={"Connection": "close"})


def encoding_problem(encoding: str) -> JSONResponse:
    """415; the connection ends too, since the rest of the body is not read."""
    detail = f"A body with Content-Encoding: {shown(encoding)} is not read."
    return problem("encoding_unsupported", detail, headers={"Connection": "close"})


def bodies_in_flight_problem() -> JSONResponse:
    """503; the connection ends too, since the body is not read."""
    kind = KINDS["bodies_in_flight"]
    seconds = kind.example["retry_after_seconds"]
    return problem(kind.code, kind.detail, headers={"Connection": "close"}, retry_after_seconds=seconds)


def _invalid_problem(errors: Sequence[Any]) -> JSONResponse:
    fields = [{"field": _field(error), "message": shown(_words(error))} for error in errors[:ERRORS_SHOWN]]
    first = "; ".join(f"{error['field']}: {error['message']}" for error in fields[:3])
    more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
    return problem("invalid_request", first + more, errors=fields)


def _words(error: Any) -> str:
    if error["type"] == "json_invalid" and len(error["loc"]) == 1:
        return f"not JSON: {error['ctx']['error']}"
    if error["type"] == "json_invalid":
        return f"not JSON at character {error['loc'][-1]}: {error['ctx']['error']}"
    words = WORDS.get(error["type"], "").format_map(error.get("ctx", {})) or str(error["msg"]).removeprefix("Value error, ")
    if len(error["loc"]) == 1 and error["type"] in NOT_THE_JSON_ASKED_FOR:
        return f"{words}, sent with Content-Type: application/json"
    return words


def _field(error: Any) -> str:
    """``username``, ``[2].job_id``, ``limit``; ``body`` for the body as a whole."""
    where, *path = error["loc"]
    if error["type"] == "json_invalid" or not path:
        return str(where)
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return shown(name.removeprefix("."))


def shown(text: str) -> str:
    """Text of the caller's as it may be sent back: printable (JSON cannot carry half a surrogate pair), not long."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text[:TEXT_SHOWN])


def document(*codes: str) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these kinds of problem, with an example of each."""
    answers: dict[int | str, dict[str, Any]] = {}
    for code in (*codes, "unauthorized", "internal_error"):
        kind = KINDS[code]
        answer = answers.setdefault(kind.status, {"description": kind.title, "content": {MEDIA_TYPE: {"examples": {}}}})
        body = {
            "type": TYPE_PREFIX + code,
            "title": kind.title,
            "status": kind.status,
            "code": code,
            "detail": kind.detail,
            **kind.example,
        }
        answer["content"][MEDIA_TYPE]["examples"][code] = {"value": body}
        answer["content"][MEDIA_TYPE]["schema"] = {"$ref": "#/components/schemas/Problem"}
    return dict(sorted(answers.items(), key=lambda item: int(item[0])))
