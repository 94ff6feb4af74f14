"""HTTP as the server reads it from a connection, before there is a request."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ncr_upload.entrypoints.api.problems import KINDS, problem


class ProblemProtocol(HttpToolsProtocol):
    """Answers what is no HTTP (TLS sent to a port without it, a Content-Length that is none) with a problem too."""

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - the server's signature
        answer = problem("malformed_request", KINDS["malformed_request"].detail, headers={"Connection": "close"})
        head = b"".join(b"%s: %s\r\n" % pair for pair in answer.raw_headers)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head + b"\r\n" + bytes(answer.body))
        self.transport.close()
