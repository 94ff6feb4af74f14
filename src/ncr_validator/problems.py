"""Errors of the HTTP service, as RFC 9457 has them."""

from __future__ import annotations

from http import HTTPStatus

from starlette.responses import JSONResponse


class Problem(Exception):
    """An answer other than 200. `code` is stable; `retry_after_seconds` goes into Retry-After."""

    def __init__(self, status: int, code: str, detail: str, retry_after_seconds: int | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after_seconds is None else {"Retry-After": str(self.retry_after_seconds)}
        body = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
        }
        return JSONResponse(body, self.status, headers, media_type="application/problem+json")
