"""Receiving one multipart upload on disk, in bounded memory and to a bounded size."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import IO

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from ncr_validator.problems import Problem

_DRAIN_SECONDS = 5.0
_DRAIN_BYTES = 64 * 1024 * 1024


class Body:
    """The body of one request while it arrives. `idle_seconds` bounds the wait for each next piece of it."""

    def __init__(self, request: Request, idle_seconds: float) -> None:
        self._idle_seconds = idle_seconds
        self.headers = request.headers
        self._scope = request.scope
        self._receive = request.receive
        self._complete = False

    async def _next(self) -> Message:
        try:
            async with asyncio.timeout(self._idle_seconds):
                message = await self._receive()
        except TimeoutError:
            self._complete = True  # nothing more is waited for
            raise Problem(408, "upload_stalled", f"Nothing of the upload came for {self._idle_seconds:g} s.") from None
        self._complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def parse(self, max_bytes: int) -> FormData:
        """The multipart form, its file on disk. Raises `Problem`."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await self._next()
            received += len(message.get("body", b""))
            if received > max_bytes:
                raise Problem(413, "upload_too_large", f"The upload is larger than {max_bytes} bytes.")
            return message

        try:
            return await Request(self._scope, counted).form(max_files=1, max_fields=20)
        except ClientDisconnect as error:
            raise Problem(400, "upload_cut", "The upload ended before it was complete.") from error
        except (MultiPartException, HTTPException) as error:
            raise Problem(400, "bad_multipart", "The multipart body cannot be read.") from error

    async def drain(self) -> None:
        """Read what the caller still sends, for a while: cut off in mid-upload, it might never see our answer."""
        left = _DRAIN_BYTES
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                while left > 0 and not self._complete:
                    left -= len((await self._next()).get("body", b""))
        except (TimeoutError, Problem):
            return


@asynccontextmanager
async def receive_zip(body: Body, max_bytes: int) -> AsyncIterator[IO[bytes]]:
    """The file of the multipart field `zip_file`, spooled to disk, gone when the block ends.

    Works with and without Content-Length. Raises `Problem`: 408 when it stalls, 413 above `max_bytes`, 415 when it is no
    multipart body, 422 without the field, 400 when the body is no sound multipart.
    """
    if not body.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Problem(415, "not_multipart", "Send the zip as multipart/form-data, in the field 'zip_file'.")
    declared = body.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise Problem(413, "upload_too_large", f"The upload has {declared} bytes; the limit is {max_bytes}.")
    form = await body.parse(max_bytes)
    try:
        upload = form.get("zip_file")
        if not isinstance(upload, UploadFile):
            raise Problem(422, "zip_file_missing", "The multipart field 'zip_file' is missing or is not a file.")
        yield upload.file
    finally:
        await form.close()
