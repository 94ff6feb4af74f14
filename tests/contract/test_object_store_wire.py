"""A storage that does not speak HTTP as it should: refused within bounds, and no byte of it is taken for an object's."""

from __future__ import annotations

import asyncio
import itertools
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from fault_table import fault
from ncr_upload.adapters.object_store import S3ObjectStore
from ncr_upload.adapters.object_store import client as object_client
from ncr_upload.adapters.object_store import store as object_store
from ncr_upload.application.ports import ObjectInfo
from ncr_upload.domain.errors import Unavailable
from patience import until

pytestmark = pytest.mark.anyio
Script = Callable[[str], Iterator[bytes]]
"""Given the head of a request, yields what is sent back; after the last of it the connection stays open."""

CONTENT = b"content of the object"
HEAD = b'HTTP/1.1 200 OK\r\nETag: "e-1"\r\nContent-Length: %d\r\n' % len(CONTENT)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
KNOWN = ObjectInfo("a.bin", len(CONTENT), "e-1")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _few_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "MAX_RETRIES", 1)
    monkeypatch.setattr(object_client, "BACKOFF_SECONDS", (0.0, 0.01))


@dataclass
class Wire:
    """`sent` counts the bytes that went out, `ended` the connections that are over."""

    script: Script
    url: str = ""
    requests: list[str] = field(default_factory=list)
    sent: int = 0
    ended: int = 0


class _Handler(socketserver.BaseRequestHandler):
    wire: ClassVar[Wire]

    def handle(self) -> None:
        data = b""
        with suppress(OSError):
            while received := self.request.recv(65536):
                data += received
                while b"\r\n\r\n" in data:
                    head, _, data = data.partition(b"\r\n\r\n")
                    self.wire.requests.append(head.decode().partition("\r\n")[0])
                    for part in self.wire.script(head.decode()):
                        self.request.sendall(part)
                        self.wire.sent += len(part)
        self.wire.ended += 1


@contextmanager
def start_wire(script: Script) -> Iterator[Wire]:
    wire = Wire(script)
    handler = type("Handler", (_Handler,), {"wire": wire})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        wire.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield wire
        server.shutdown()
        thread.join(10)


def say(*parts: bytes) -> Script:
    return lambda _request: iter(parts)


def open_store(wire: Wire, **changes: object) -> S3ObjectStore:
    settings = {"region": "us-east-1", "access_key": "a", "secret_key": "s", "bucket": "studio", "read_timeout_seconds": 2}
    return S3ObjectStore(**{"endpoint": wire.url, **settings, **changes})  # type: ignore[arg-type]


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def refusal_of(store: S3ObjectStore, folder: Path, known: ObjectInfo | None = None) -> Unavailable:
    """What a fetch raises; nothing of the object may stay."""
    with pytest.raises(Unavailable) as caught:
        await store.fetch("a.bin", folder / "target", lambda _: None, known=known)
    assert names_in(folder) == []
    assert len(str(caught.value)) < 1000
    return caught.value


async def test_what_is_said_rightly_is_taken(tmp_path: Path) -> None:
    """So that the refusals below are of what is wrong in them."""
    with start_wire(say(HEAD + b"\r\n" + CONTENT)) as wire:
        for known in (None, KNOWN):
            await open_store(wire).fetch("a.bin", tmp_path / "target", lambda _: None, known=known)
            assert (tmp_path / "target").read_bytes() == CONTENT


UNCLEAR = {
    "two lengths": HEAD + b"Content-Length: 5\r\n\r\n" + CONTENT,
    "lengths in a list": HEAD.replace(b": 21", b": 21, 5") + b"\r\n" + CONTENT,
    "a length and chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n15\r\n" + CONTENT + b"\r\n0\r\n\r\n",
    "a coding that is not chunked": HEAD + b"Transfer-Encoding: gzip\r\n\r\n" + CONTENT,
    "no number": HEAD.replace(b": 21", b": 0x15") + b"\r\n" + CONTENT,
    "a negative length": HEAD.replace(b": 21", b": -21") + b"\r\n" + CONTENT,
    "no length": HEAD.replace(b"Content-Length: 21\r\n", b"") + b"\r\n" + CONTENT,
    "no status": b"ICY 200 OK\r\n\r\n" + CONTENT,
    "a status of four digits": HEAD.replace(b" 200 ", b" 2000 ") + b"\r\n" + CONTENT,
    "a greeting of another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
}


@pytest.mark.parametrize("said", UNCLEAR.values(), ids=UNCLEAR)
@pytest.mark.parametrize("known", [None, KNOWN], ids=["whole", "small"])
@fault(
    "S3: answer whose length is unclear, or that is not HTTP",
    injector="scripted bytes",
    invariants="LPR",
    outcome="refused and tried again; nothing is kept",
)
async def test_an_answer_that_is_unclear_is_refused(tmp_path: Path, said: bytes, known: ObjectInfo | None) -> None:
    assert b": 21" in HEAD
    with start_wire(say(said)) as wire:
        error = await refusal_of(open_store(wire, read_timeout_seconds=0.5), tmp_path, known)
    assert error.code == "storage_unavailable"


@pytest.mark.parametrize(
    "line", [b"X-More: 1\r\n", b"X-" + b"a" * 9000, b"X-More: " + b"a" * 9000], ids=["lines", "name", "value"]
)
@fault(
    "S3: head of an answer that never ends",
    injector="scripted bytes",
    invariants="BLR",
    outcome="refused; the connection is closed",
)
async def test_a_head_without_end_is_refused(tmp_path: Path, line: bytes) -> None:
    with start_wire(lambda _: itertools.chain([HEAD], itertools.repeat(line))) as wire:
        error = await refusal_of(open_store(wire, read_timeout_seconds=60), tmp_path)
        assert "not HTTP" in error.message
        await asyncio.to_thread(until, lambda: wire.ended == len(wire.requests), 20)
    assert wire.sent < 30_000_000  # twice 100 lines of 64 KB at most, and what the kernel holds


@pytest.mark.parametrize("cut", [b"", b"HTTP/1.1 20", HEAD, HEAD + b"\r\n", HEAD + b"\r\n" + CONTENT[:-1]])
async def test_an_answer_that_is_cut_anywhere_is_not_kept(tmp_path: Path, cut: bytes) -> None:
    def script(_request: str) -> Iterator[bytes]:
        yield cut
        raise ConnectionAbortedError

    with start_wire(script) as wire:
        error = await refusal_of(open_store(wire, read_timeout_seconds=20), tmp_path, KNOWN)
    assert error.code == "storage_unavailable"


async def test_an_interim_answer_is_not_taken_for_the_answer(tmp_path: Path) -> None:
    """A storage has no reason for another one than 100."""
    with start_wire(say(b"HTTP/1.1 100 Continue\r\n\r\n", HEAD + b"\r\n" + CONTENT)) as wire:
        await open_store(wire).fetch("a.bin", tmp_path / "target", lambda _: None)
    assert (tmp_path / "target").read_bytes() == CONTENT
    (tmp_path / "target").unlink()
    with start_wire(say(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", HEAD + b"\r\n" + CONTENT)) as wire:
        assert "103" in (await refusal_of(open_store(wire), tmp_path)).message
        await asyncio.to_thread(until, lambda: wire.ended == len(wire.requests), 20)


@pytest.mark.parametrize("pause", [0, 0.2], ids=["with the head", "later"])
async def test_a_body_after_the_answer_to_a_head_is_not_taken_for_the_next_answer(tmp_path: Path, pause: float) -> None:
    forged = b'HTTP/1.1 200 OK\r\nETag: "e-1"\r\nContent-Length: 6\r\n\r\nforged'

    def script(request: str) -> Iterator[bytes]:
        if not request.startswith("HEAD"):
            yield HEAD + b"\r\n" + CONTENT
        elif pause:
            yield HEAD + b"\r\n"
            time.sleep(pause)
            yield forged
        else:
            yield HEAD + b"\r\n" + forged

    with start_wire(script) as wire:
        store = open_store(wire)
        for _ in range(3):
            assert (await store.stat("a.bin")).size == len(CONTENT)
            await asyncio.sleep(2 * pause)
            await store.fetch("a.bin", tmp_path / "target", lambda _: None)
            assert (tmp_path / "target").read_bytes() == CONTENT


BAD_CHUNKS = {
    "no number": b"zz\r\nabc\r\n",
    "negative": b"-1\r\n" + b"a" * 100_000,
    "no size": b"\r\n",
    "a size line without end": b"1" * 200_000,
    "an extension without end": b"1;" + b"a" * 200_000,
    "more than there is": b"ffffffffffffffff\r\nabc",
    "another length": b"5\r\n<ListBucketResult></ListBucketResult>\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("said", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
async def test_a_list_in_chunks_that_are_wrong_is_done_without(said: bytes) -> None:
    keys = [f"folder/{number}" for number in range(20)]
    with start_wire(say(CHUNKED + said)) as wire:
        assert await open_store(wire, read_timeout_seconds=0.5).glance(keys) == {}
        assert wire.requests


async def test_a_list_in_many_chunks_is_read() -> None:
    keys = [f"folder/{number:02}" for number in range(20)]
    entry = "<Contents><Key>{}</Key><Size>5</Size><ETag>e</ETag></Contents>"
    page = f"<ListBucketResult>{''.join(map(entry.format, keys))}</ListBucketResult>".encode()
    chunks = b"".join(b"%x;name=value\r\n%b\r\n" % (len(part), part) for part in (page[:1], page[1:700], page[700:]))
    with start_wire(say(CHUNKED + chunks + b"0\r\nX-Trailer: 1\r\n\r\n")) as wire:
        store = open_store(wire)
        for _ in range(2):
            assert sorted(await store.glance(keys)) == keys


@pytest.mark.parametrize("size", [b"-1", b"7fffffff"])
async def test_an_error_in_chunks_of_any_size_is_read_within_bounds(tmp_path: Path, size: bytes) -> None:
    head = CHUNKED.replace(b"200 OK", b"503 Slow") + size + b"\r\n<Error><Code>SlowDown</Code>"
    with start_wire(lambda _: itertools.chain([head], itertools.repeat(b"a" * 65536))) as wire:
        error = await refusal_of(open_store(wire), tmp_path)
        assert "SlowDown" in error.message
        await asyncio.to_thread(until, lambda: wire.ended == len(wire.requests), 20)
    assert wire.sent < 30_000_000


@pytest.mark.parametrize("known", [None, KNOWN], ids=["whole", "small"])
@pytest.mark.parametrize("kept", [len(HEAD) + 2, len(HEAD), 5], ids=["body", "between", "head"])
@fault(
    "S3: bytes that drip",
    injector="scripted bytes, one now and then",
    invariants="LBR",
    outcome="given up after a time that grows with the size; the job is retried",
)
async def test_an_answer_that_drips_is_given_up(
    tmp_path: Path, known: ObjectInfo | None, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte comes long before the read time-out."""
    said = HEAD + b"X-More: " + b"a" * 1000 + b"\r\n\r\n" if kept == len(HEAD) else HEAD + b"\r\n" + CONTENT * 100

    def drip(_request: str) -> Iterator[bytes]:
        yield said[:kept]
        for byte in said[kept:]:
            time.sleep(0.1)
            yield bytes([byte])

    monkeypatch.setattr(object_store, "LEAST_SECONDS", 1)
    monkeypatch.setattr(object_store, "SLOWEST_BYTES_PER_SECOND", 1e9)
    with start_wire(drip) as wire:
        async with asyncio.timeout(20):
            error = await refusal_of(open_store(wire, read_timeout_seconds=60), tmp_path, known)
        assert "did not arrive within 1" in error.message
        await asyncio.to_thread(until, lambda: wire.ended == 1, 20)


def test_the_time_for_a_transfer_grows_with_its_size() -> None:
    assert object_store.LEAST_SECONDS <= 600
    assert object_store.RANGE_BYTES / object_store.SLOWEST_BYTES_PER_SECOND > 3600
