"""Speak HTTP/1.1 over one connection: a request without a body, and its answer.

`http.client` takes twice the processor time for an answer of 50 KB, most of it for the header lines, and more switches between
threads. Strict where servers and proxies have differed: folded header lines and unclear lengths are refused.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping

MAX_HEAD_BYTES = 64 * 1024
"""Also what one call reads ahead."""

MAX_LINE_BYTES = 4096
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) (\d{3})(?: [^\r\n]*)?")
_UNSENDABLE = re.compile(r"[\x00-\x1f\x7f]")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?")


class AnswerCut(ConnectionResetError):
    """The server closed the connection before the answer was complete."""


class AnswerMalformed(OSError):
    """What came is not HTTP/1.1, or not within the bounds."""


class Connection:
    """A connected socket and what has been read ahead from it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = bytearray(MAX_HEAD_BYTES)
        self._start = self._end = 0

    def close(self) -> None:
        self.sock.close()

    def send(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        if " " in path or any(map(_UNSENDABLE.search, lines)):
            raise ValueError("a request with a space or a control character")
        self.sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))

    def receive(self, method: str) -> Response:
        """Read the head of an answer. Raises `AnswerCut`, `AnswerMalformed`, `OSError`."""
        while True:
            response = Response(self, method, self._read_head())
            if response.status >= 200:
                return response

    def _read_head(self) -> bytes:
        while (found := self._buffer.find(b"\r\n\r\n", self._start, self._end)) < 0:
            self._read_ahead()
        head = bytes(self._buffer[self._start : found])
        self._start = found + 4
        return head

    def read_line(self) -> bytes:
        while (found := self._buffer.find(b"\r\n", self._start, self._end)) < 0:
            if self._end - self._start > MAX_LINE_BYTES:
                raise AnswerMalformed("a line is too long")
            self._read_ahead()
        line = bytes(self._buffer[self._start : found])
        self._start = found + 2
        return line

    def _read_ahead(self) -> None:
        if self._start:
            held = self._end - self._start
            self._buffer[:held] = self._buffer[self._start : self._end]
            self._start, self._end = 0, held
        if self._end == len(self._buffer):
            raise AnswerMalformed("the head of the answer is too long")
        count = self.sock.recv_into(memoryview(self._buffer)[self._end :])
        if not count:
            raise AnswerCut
        self._end += count

    def read_into(self, view: memoryview) -> int:
        """Read until `view` is full or the connection ends; return the count."""
        filled = min(len(view), self._end - self._start)
        if filled:
            view[:filled] = memoryview(self._buffer)[self._start : self._start + filled]
            self._start += filled
        while filled < len(view):
            count = self.sock.recv_into(view[filled:])
            if not count:
                break
            filled += count
        return filled

    @property
    def has_read_ahead(self) -> bool:
        return self._end > self._start


class Response:
    """An answer whose head has been read."""

    def __init__(self, connection: Connection, method: str, head: bytes) -> None:
        self._connection = connection
        first, *lines = head.split(b"\r\n")
        status = _STATUS_LINE.fullmatch(first)
        if status is None:
            raise AnswerMalformed("no HTTP status line")
        self.status = int(status[2])
        self.headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon or not _NAME.fullmatch(name):
                raise AnswerMalformed("a header line without a name")
            key, text = name.decode("ascii").lower(), value.strip(b" \t").decode("latin-1")
            if key in ("content-length", "transfer-encoding", "location") and self.headers.get(key, text) != text:
                raise AnswerMalformed(f"two different headers {key}")
            self.headers[key] = text
        self._left = self._find_length(method)
        self._is_chunked = self._left is None and "transfer-encoding" in self.headers
        self._in_chunk = 0
        self.is_complete = self._left == 0
        wishes = self.headers.get("connection", "keep-alive" if status[1] == b"1" else "close").lower()
        self.keeps_connection = "close" not in wishes and (self._left is not None or self._is_chunked)

    def _find_length(self, method: str) -> int | None:
        """Return the length of the body; None when only its chunks or the connection's end tell."""
        if method == "HEAD" or self.status in (204, 304) or self.status < 200:
            return 0
        coding = self.headers.get("transfer-encoding")
        if coding is not None:
            if coding.lower() != "chunked" or "content-length" in self.headers:
                raise AnswerMalformed("the length of the body is unclear")
            return None
        announced = self.headers.get("content-length")
        if announced is None:
            return None
        if not (announced.isascii() and announced.isdecimal() and len(announced) <= 18):
            raise AnswerMalformed("the length of the body is not a number")
        return int(announced)

    def read_into(self, view: memoryview) -> int:
        """Read until `view` is full or the body ends; return the count. Raises `AnswerCut`, `AnswerMalformed`, `OSError`."""
        if self.is_complete or not view:
            return 0
        if self._is_chunked:
            return self._read_chunks_into(view)
        wanted = len(view) if self._left is None else min(len(view), self._left)
        count = self._connection.read_into(view[:wanted])
        if self._left is None:
            self.is_complete = count < wanted
            return count
        self._left -= count
        self.is_complete = self._left == 0
        if not count:
            raise AnswerCut
        return count

    def read(self, limit: int) -> bytes:
        """Return the body, or its first `limit` bytes."""
        content = bytearray(limit if self._left is None else min(limit, self._left))
        filled = 0
        while filled < len(content) and (count := self.read_into(memoryview(content)[filled:])):
            filled += count
        return bytes(content[:filled])

    def _read_chunks_into(self, view: memoryview) -> int:
        filled = 0
        while filled < len(view):
            if not self._in_chunk:
                size = _CHUNK_LINE.fullmatch(self._connection.read_line())
                if size is None:
                    raise AnswerMalformed("the body is not in chunks")
                self._in_chunk = int(size[1], 16)
                if not self._in_chunk:
                    for _ in range(MAX_LINE_BYTES):
                        if not self._connection.read_line():
                            self.is_complete = True
                            return filled
                    raise AnswerMalformed("too many trailers")
            wanted = min(self._in_chunk, len(view) - filled)
            count = self._connection.read_into(view[filled : filled + wanted])
            if count < wanted:
                raise AnswerCut
            filled += count
            self._in_chunk -= count
            if not self._in_chunk and self._connection.read_line():
                raise AnswerMalformed("a chunk does not end where it said")
        return filled
