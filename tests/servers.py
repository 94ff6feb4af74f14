"""Real servers for tests. Each picks a free port on 127.0.0.1, is ready on entry and ended, by its own pid, on exit."""

from __future__ import annotations

import getpass
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import asyncssh

from ncr_upload.adapters.sftp_dropoff import SftpLogin
from ncr_upload.entrypoints.embedded.sockets import find_free_port
from parts import DEBIAN_RCLONE, require

READY_SECONDS = 20
PORT_TRIES = 5


# --- object storage ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class S3Server:
    """`folder` holds one folder per bucket: files go there only before the server starts, else by its API."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str
    folder: Path

    def put(self, key: str, content: bytes) -> None:
        import boto3
        from botocore.config import Config

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
        )
        client.put_object(Bucket=self.bucket, Key=key, Body=content)


@contextmanager
def start_s3(folder: Path, bucket: str = "studio", *more: str) -> Iterator[S3Server]:
    """rclone's S3 server: checks signatures, keeps objects as files. `more`: further options of it."""
    access_key, secret_key = "test-access-key", "test-secret-key"
    (folder / bucket).mkdir(parents=True, exist_ok=True)
    command = [require("rclone"), "serve", "s3", "--config", "", "--addr", "127.0.0.1:0"]
    command += ["--auth-key", f"{access_key},{secret_key}", *more, str(folder)]
    with run_server(command, r"Starting s3 server on \[(?P<found>http://[^/]+)/\]") as endpoint:
        yield S3Server(endpoint, access_key, secret_key, bucket, folder)


# --- SFTP -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SftpServer:
    """`folder` on this disk is what the login sees as `base_dir`. `fault` is for servers that take one."""

    login: SftpLogin
    base_dir: str
    folder: Path
    control: Path | None = None

    def fault(self, name: str) -> None:
        """Make the server misbehave from now on, see `sftp_program`; '' heals it."""
        assert self.control is not None
        part = self.control.with_suffix(".part")
        part.write_text(name)
        part.replace(self.control)

    def with_login(self, **changes: object) -> SftpLogin:
        return replace(self.login, **changes)  # type: ignore[arg-type]


@contextmanager
def start_asyncssh(folder: Path, *, extensions: bool = True) -> Iterator[SftpServer]:
    """An asyncssh server that can be told to fail; without `extensions` it speaks bare SFTP version 3."""
    root, key = folder / "root", folder / "host_key"
    root.mkdir(parents=True)
    public = _make_key(key)
    control = folder / "fault"
    control.write_text("")
    command = [sys.executable, str(Path(__file__).with_name("sftp_program.py"))]
    command += [str(root), str(key), str(control), "partner", "secret"] + ([] if extensions else ["--plain"])
    with run_server(command, r"listening on (?P<found>\d+)") as port:
        login = SftpLogin("127.0.0.1", int(port), "partner", "secret", host_key=public)
        yield SftpServer(login, "/", root, control)


@contextmanager
def start_sshd(
    folder: Path, *, max_sessions: int = 10, user: str | None = None, refusing: bool = False
) -> Iterator[SftpServer]:
    """OpenSSH's own server with its own configuration, by key for the current user. As root another `user` of this machine
    may be named, who must be able to enter `folder`. With `refusing`, `fault("-P rename")` gives that option to the SFTP server
    of each session to come."""
    program = require("sshd")
    root, key, user_key = folder / "root", folder / "host_key", folder / "user_key"
    root.mkdir(parents=True)
    public = _make_key(key)
    (folder / "authorized_keys").write_text(_make_key(user_key) + "\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's privilege separation needs it
    control, subsystem = (folder / "options", _write_subsystem(folder)) if refusing else (None, "internal-sftp")
    config = folder / "sshd_config"
    config.write_text(
        f"ListenAddress 127.0.0.1\nHostKey {key}\nAuthorizedKeysFile {folder / 'authorized_keys'}\nPidFile none\nUsePAM no\n"
        f"StrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\nMaxSessions {max_sessions}\n"
        f"Subsystem sftp {subsystem}\nLogLevel INFO\n"
    )
    for attempt in range(PORT_TRIES):
        port = free_port()
        command = [program, "-D", "-e", "-f", str(config), "-p", str(port)]
        try:
            with run_server(command, rf"Server listening on 127\.0\.0\.1 port (?P<found>{port})") as _:
                login = SftpLogin("127.0.0.1", port, user or getpass.getuser(), private_key=user_key, host_key=public)
                yield SftpServer(login, str(root), root, control)
                return
        except ServerDied:
            if attempt == PORT_TRIES - 1:
                raise


def _write_subsystem(folder: Path) -> Path:
    """Write the program that sshd starts for each session: OpenSSH's SFTP server, with the options in a file."""
    program, options = folder / "sftp", folder / "options"
    options.write_text("")
    program.write_text(f"#!/bin/sh\nexec {require('sftp-server')} $(cat {options})\n")
    program.chmod(0o755)
    return program


@contextmanager
def start_rclone(folder: Path) -> Iterator[SftpServer]:
    """Debian's rclone as an SFTP server. Its version 1.60 answers that it has made a hard link, and makes none."""
    root, key, user_key = folder / "root", folder / "host_key", folder / "user_key"
    root.mkdir(parents=True)
    public = _make_key(key)
    (folder / "authorized_keys").write_text(_make_key(user_key) + "\n")
    for attempt in range(PORT_TRIES):
        port = free_port()
        command = [require(DEBIAN_RCLONE), "serve", "sftp", "--config", "", "--addr", f"127.0.0.1:{port}", "--key", str(key)]
        command += ["--authorized-keys", str(folder / "authorized_keys"), str(root)]
        try:
            with run_server(command, rf"SFTP server listening on (?P<found>\S+:{port})"):
                login = SftpLogin("127.0.0.1", port, "partner", private_key=user_key, host_key=public)
                yield SftpServer(login, "/", root)
                return
        except ServerDied:
            if attempt == PORT_TRIES - 1:
                raise


def _make_key(path: Path) -> str:
    """Write a new private key; its public line."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    path.touch(mode=0o600)
    path.write_bytes(key.export_private_key())
    return key.export_public_key().decode().strip()


# --- HTTP -------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What a scripted server sends. `announced` overrides Content-Length; with `cut` the connection is closed instead;
    with `drip_seconds` the body comes one byte in so many seconds."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    announced: int | None = None
    delay_seconds: float = 0
    cut: bool = False
    drip_seconds: float = 0


@dataclass
class Request:
    """As it came; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class HttpServer:
    """Gives `answers` in turn, the last one for ever, and keeps the requests."""

    url: str
    answers: list[Answer]
    requests: list[Request] = field(default_factory=list)

    def answer_to(self, _request: Request) -> Answer:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


KEPT_HEADERS = {"etag", "last-modified", "content-type", "content-range", "accept-ranges", "retry-after"}
Forward = Callable[[], Answer]
"""Asks the real server and gives its answer."""


def pass_on(_request: Request, forward: Forward) -> Answer:
    """A gateway that spoils nothing."""
    return forward()


@dataclass
class Gateway(HttpServer):
    """In front of a real HTTP server at `upstream` (scheme, host and port); `spoil` decides what the client is told."""

    upstream: str = ""
    spoil: Callable[[Request, Forward], Answer] = pass_on

    def answer_to(self, request: Request) -> Answer:
        return self.spoil(request, lambda: self.forward(request))

    def forward(self, request: Request) -> Answer:
        """The real server's answer. `Host` stays as the client sent it, so that its signature holds."""
        connection = HTTPConnection(self.upstream.rpartition("/")[2], timeout=60)
        headers = {name: value for name, value in request.headers.items() if name not in ("transfer-encoding", "connection")}
        connection.request(
            request.method, request.path, request.body or None, {**headers, "content-length": str(len(request.body))}
        )
        answer = connection.getresponse()
        told = {name: value for name, value in answer.getheaders() if name.lower() in KEPT_HEADERS}
        body = answer.read()
        size = int(answer.headers.get("Content-Length", len(body)))
        connection.close()
        return Answer(answer.status, body, told, announced=size if request.method == "HEAD" else None)


class _Scripted(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _QuietServer

    def reply(self) -> None:
        script = self.server.script
        request = Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, self.read_body())
        script.requests.append(request)
        answer = script.answer_to(request)
        time.sleep(answer.delay_seconds)
        self.close_connection = True
        if not answer.cut:
            self.send(answer)

    do_GET = do_POST = do_HEAD = reply

    def send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(answer.body) if answer.announced is None else answer.announced))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if not answer.drip_seconds:
            self.wfile.write(answer.body)
            return
        for byte in answer.body:
            self.wfile.write(bytes([byte]))
            time.sleep(answer.drip_seconds)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, format: str, *args: object) -> None:
        """Tests read `requests`."""


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    script: HttpServer

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what some tests are about."""


@contextmanager
def start_http(*answers: Answer) -> Iterator[HttpServer]:
    script = HttpServer("", list(answers))
    with _serve(script):
        yield script


@contextmanager
def start_gateway(upstream: str) -> Iterator[Gateway]:
    script = Gateway("", [], upstream=upstream)
    with _serve(script):
        yield script


@contextmanager
def _serve(script: HttpServer) -> Iterator[None]:
    server = _QuietServer(("127.0.0.1", 0), _Scripted)
    server.script = script
    script.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


# --- processes --------------------------------------------------------------------------------------------------


class ServerDied(RuntimeError):
    """It ended before it was ready."""


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens, and which no outgoing connection is given."""
    return find_free_port(set())


@contextmanager
def run_server(command: Sequence[str], ready: str) -> Iterator[str]:
    """Run a server until the block ends; yields what group `found` of `ready` matched in its output."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    found = threading.Event()
    value: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if not value and (match := re.search(ready, line)):
                value.append(match["found"])
                found.set()
        found.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        found.wait(READY_SECONDS)
        if not value:
            raise ServerDied(f"{command[0]} did not get ready: {''.join(lines[-20:])}")
        yield value[0]
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(5)
