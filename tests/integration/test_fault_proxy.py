"""The fault proxy does to a connection what it says."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from fault_proxy import FaultProxy, Target, fault_proxy
from patience import allowed

MEGABYTE = 1024 * 1024


class Echo(socketserver.BaseRequestHandler):
    """Answers every chunk with itself, and remembers what came."""

    def handle(self) -> None:
        while not self.server.hangs_up and (data := self._read()):  # type: ignore[attr-defined]
            self.server.heard += data  # type: ignore[attr-defined]
            self.request.sendall(data)

    def _read(self) -> bytes:
        try:
            return bytes(self.request.recv(MEGABYTE))
        except ConnectionError:
            return b""


class EchoServer(socketserver.ThreadingTCPServer):
    daemon_threads = True
    heard = b""
    hangs_up = False


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    with EchoServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(params=["thread", "process"])
def proxy(request: pytest.FixtureRequest, echo: EchoServer) -> Iterator[FaultProxy]:
    with fault_proxy(target_of(echo), own_process=request.param == "process") as running:
        yield running


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[socket.socket]:
    with connect(proxy) as connection:
        assert ask(connection, b"hello") == b"hello"
        yield connection


def target_of(server: EchoServer) -> Target:
    return ("127.0.0.1", server.server_address[1])


def connect(proxy: FaultProxy, timeout_seconds: float = 20) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout_seconds)


def ask(connection: socket.socket, request: bytes) -> bytes:
    connection.sendall(request)
    answer = b""
    while len(answer) < len(request):
        chunk = connection.recv(MEGABYTE)
        assert chunk, "the connection ended"
        answer += chunk
    return answer


def is_silent(connection: socket.socket, seconds: float = 0.3) -> bool:
    connection.settimeout(seconds)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(20)
    return False


def wait_for_bytes(echo: EchoServer, content: bytes) -> None:
    deadline = time.monotonic() + 20
    while echo.heard != content:
        assert time.monotonic() < deadline, echo.heard
        time.sleep(0.01)


def test_what_goes_through_is_unchanged_and_counted(client: socket.socket, proxy: FaultProxy) -> None:
    load = bytes(range(256)) * 8192
    sender = threading.Thread(target=client.sendall, args=(load,))
    sender.start()
    received = b""
    while len(received) < len(load):
        received += client.recv(MEGABYTE)
    sender.join()
    assert received == load
    counted = proxy.count()
    assert (counted["up"], counted["down"], counted["connections"]) == (len(load) + 5, len(load) + 5, 1)


def test_the_end_of_one_direction_leaves_the_other_open(client: socket.socket) -> None:
    client.sendall(b"last words")
    client.shutdown(socket.SHUT_WR)
    received = b""
    while chunk := client.recv(100):
        received += chunk
    assert received == b"last words"


def test_refused_until_healed_on_the_same_port(client: socket.socket, proxy: FaultProxy) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.heal()
    with connect(proxy) as again:
        assert ask(again, b"back") == b"back"


def test_a_refusal_heals_although_connections_of_before_are_in_time_wait(proxy: FaultProxy, echo: EchoServer) -> None:
    echo.hangs_up = True
    with connect(proxy) as connection:
        assert connection.recv(1) == b""
    proxy.refuse()
    proxy.heal()
    echo.hangs_up = False
    with connect(proxy) as again:
        assert ask(again, b"back") == b"back"


def test_half_open_accepts_and_says_nothing(client: socket.socket, proxy: FaultProxy) -> None:
    proxy.half_open()
    with connect(proxy) as other:
        other.sendall(b"anyone?")
        client.sendall(b"anyone?")
        assert is_silent(other)
        assert is_silent(client)
        proxy.heal()
        with pytest.raises(ConnectionResetError):
            other.recv(1)


def test_frozen_bytes_arrive_after_healing(client: socket.socket, proxy: FaultProxy) -> None:
    proxy.freeze()
    client.sendall(b"later")
    assert is_silent(client)
    proxy.heal()
    assert client.recv(5) == b"later"


def test_an_answer_withheld_and_cut_is_lost_although_the_request_was_done(
    client: socket.socket, proxy: FaultProxy, echo: EchoServer
) -> None:
    proxy.freeze("down")
    client.sendall(b" rename")
    wait_for_bytes(echo, b"hello rename")
    assert proxy.cut() == 1
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_cut_after_so_many_bytes_forwards_exactly_those(client: socket.socket, proxy: FaultProxy, echo: EchoServer) -> None:
    proxy.cut_after(1000, "up")
    client.sendall(b"x" * 5000)
    with pytest.raises(ConnectionError):
        ask(client, b"x" * 5000)
    assert echo.heard == b"hello" + b"x" * 1000
    with connect(proxy) as other:
        assert ask(other, b"y" * 5000) == b"y" * 5000


def test_the_answer_to_a_chosen_request_is_lost_once(client: socket.socket, proxy: FaultProxy, echo: EchoServer) -> None:
    proxy.lose_answer(b"COMMIT")
    assert ask(client, b"SELECT 1") == b"SELECT 1"
    client.sendall(b"COM")
    assert client.recv(3) == b"COM"
    client.sendall(b"MIT;")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    wait_for_bytes(echo, b"helloSELECT 1COMMIT;")
    with connect(proxy) as other:
        assert ask(other, b"COMMIT;") == b"COMMIT;"
    assert proxy.count()["lost"] == 1


def test_a_delay_is_a_round_trip_and_not_per_chunk(client: socket.socket, proxy: FaultProxy) -> None:
    proxy.delay(200)
    began = time.monotonic()
    for _ in range(60):
        client.sendall(b"ping")
        time.sleep(0.01)
    received = b""
    while len(received) < 240:
        received += client.recv(100)
    assert 0.2 <= time.monotonic() - began < allowed(10), "that is nearly the delay for each chunk"


@pytest.mark.parametrize("limit", ["connection_bytes_per_second", "all_bytes_per_second"])
def test_a_throttle_bounds_the_speed(client: socket.socket, proxy: FaultProxy, limit: str) -> None:
    proxy.throttle(**{limit: 1_000_000})
    began = time.monotonic()
    assert len(ask(client, b"z" * 500_000)) == 500_000
    assert 0.4 <= time.monotonic() - began < allowed(10)


def test_delay_and_throttle_together_reach_the_speed_asked_for(proxy: FaultProxy) -> None:
    """20 MB at 60 MB/s with a round trip of 1 s take under two seconds; a proxy that stopped and waited for each of 80
    chunks would need forty."""
    proxy.delay(1000)
    proxy.throttle(all_bytes_per_second=60 * MEGABYTE)
    with connect(proxy) as connection:
        load = bytes(20 * MEGABYTE)
        began = time.monotonic()
        sender = threading.Thread(target=connection.sendall, args=(load,))
        sender.start()
        received = 0
        while received < len(load):
            received += len(connection.recv(MEGABYTE))
        sender.join()
    assert 20 / 60 < time.monotonic() - began < allowed(6)
