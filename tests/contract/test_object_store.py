"""What the pipeline may rely on when it reads the bucket: the twin and a real S3 server, then the faults of a real one."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import random
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from disks import open_files
from fault_proxy import fault_proxy
from fault_table import fault
from ncr_upload.adapters.object_store import S3ObjectStore, receiving
from ncr_upload.adapters.object_store import store as object_store
from ncr_upload.application.arrivals import Follower, Turns
from ncr_upload.application.ports import ObjectStore
from ncr_upload.domain.errors import Deferred, DeliveryError, Rejected, Unavailable
from patience import until
from servers import Answer, Forward, Gateway, Request, S3Server, start_gateway, start_http, start_s3
from twins import MemoryObjectStore

pytestmark = pytest.mark.anyio
Put = Callable[[str, bytes], None]
AWKWARD_KEYS = ["a b/ü ß.png", "100%25/x#y?z.png", "[a]{b}~+=&@,;.glb", "deep/" * 20 + "x", "UPPER/Case.PNG"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with start_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


def open_store(server: S3Server, **changes: object) -> S3ObjectStore:
    settings = {
        "endpoint": server.endpoint,
        "region": "us-east-1",
        "access_key": server.access_key,
        "secret_key": server.secret_key,
        "bucket": server.bucket,
    }
    return S3ObjectStore(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture(params=["memory", "s3"])
def place(request: pytest.FixtureRequest) -> tuple[ObjectStore, Put]:
    if request.param == "memory":
        store = MemoryObjectStore(bucket="studio")
        return store, store.objects.__setitem__
    server = request.getfixturevalue("s3")
    return open_store(server), server.put


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- the twin and the real one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 3_000_001])
async def test_a_fetched_object_is_whole_and_described_by_its_hashes(
    place: tuple[ObjectStore, Put], tmp_path: Path, size: int
) -> None:
    store, put = place
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    put("folder/object.bin", content)
    told: list[int] = []
    fetched = await store.fetch("folder/object.bin", tmp_path / "target", told.append)
    assert (tmp_path / "target").read_bytes() == content
    assert (fetched.size, fetched.crc32) == (size, zlib.crc32(content))
    assert fetched.sha256 == hashlib.sha256(content).hexdigest()
    assert sum(told) == size
    assert names_in(tmp_path) == ["target"]


async def test_stat_and_fetch_name_the_same_etag_and_size(place: tuple[ObjectStore, Put], tmp_path: Path) -> None:
    store, put = place
    put("a.bin", b"content")
    seen, fetched = await store.stat("a.bin"), await store.fetch("a.bin", tmp_path / "a", lambda _: None)
    assert (seen.key, seen.size, seen.etag) == ("a.bin", 7, hashlib.md5(b"content").hexdigest())
    assert fetched.etag == seen.etag


@pytest.mark.parametrize("key", AWKWARD_KEYS)
async def test_any_key_a_studio_writes_can_be_read(place: tuple[ObjectStore, Put], tmp_path: Path, key: str) -> None:
    store, put = place
    put(key, key.encode())
    assert (await store.stat(key)).size == len(key.encode())
    await store.fetch(key, tmp_path / "target", lambda _: None)
    assert (tmp_path / "target").read_bytes() == key.encode()


async def test_a_missing_object_is_rejected_naming_its_key_and_bucket(place: tuple[ObjectStore, Put], tmp_path: Path) -> None:
    store, _ = place
    for attempt in (store.stat("no/such.glb"), store.fetch("no/such.glb", tmp_path / "target", lambda _: None)):
        with pytest.raises(Rejected) as caught:
            await attempt
        assert caught.value.code == "object_missing"
        assert "no/such.glb" in caught.value.message
        assert "studio" in caught.value.message
    assert names_in(tmp_path) == []


async def test_a_fetch_replaces_what_was_at_its_place_only_when_it_is_whole(
    place: tuple[ObjectStore, Put], tmp_path: Path
) -> None:
    store, put = place
    put("a.bin", b"new")
    (tmp_path / "target").write_bytes(b"old")
    with pytest.raises(Rejected):
        await store.fetch("missing", tmp_path / "target", lambda _: None)
    assert (tmp_path / "target").read_bytes() == b"old"
    await store.fetch("a.bin", tmp_path / "target", lambda _: None)
    assert (tmp_path / "target").read_bytes() == b"new"


# --- a list in place of a look at each --------------------------------------------------------------------------


def put_many(s3: S3Server, count: int = 20) -> list[str]:
    keys = [f"jobs/7/{name}" for name in [*AWKWARD_KEYS, *(f"maps/{number}.png" for number in range(count))]]
    for key in [*keys, "jobs/7/another", "jobs/70/another", "another"]:
        s3.put(key, key.encode())
    return keys


async def test_a_list_tells_what_a_look_at_each_tells(s3: S3Server) -> None:
    store, keys = open_store(s3), put_many(s3)
    listed = await store.glance([*keys, "jobs/7/missing"])
    assert sum("maps/" in key for key in listed) == 20
    assert listed == {key: await store.stat(key) for key in keys if key in listed}


async def test_few_objects_and_those_of_no_common_folder_are_not_listed(s3: S3Server) -> None:
    store, keys = open_store(s3), put_many(s3)
    assert await store.glance([]) == {}
    assert await store.glance(keys[-5:]) == {}
    assert await store.glance([*keys, "another"]) == {}


async def test_of_a_folder_with_many_other_objects_only_the_beginning_is_read(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "LIST_PAGE", 4)
    for number in range(100):
        s3.put(f"crowd/{number:03}", b"x")
    listed = await open_store(s3).glance([f"crowd/{number:03}" for number in range(0, 100, 5)])
    assert 0 < len(listed) < 20


async def test_a_folders_marker_is_not_taken_for_the_object_beside_it(s3: S3Server) -> None:
    """Some programs put an empty object "name/" where they show a folder. obstore tells it without the slash."""
    keys = [f"folder/{number:02}" for number in range(20)]
    contents = "".join(
        f"<Contents><Key>{key}</Key><LastModified>2026-11-01T10:00:00.000Z</LastModified><ETag>&quot;{etag}&quot;</ETag>"
        f"<Size>{size}</Size></Contents>"
        for key, size, etag in sorted([*((key, 5, "full") for key in keys), (f"{keys[3]}/", 0, "empty")])
    )
    body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>".encode()
    with start_http(Answer(200, body)) as server:
        listed = await open_store(s3, endpoint=server.url).glance(keys)
    assert {(found.size, found.etag) for found in listed.values()} == {(5, "full")}
    assert sorted(listed) == keys


@fault("S3: lists denied or broken", injector="scripted answers", invariants="R", outcome="each object is looked at by itself")
@pytest.mark.parametrize(
    "answer",
    [Answer(403, b"<Error><Code>AccessDenied</Code></Error>"), Answer(501), Answer(200, b"no list"), Answer(delay_seconds=2)],
)
async def test_a_store_that_gives_no_list_is_not_asked_again(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    monkeypatch.setattr(object_store, "LIST_SECONDS", 1)
    keys = [f"folder/{number}" for number in range(20)]
    with start_http(answer) as server:
        store = open_store(s3, endpoint=server.url)
        assert await store.glance(keys) == {}
        asked = len(server.requests)
        assert await store.glance(keys) == {}
        assert len(server.requests) == asked > 0


# --- over several requests at once ------------------------------------------------------------------------------


LARGE = random.Random(2).randbytes(1_000_007)


@pytest.fixture
def ranged(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """The real server with LARGE, ten ranges and a bit, in it. It serves ranges, but says 200 instead of 206."""

    def correct(_request: Request, forward: Forward) -> Answer:
        answer = forward()
        return replace(answer, status=206 if "Content-Range" in answer.headers else answer.status)

    monkeypatch.setattr(object_store, "RANGE_BYTES", 100_000)
    monkeypatch.setattr(receiving, "HASHED_AT_ONCE_BYTES", 70_000)
    s3.put("large.bin", LARGE)
    with start_gateway(s3.endpoint) as gateway:
        gateway.spoil = correct
        yield gateway


def ranges_asked(gateway: Gateway) -> list[str]:
    return sorted(request.headers["range"] for request in gateway.requests if "range" in request.headers)


class Followed(Follower):
    def __init__(self) -> None:
        self.reached: list[int] = []

    def reach(self, size: int) -> None:
        self.reached.append(size)


async def test_a_large_object_comes_over_several_requests_and_is_hashed_in_order(
    s3: S3Server, ranged: Gateway, tmp_path: Path
) -> None:
    store, told, followed = open_store(s3, endpoint=ranged.url), list[int](), Followed()
    known = await store.stat("large.bin")
    fetched = await store.fetch("large.bin", tmp_path / "target", told.append, known=known, follower=followed)
    assert len(ranges_asked(ranged)) == len(set(ranges_asked(ranged))) == 11
    assert (tmp_path / "target").read_bytes() == LARGE
    assert (fetched.size, fetched.sha256, fetched.crc32) == (len(LARGE), hashlib.sha256(LARGE).hexdigest(), zlib.crc32(LARGE))
    assert sum(told) == len(LARGE)
    assert followed.reached == sorted(followed.reached)
    assert followed.reached[-1] == len(LARGE)
    assert names_in(tmp_path) == ["target"]


async def test_a_server_that_serves_no_ranges_is_asked_for_the_whole(s3: S3Server, ranged: Gateway, tmp_path: Path) -> None:
    store = open_store(s3)
    fetched = await store.fetch("large.bin", tmp_path / "target", lambda _: None, known=await store.stat("large.bin"))
    assert (tmp_path / "target").read_bytes() == LARGE
    assert fetched.sha256 == hashlib.sha256(LARGE).hexdigest()


@fault(
    "S3: large object replaced since it was looked up",
    injector="another object under the key",
    invariants="P",
    outcome="fetched as it is now, whole",
)
async def test_a_large_object_that_was_replaced_since_is_fetched_as_it_is_now(
    s3: S3Server, ranged: Gateway, tmp_path: Path
) -> None:
    store = open_store(s3, endpoint=ranged.url)
    known = await store.stat("large.bin")
    s3.put("large.bin", LARGE[::-1])
    fetched = await store.fetch("large.bin", tmp_path / "target", lambda _: None, known=known)
    assert (tmp_path / "target").read_bytes() == LARGE[::-1]
    assert fetched.etag == hashlib.md5(LARGE[::-1]).hexdigest()


@pytest.mark.parametrize("other", [LARGE[::-1], LARGE[:-1]], ids=["same size", "shorter"])
@fault(
    "S3: large object replaced between two ranges",
    injector="the object is replaced after half of the ranges",
    invariants="P",
    outcome="never put together from two objects",
)
async def test_ranges_of_two_objects_are_never_put_together(
    s3: S3Server, ranged: Gateway, tmp_path: Path, other: bytes
) -> None:
    store, correct = open_store(s3, endpoint=ranged.url), ranged.spoil
    known = await store.stat("large.bin")

    def replace_meanwhile(request: Request, forward: Forward) -> Answer:
        if request.headers.get("range", "").startswith("bytes=500000-"):
            s3.put("large.bin", other)
        return correct(request, forward)

    ranged.spoil = replace_meanwhile
    with pytest.raises(Unavailable) as caught:
        await store.fetch("large.bin", tmp_path / "target", lambda _: None, known=known)
    assert caught.value.code == "object_damaged"
    assert "large.bin" in caught.value.message
    assert names_in(tmp_path) == []
    ranged.spoil = correct
    await store.fetch("large.bin", tmp_path / "target", lambda _: None, known=await store.stat("large.bin"))
    assert (tmp_path / "target").read_bytes() == other


@fault("S3: wrong bytes in a range", injector="gateway", invariants="PR", outcome="fetched again; nothing is kept")
async def test_wrong_bytes_in_a_range_are_not_kept(s3: S3Server, ranged: Gateway, tmp_path: Path) -> None:
    store, correct = open_store(s3, endpoint=ranged.url), ranged.spoil
    known = await store.stat("large.bin")

    def damage(request: Request, forward: Forward) -> Answer:
        answer = correct(request, forward)
        third = request.headers.get("range", "").startswith("bytes=300000-")
        return replace(answer, body=answer.body[:-1] + b"?") if third else answer

    ranged.spoil = damage
    with pytest.raises(Unavailable) as caught:
        await store.fetch("large.bin", tmp_path / "target", lambda _: None, known=known)
    assert caught.value.code == "object_damaged"
    assert names_in(tmp_path) == []


async def test_a_cancelled_fetch_of_ranges_leaves_no_partial(s3: S3Server, ranged: Gateway, tmp_path: Path) -> None:
    store = open_store(s3, endpoint=ranged.url)
    known = await store.stat("large.bin")
    begun = asyncio.Event()
    fetching = asyncio.create_task(
        store.fetch("large.bin", tmp_path / "target", lambda _: begun.set(), known=known, turns=Turns(2))
    )
    await begun.wait()
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("known", [True, False], ids=["ranges", "whole"])
async def test_a_cancelled_fetch_does_not_wait_for_a_storage_that_has_fallen_silent(
    s3: S3Server, ranged: Gateway, tmp_path: Path, known: bool
) -> None:
    port = int(ranged.url.rpartition(":")[2])
    with fault_proxy(("127.0.0.1", port)) as proxy:
        proxy.throttle(all_bytes_per_second=8_000_000)
        store = open_store(s3, endpoint=f"http://127.0.0.1:{proxy.port}", read_timeout_seconds=60)
        begun, found = asyncio.Event(), await store.stat("large.bin") if known else None
        fetching = asyncio.create_task(store.fetch("large.bin", tmp_path / "target", lambda _: begun.set(), known=found))
        await begun.wait()
        proxy.freeze()
        fetching.cancel()
        async with asyncio.timeout(20):
            with pytest.raises(asyncio.CancelledError):
                await fetching
        assert names_in(tmp_path) == []
        proxy.heal()
        await asyncio.to_thread(until, lambda: not open_files(tmp_path), 60)


async def test_a_cancelled_fetch_of_a_small_object_waits_for_no_answer_and_keeps_none(s3: S3Server, tmp_path: Path) -> None:
    s3.put("small.bin", b"x" * 1000)
    with fault_proxy(("127.0.0.1", int(s3.endpoint.rpartition(":")[2]))) as proxy:
        store = open_store(s3, endpoint=f"http://127.0.0.1:{proxy.port}", read_timeout_seconds=60)
        known = await store.stat("small.bin")
        proxy.freeze()
        fetching = asyncio.create_task(store.fetch("small.bin", tmp_path / "target", lambda _: None, known=known))
        await asyncio.sleep(0.3)
        fetching.cancel()
        async with asyncio.timeout(5):
            with pytest.raises(asyncio.CancelledError):
                await fetching
        proxy.heal()
        await asyncio.to_thread(store._bodies._threads.shutdown)
        assert names_in(tmp_path) == []


async def test_a_cancellation_waits_for_what_is_being_written() -> None:
    begun, go, kept = threading.Event(), threading.Event(), list[str]()

    def keep(received: str) -> None:
        begun.set()
        assert go.wait(20)
        kept.append(received)

    receiving_it = asyncio.create_task(receiving.Bodies().receive(lambda: "body", keep))
    await asyncio.to_thread(begun.wait, 20)
    receiving_it.cancel()
    await asyncio.sleep(0.1)
    assert not receiving_it.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await receiving_it
    assert kept == ["body"]


# --- the real one's faults --------------------------------------------------------------------------------------


async def error_of(store: S3ObjectStore, folder: Path) -> DeliveryError:
    """What both methods raise; a fetch must leave nothing behind."""
    with pytest.raises(DeliveryError) as of_stat:
        await store.stat("a.bin")
    with pytest.raises(DeliveryError) as of_fetch:
        await store.fetch("a.bin", folder / "target", lambda _: None)
    assert (type(of_stat.value), of_stat.value.code) == (type(of_fetch.value), of_fetch.value.code)
    assert names_in(folder) == []
    assert "Debug source" not in str(of_fetch.value)
    assert "test-secret-key" not in str(of_fetch.value)
    return of_fetch.value


@fault("S3: no such bucket", injector="wrong BUCKET_NAME", invariants="LH", outcome="refused, naming the bucket")
async def test_a_missing_bucket_is_rejected_by_name(s3: S3Server, tmp_path: Path) -> None:
    error = await error_of(open_store(s3, bucket="elsewhere"), tmp_path)
    assert (type(error), error.code) == (Rejected, "bucket_missing")
    assert "elsewhere" in error.message


@pytest.mark.parametrize("wrong", [{"access_key": "wrong-access"}, {"secret_key": "wrong-secret-key"}])
@fault(
    "S3: wrong key",
    injector="wrong access or secret key",
    invariants="LH",
    outcome="tried again; the settings to correct are named",
)
async def test_a_refused_access_key_is_told_with_the_settings_to_correct(
    s3: S3Server, tmp_path: Path, wrong: dict[str, str]
) -> None:
    error = await error_of(open_store(s3, **wrong), tmp_path)
    assert (type(error), error.code) == (Unavailable, "storage_login_refused")
    assert "WASABI_ACCESS_KEY" in error.next_step
    assert not any(value in str(error) for value in wrong.values())


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("endpoint", "WASABI_ENDPOINT"),
        ("bucket", "BUCKET_NAME"),
        ("access_key", "WASABI_ACCESS_KEY"),
        ("secret_key", "WASABI_SECRET_KEY"),
    ],
)
async def test_an_unset_setting_is_named(s3: S3Server, tmp_path: Path, setting: str, name: str) -> None:
    for empty in (None, ""):
        error = await error_of(open_store(s3, **{setting: empty}), tmp_path)
        assert error.code == "storage_unset"
        assert name in error.message


async def test_settings_for_other_aws_programs_are_not_used(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("a.bin", b"content")
    for name, value in {"ENDPOINT_URL_S3": "http://127.0.0.1:1", "SESSION_TOKEN": "other", "ACCESS_KEY_ID": "other"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    assert (await open_store(s3).stat("a.bin")).size == 7


@fault("S3: connection refused", injector="closed port", invariants="LH", outcome="tried again, naming the endpoint")
async def test_a_server_that_is_down_is_unavailable_and_named(s3: S3Server, tmp_path: Path) -> None:
    error = await error_of(open_store(s3, endpoint="http://127.0.0.1:1"), tmp_path)
    assert (type(error), error.code) == (Unavailable, "storage_unavailable")
    assert "http://127.0.0.1:1" in error.message
    assert "refused" in error.message


async def test_a_denied_object_is_rejected_naming_it(s3: S3Server, tmp_path: Path) -> None:
    denied = Answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
    with start_http(denied) as server:
        error = await error_of(open_store(s3, endpoint=server.url), tmp_path)
    assert (type(error), error.code) == (Rejected, "storage_denied")
    assert "a.bin" in error.message


@pytest.mark.parametrize(
    "answer", [Answer(503, b"<Error><Code>SlowDown</Code></Error>"), Answer(500), Answer(429), Answer(cut=True)]
)
async def test_a_server_in_trouble_is_unavailable(s3: S3Server, tmp_path: Path, answer: Answer) -> None:
    with start_http(answer) as server:
        error = await error_of(open_store(s3, endpoint=server.url), tmp_path)
    assert (type(error), error.code) == (Unavailable, "storage_unavailable")
    if b"SlowDown" in answer.body:
        assert "SlowDown" in error.message


@fault("S3: silent", injector="HTTP server that stalls", invariants="L", outcome="given up; the job is retried")
@pytest.mark.parametrize("stall", [{"delay_seconds": 5}, {"drip_seconds": 5}], ids=["no answer", "half a body"])
async def test_a_storage_that_falls_silent_is_given_up(
    s3: S3Server, tmp_path: Path, stall: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "RETRY_SECONDS", 1)
    with start_http(replace(body(b"content", "e1"), **stall)) as server:
        store = open_store(s3, endpoint=server.url, read_timeout_seconds=0.5)
        async with asyncio.timeout(60):
            with pytest.raises(Unavailable):
                await store.fetch("a.bin", tmp_path / "target", lambda _: None)
    assert names_in(tmp_path) == []


@contextmanager
def answer_without_end(sent: bytes) -> Iterator[str]:
    """Serve whoever asks with `sent` again and again, which leaves no read time-out a chance. Yields the URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(65536)
            while not ended.wait(0.01):
                connection.sendall(sent)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    ended.set()
    listener.close()


@fault("S3: no end of interim answers", injector="HTTP server", invariants="L", outcome="given up; the job is retried")
@pytest.mark.parametrize("sent", [b"HTTP/1.1 100 Continue\r\n\r\n", b"H"], ids=["interim answers", "a byte now and then"])
async def test_a_storage_that_never_comes_to_its_answer_is_given_up(
    s3: S3Server, tmp_path: Path, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "LEAST_SECONDS", 0.5)
    with answer_without_end(sent) as url:
        store = open_store(s3, endpoint=url)
        for asked in (store.fetch("a.bin", tmp_path / "target", lambda _: None), store.stat("a.bin")):
            async with asyncio.timeout(60):
                with pytest.raises(Unavailable, match=r"did not arrive within 0\.5 s") as caught:
                    await asked
            assert caught.value.code == "storage_unavailable"
    assert names_in(tmp_path) == []


async def test_what_a_storage_tells_of_a_signature_stays_out_of_the_message(s3: S3Server, tmp_path: Path) -> None:
    told = (
        b"<Error><Code>SignatureDoesNotMatch</Code><Message>The signature does not match.</Message><AWSAccessKeyId>AK-1"
        b"</AWSAccessKeyId><StringToSign>AWS4-HMAC-SHA256 x</StringToSign><SignatureProvided>f00d</SignatureProvided></Error>"
    )
    with start_http(Answer(403, told)) as server:
        error = await error_of(open_store(s3, endpoint=server.url), tmp_path)
    for secret in ("AWS4-HMAC-SHA256", "f00d", "AK-1", s3.secret_key):
        assert secret not in str(error)


def body(content: bytes, etag: str, announced: int | None = None) -> Answer:
    return Answer(200, content, {"ETag": f'"{etag}"', "Last-Modified": "Mon, 23 Nov 2026 10:00:00 GMT"}, announced)


@fault(
    "S3: bytes that differ from the ETag", injector="scripted answer", invariants="PR", outcome="fetched again; nothing is kept"
)
async def test_bytes_that_differ_from_the_md5_etag_are_not_kept(s3: S3Server, tmp_path: Path) -> None:
    with start_http(body(b"other", hashlib.md5(b"right").hexdigest())) as server:
        with pytest.raises(Unavailable) as caught:
            await open_store(s3, endpoint=server.url).fetch("a.bin", tmp_path / "target", lambda _: None)
        assert caught.value.code == "object_damaged"
        assert names_in(tmp_path) == []
        lenient = open_store(s3, endpoint=server.url, verify_etag_md5=False)
        await lenient.fetch("a.bin", tmp_path / "target", lambda _: None)


async def test_an_etag_of_a_multipart_upload_is_no_md5(s3: S3Server, tmp_path: Path) -> None:
    with start_http(body(b"content", "0123456789abcdef0123456789abcdef-2")) as server:
        fetched = await open_store(s3, endpoint=server.url).fetch("a.bin", tmp_path / "target", lambda _: None)
    assert fetched.etag.endswith("-2")


@fault(
    "S3: body that ends early",
    injector="scripted answer",
    invariants="PR",
    outcome="resumed or fetched again; nothing partial is kept",
)
async def test_a_body_that_ends_early_is_never_taken_for_whole(s3: S3Server, tmp_path: Path) -> None:
    with start_http(body(b"half", "0123456789abcdef0123456789abcdef-2", announced=8)) as server, pytest.raises(Unavailable):
        await open_store(s3, endpoint=server.url).fetch("a.bin", tmp_path / "target", lambda _: None)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("replaced", [False, True])
@fault(
    "S3: ETag changed between two ranges",
    injector="scripted answers",
    invariants="P",
    outcome="never put together from two objects",
)
async def test_a_cut_body_is_resumed_but_never_from_another_object(s3: S3Server, tmp_path: Path, replaced: bool) -> None:
    """The first answer ends half-way. The rest is asked for; meanwhile the object may have been replaced."""
    first, rest = body(b"AAAA", "a" * 32 + "-2", announced=8), body(b"BBBB", ("b" if replaced else "a") * 32 + "-2")
    rest.status, rest.headers["Content-Range"] = 206, "bytes 4-7/8"
    with start_http(first, rest) as server:
        fetching = open_store(s3, endpoint=server.url).fetch("a.bin", tmp_path / "target", lambda _: None)
        if replaced:
            with pytest.raises(Unavailable):
                await fetching
        else:
            assert (await fetching).size == 8
        assert server.requests[1].headers["range"] == "bytes=4-7"
    assert names_in(tmp_path) == ([] if replaced else ["target"])


async def test_a_full_disk_defers_the_job_and_leaves_no_partial(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(self: object, chunk: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    s3.put("a.bin", b"content")
    monkeypatch.setattr(receiving.Checksums, "take", take)
    with pytest.raises(Deferred) as caught:
        await open_store(s3).fetch("a.bin", tmp_path / "target", lambda _: None)
    assert caught.value.code == "disk_full"
    assert names_in(tmp_path) == []


async def test_a_cancelled_fetch_leaves_no_partial(s3: S3Server, tmp_path: Path) -> None:
    s3.put("large.bin", b"x" * 8_000_000)

    def cancel() -> None:
        fetching.cancel()

    fetching = asyncio.create_task(open_store(s3).fetch("large.bin", tmp_path / "target", lambda _: cancel()))
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert names_in(tmp_path) == []
