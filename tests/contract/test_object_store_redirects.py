"""A storage that redirects: what is followed, what is refused, and to whom the login is shown."""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from certificates import make_certificates
from fault_table import fault
from ncr_upload.adapters.object_store import S3ObjectStore
from ncr_upload.adapters.object_store import store as object_store
from ncr_upload.application.ports import ObjectInfo
from ncr_upload.domain.errors import Rejected, Unavailable
from servers import Answer, Gateway, HttpServer, Request, S3Server, pass_on, start_gateway, start_http, start_s3

pytestmark = pytest.mark.anyio
LARGE = bytes(range(256)) * 3_000
ETAG = hashlib.md5(LARGE).hexdigest()
FORGED = b"delivered to the partner"
Asks = Callable[[S3ObjectStore, Path], Awaitable[object]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with start_s3(tmp_path_factory.mktemp("s3")) as server:
        server.put("a/large.bin", LARGE)
        for number in range(20):
            server.put(f"many/{number}", b"x")
        yield server


@pytest.fixture
def gateway(s3: S3Server) -> Iterator[Gateway]:
    with start_gateway(s3.endpoint) as gateway:
        yield gateway


@pytest.fixture
def elsewhere() -> Iterator[HttpServer]:
    """Would serve other bytes under every key."""
    headers = {"ETag": f'"{hashlib.md5(FORGED).hexdigest()}"', "Last-Modified": "Mon, 23 Nov 2026 10:00:00 GMT"}
    with start_http(Answer(200, FORGED, headers)) as server:
        yield server


def open_store(s3: S3Server, endpoint: str, **changes: object) -> S3ObjectStore:
    settings = {"region": "us-east-1", "access_key": s3.access_key, "secret_key": s3.secret_key, "bucket": s3.bucket}
    return S3ObjectStore(**{"endpoint": endpoint, **settings, **changes})  # type: ignore[arg-type]


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def at_localhost(server: HttpServer) -> str:
    """The same server by another host's name."""
    return server.url.replace("127.0.0.1", "localhost")


def redirect_to(url: str, status: int = 307) -> Callable[[Request, object], Answer]:
    return lambda request, _forward: Answer(status, b"moved", {"Location": url + request.path})


async def stat(store: S3ObjectStore, _: Path) -> object:
    return await store.stat("a/large.bin")


async def get(store: S3ObjectStore, folder: Path) -> object:
    return await store.fetch("a/large.bin", folder / "target", lambda _: None)


async def get_small(store: S3ObjectStore, folder: Path) -> object:
    known = ObjectInfo("a/large.bin", 1000, ETAG)
    return await store.fetch("a/large.bin", folder / "target", lambda _: None, known=known)


async def get_ranges(store: S3ObjectStore, folder: Path) -> object:
    known = ObjectInfo("a/large.bin", len(LARGE), ETAG)
    return await store.fetch("a/large.bin", folder / "target", lambda _: None, known=known)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("ask", [stat, get, get_small, get_ranges])
@fault(
    "S3: redirects to another host",
    injector="gateway that answers 301 to 308",
    invariants="LPRH",
    outcome="not followed; the host is named",
)
async def test_another_host_is_never_asked(
    s3: S3Server,
    gateway: Gateway,
    elsewhere: HttpServer,
    tmp_path: Path,
    ask: Asks,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(object_store, "RANGE_BYTES", 100_000)
    gateway.spoil = redirect_to(at_localhost(elsewhere), status)
    with pytest.raises(Unavailable) as caught:
        await ask(open_store(s3, gateway.url), tmp_path)
    assert caught.value.code == "storage_redirected"
    for thing in ("a/large.bin", "'studio'", gateway.url, at_localhost(elsewhere).partition("//")[2]):
        assert thing in caught.value.message
    assert "S3_REDIRECT_HOSTS" in caught.value.next_step
    assert elsewhere.requests == []
    assert len(gateway.requests) == 1
    assert names_in(tmp_path) == []


async def test_another_port_of_the_own_host_is_never_asked(
    s3: S3Server, gateway: Gateway, elsewhere: HttpServer, tmp_path: Path
) -> None:
    gateway.spoil = redirect_to(elsewhere.url)
    with pytest.raises(Unavailable, match="storage_redirected"):
        await get(open_store(s3, gateway.url), tmp_path)
    assert elsewhere.requests == []


async def test_a_list_that_is_redirected_to_another_host_is_done_without(
    s3: S3Server, gateway: Gateway, elsewhere: HttpServer
) -> None:
    gateway.spoil = redirect_to(at_localhost(elsewhere))
    assert await open_store(s3, gateway.url).glance([f"many/{number}" for number in range(20)]) == {}
    assert elsewhere.requests == []


async def test_a_chain_by_way_of_the_own_host_is_cut_where_it_leaves_it(
    s3: S3Server, gateway: Gateway, elsewhere: HttpServer, tmp_path: Path
) -> None:
    def chain(request: Request, _forward: object) -> Answer:
        is_first = "hop" not in request.path
        return Answer(302, b"", {"Location": "/studio/hop" if is_first else at_localhost(elsewhere)})

    gateway.spoil = chain
    with pytest.raises(Unavailable, match="storage_redirected"):
        await get(open_store(s3, gateway.url), tmp_path)
    assert [request.path for request in gateway.requests] == ["/studio/a/large.bin", "/studio/hop"]
    assert elsewhere.requests == []


async def test_a_range_that_is_redirected_half_way_is_not_fetched_elsewhere(
    s3: S3Server, gateway: Gateway, elsewhere: HttpServer, tmp_path: Path
) -> None:
    """The first answer breaks off; the resumption is redirected."""

    def cut_then_redirect(request: Request, forward: Callable[[], Answer]) -> Answer:
        if "range" in request.headers:
            return Answer(307, b"", {"Location": at_localhost(elsewhere)})
        answer = forward()
        return replace(answer, body=answer.body[:1000], announced=len(answer.body))

    gateway.spoil = cut_then_redirect
    with pytest.raises(Unavailable, match="storage_redirected"):
        await get(open_store(s3, gateway.url), tmp_path)
    assert elsewhere.requests == []
    assert names_in(tmp_path) == []


async def test_a_loop_ends(s3: S3Server, gateway: Gateway, tmp_path: Path) -> None:
    gateway.spoil = lambda request, _forward: Answer(307, b"", {"Location": request.path})
    with pytest.raises(Unavailable, match="more than 5 times") as caught:
        await get(open_store(s3, gateway.url), tmp_path)
    assert caught.value.code == "storage_redirected"
    assert len(gateway.requests) == 6


async def test_a_redirect_within_the_own_host_is_followed_and_signed(s3: S3Server, gateway: Gateway, tmp_path: Path) -> None:
    def moved(request: Request, forward: Callable[[], Answer]) -> Answer:
        if request.path == "/studio/a/old%20name.bin":
            return Answer(308, b"", {"Location": "large.bin"})
        return forward()

    gateway.spoil = moved
    store = open_store(s3, gateway.url)
    assert (await store.stat("a/old name.bin")).size == len(LARGE)
    await store.fetch("a/old name.bin", tmp_path / "target", lambda _: None)
    assert (tmp_path / "target").read_bytes() == LARGE


@pytest.mark.parametrize("listed", ["localhost", "localhost:{port}"])
async def test_a_host_that_is_listed_is_followed_without_the_login(
    s3: S3Server, gateway: Gateway, elsewhere: HttpServer, tmp_path: Path, listed: str
) -> None:
    gateway.spoil = redirect_to(at_localhost(elsewhere))
    hosts = [listed.format(port=elsewhere.url.rpartition(":")[2])]
    await get(open_store(s3, gateway.url, redirect_hosts=hosts), tmp_path)
    assert (tmp_path / "target").read_bytes() == FORGED
    (request,) = elsewhere.requests
    assert not {"authorization", "x-amz-date", "x-amz-content-sha256", "x-amz-security-token"} & set(request.headers)
    assert s3.secret_key not in str(request)
    assert s3.access_key not in str(request)
    assert "authorization" in gateway.requests[0].headers


async def test_a_listed_host_that_refuses_is_named(s3: S3Server, gateway: Gateway, tmp_path: Path) -> None:
    with start_http(Answer(403, b"<Error><Code>AccessDenied</Code></Error>")) as denying:
        gateway.spoil = redirect_to(at_localhost(denying))
        with pytest.raises(Rejected, match="storage_denied") as caught:
            await get(open_store(s3, gateway.url, redirect_hosts=["localhost"]), tmp_path)
    assert f"after a redirect to {at_localhost(denying)}" in caught.value.message


@pytest.mark.parametrize("status", [301, 307])
async def test_a_redirect_that_only_names_an_endpoint_says_which(s3: S3Server, tmp_path: Path, status: int) -> None:
    """Amazon answers so for a bucket of another region."""
    told = b"<Error><Code>PermanentRedirect</Code><Endpoint>studio.s3.eu-west-1.amazonaws.com</Endpoint></Error>"
    with start_http(Answer(status, told, {"x-amz-bucket-region": "eu-west-1"})) as server:
        for ask in (stat, get):
            with pytest.raises(Unavailable) as caught:
                await ask(open_store(s3, server.url), tmp_path)
            assert caught.value.code == "storage_redirected"
            assert "studio.s3.eu-west-1.amazonaws.com" in caught.value.message
            assert "in region eu-west-1 (PermanentRedirect)" in caught.value.message
            assert "WASABI_REGION" in caught.value.next_step


async def test_what_a_storage_says_of_a_redirect_is_bounded(s3: S3Server, tmp_path: Path) -> None:
    long = "a" * 30_000
    for answer in (
        Answer(307, b"x" * 3_000_000, {"Location": f"http://{long}/{long}"}),
        Answer(301, f"<Error><Code>{long}</Code><Endpoint>{long}</Endpoint></Error>".encode(), {"x-amz-bucket-region": long}),
    ):
        with start_http(answer) as server:
            with pytest.raises(Unavailable, match="storage_redirected") as caught:
                await get(open_store(s3, server.url), tmp_path)
            assert len(str(caught.value)) < 1000


@fault(
    "S3: GET sends more than HEAD said",
    injector="gateway",
    invariants="LPRH",
    outcome="not received; looked up again by the next attempt",
)
async def test_more_bytes_than_room_was_reserved_for_are_not_received(s3: S3Server, gateway: Gateway, tmp_path: Path) -> None:
    for known in (ObjectInfo("a/large.bin", 1000, ETAG), ObjectInfo("a/large.bin", len(LARGE) - 1, "other")):
        got: list[int] = []
        object_size = str(len(LARGE))
        with pytest.raises(Unavailable) as caught:
            await open_store(s3, gateway.url).fetch("a/large.bin", tmp_path / "target", got.append, known=known)
        assert caught.value.code == "object_changed"
        assert object_size in caught.value.message
        assert got == []
    assert names_in(tmp_path) == []


# --- TLS and proxies --------------------------------------------------------------------------------------------


@asynccontextmanager
async def tls_in_front(server: HttpServer, folder: Path) -> AsyncIterator[tuple[str, Path, Path]]:
    """Yield an https URL that forwards to the server, with the authority that signed its certificate and a foreign one."""
    certificates = make_certificates(folder)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates.server, certificates.server_key)

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
        await asyncio.gather(pipe(reader, back), pipe(there, writer))

    listening = await asyncio.start_server(forward, "127.0.0.1", 0, ssl=context)
    try:
        yield f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}", certificates.authority, certificates.foreign
    finally:
        listening.close()


async def test_tls_is_verified_by_the_authorities_of_the_environment(
    s3: S3Server, gateway: Gateway, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with tls_in_front(gateway, tmp_path_factory.mktemp("tls")) as (url, authority, foreign):
        monkeypatch.setenv("SSL_CERT_FILE", str(foreign))
        with pytest.raises(Unavailable, match="its TLS certificate is not trusted"):
            await get(open_store(s3, url), tmp_path)
        assert gateway.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        store = open_store(s3, url)
        await get(store, tmp_path)
        assert (tmp_path / "target").read_bytes() == LARGE


async def test_a_redirect_from_https_to_http_is_refused_even_to_a_listed_host(
    s3: S3Server, gateway: Gateway, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with tls_in_front(gateway, tmp_path_factory.mktemp("tls")) as (url, authority, _):
        with start_http(Answer(200, b"x")) as plain:
            monkeypatch.setenv("SSL_CERT_FILE", str(authority))
            gateway.spoil = redirect_to(plain.url)
            with pytest.raises(Unavailable, match="the redirect leaves https"):
                await get(open_store(s3, url, redirect_hosts=["127.0.0.1"]), tmp_path)
            assert plain.requests == []


async def test_a_plain_server_is_not_taken_for_a_tls_one(s3: S3Server, gateway: Gateway, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="it does not speak TLS"):
        await get(open_store(s3, gateway.url.replace("http:", "https:")), tmp_path)


async def test_the_environments_proxy_is_used_unless_no_proxy_names_the_host(
    s3: S3Server, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HTTP_PROXY", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with start_http(Answer(403, b"<Error><Code>AccessDenied</Code></Error>")) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//user:p%40ss@"))
        with pytest.raises(Rejected, match="storage_denied"):
            await get(open_store(s3, gateway.url), tmp_path)
        assert proxy.requests[0].path == f"{gateway.url}/studio/a/large.bin"
        assert proxy.requests[0].headers["proxy-authorization"] == "Basic dXNlcjpwQHNz"
        assert gateway.requests == []
        for exempt in ("127.0.0.1", "127.0.0.0/8", "*", "example.org, 127.0.0.1"):
            monkeypatch.setenv("no_proxy", exempt)
            await stat(open_store(s3, gateway.url), tmp_path)
        assert len(proxy.requests) == 1


@asynccontextmanager
async def connect_proxy(heads: list[str], answer: bytes) -> AsyncIterator[str]:
    """Yield the URL of a proxy that answers each CONNECT so, and leads on to what was asked for if that is 200."""

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def lead_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(answer)
        if b" 200 " not in answer:
            writer.close()
            return
        host, _, port = heads[-1].split()[1].rpartition(":")
        there, back = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pipe(reader, back), pipe(there, writer))

    listening = await asyncio.start_server(lead_on, "127.0.0.1", 0)
    try:
        yield f"http://user:p%40ss@127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()


async def test_https_goes_through_the_proxys_tunnel_and_is_verified_behind_it(
    s3: S3Server, gateway: Gateway, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HTTPS_PROXY", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    heads: list[str] = []
    async with (
        tls_in_front(gateway, tmp_path_factory.mktemp("tls")) as (url, authority, foreign),
        connect_proxy(heads, b"HTTP/1.1 200 OK\r\n\r\n") as proxy,
    ):
        monkeypatch.setenv("https_proxy", proxy)
        monkeypatch.setenv("SSL_CERT_FILE", str(foreign))
        with pytest.raises(Unavailable, match="its TLS certificate is not trusted"):
            await get(open_store(s3, url), tmp_path)
        assert gateway.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        await get(open_store(s3, url), tmp_path)
        assert (tmp_path / "target").read_bytes() == LARGE
        assert "proxy-authorization" not in gateway.requests[0].headers
        assert "Basic dXNlcjpwQHNz" in heads[-1]
        assert s3.access_key not in str(heads)


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 407 Who are you\r\n\r\n", b"", None], ids=["refuses", "no answer", "closed port"]
)
async def test_a_proxy_that_does_not_lead_on_is_named(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: bytes | None
) -> None:
    for name in ("HTTPS_PROXY", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with connect_proxy([], answer or b"") as proxy:
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:1" if answer is None else proxy)
        with pytest.raises(Unavailable, match="the proxy that the environment names does not connect to it") as caught:
            await get(open_store(s3, "https://127.0.0.1:1"), tmp_path)
        assert "p@ss" not in str(caught.value)


async def test_connections_are_kept_for_the_next_request(s3: S3Server, tmp_path: Path) -> None:
    """rclone keeps connections open; as many are opened as are used at once."""
    store = open_store(s3, s3.endpoint)
    for _ in range(20):
        await get(store, tmp_path)
        await stat(store, tmp_path)
    assert sum(map(len, store._connections._idle.values())) == 1


async def test_a_kept_connection_that_the_server_has_closed_is_replaced(s3: S3Server, gateway: Gateway, tmp_path: Path) -> None:
    """The gateway closes each connection after an answer without saying so."""
    store = open_store(s3, gateway.url)
    for _ in range(5):
        await get(store, tmp_path)
    assert len(gateway.requests) == 5
    gateway.spoil = pass_on
