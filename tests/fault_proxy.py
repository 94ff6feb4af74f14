"""A TCP proxy that misbehaves as told: put it in front of a part, and point the client at it.

    with fault_proxy(("127.0.0.1", 6379)) as proxy:            # own_process=True where this process is busy
        connect("127.0.0.1", proxy.port)
        proxy.freeze()
        ...
        proxy.heal()

"up" is from the client to the part, "down" is back. What is set holds for open connections and for new ones until `heal`.

    python tests/fault_proxy.py HOST:PORT     the same by hand: one JSON command per line, {"do": "delay", "round_trip_ms": 50}
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from ncr_upload.entrypoints.embedded.sockets import find_free_port

Direction = Literal["up", "down"]
Target = tuple[str, int]

CHUNK_BYTES = 256 * 1024
AHEAD_BYTES = 1024 * 1024
AHEAD_WHEN_DELAYED_BYTES = 32 * 1024 * 1024
BURST_SECONDS = 0.02
ANSWER_SECONDS = 20
DRAIN_SECONDS = 0.05
"""A reset throws away what the other end has not read: what was forwarded before it has this long to arrive."""

PORT_TRIES = 20
RESET = struct.pack("ii", 1, 0)


# --- what may be asked of a proxy ---------------------------------------------------------------------------------


class FaultProxy:
    """A running proxy. `port` is where it listens on 127.0.0.1. Safe to use from any thread."""

    port: int

    def _do(self, name: str, **arguments: Any) -> Any:
        raise NotImplementedError

    def heal(self) -> None:
        """Forward everything again, at full speed. Connections that were held silent or lost their answer are reset."""
        self._do("heal")

    def divert(self, port: int) -> None:
        """Reset the open connections; new ones go to this port of the part's host, until `heal` resets them in their turn."""
        self._do("divert", port=port)

    def refuse(self) -> None:
        """New connections are refused and the open ones reset."""
        self._do("refuse")

    def half_open(self) -> None:
        """New connections are accepted and nothing is ever said on them; the open ones go silent too."""
        self._do("half_open")

    def freeze(self, direction: Direction | None = None) -> None:
        """Forward nothing (in one direction, if given), and keep the connections. What is withheld arrives after `heal`."""
        self._do("freeze", direction=direction)

    def cut(self) -> int:
        """Reset every open connection now; how many there were. What was withheld is lost."""
        return int(self._do("cut"))

    def cut_after(self, count: int, direction: Direction = "up", times: int = 1) -> None:
        """Reset a connection when it has forwarded `count` more bytes in the direction, exactly; so often in all."""
        self._do("cut_after", count=count, direction=direction, times=times)

    def lose_answer(self, pattern: bytes, times: int = 1) -> None:
        """Forward the next request that has the bytes in it, and reset its connection instead of forwarding the answer."""
        self._do("lose_answer", pattern=pattern.hex(), times=times)

    def delay(self, round_trip_ms: float) -> None:
        """Half of it in each direction; what is on its way does not wait for one another."""
        self._do("delay", round_trip_ms=round_trip_ms)

    def throttle(self, connection_bytes_per_second: float | None = None, all_bytes_per_second: float | None = None) -> None:
        """In each direction, for each connection and for all together."""
        self._do("throttle", connection_rate=connection_bytes_per_second, all_rate=all_bytes_per_second)

    def count(self) -> dict[str, int]:
        """`connections` open, `accepted`, `cuts`, `lost` answers, and bytes forwarded `up` and `down`."""
        counted: dict[str, int] = self._do("count")
        return counted


@contextmanager
def fault_proxy(target: Target, *, port: int = 0, own_process: bool = False) -> Iterator[FaultProxy]:
    """A proxy in front of `target`, in a thread, or in a process for a client that needs this one's time (benchmarks)."""
    proxy = _ProxyProcess(target, port) if own_process else _ProxyThread(target, port)
    try:
        yield proxy
    finally:
        proxy.close()


class _ProxyThread(FaultProxy):
    def __init__(self, target: Target, port: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._core = _Core(target, port)
        self.port = self._core.port
        self._thread = threading.Thread(target=self._run, name=f"proxy-{self.port}", daemon=True)
        self._thread.start()
        self._do("count")

    def _run(self) -> None:
        self._loop.run_until_complete(self._core.serve())
        self._loop.close()

    def _do(self, name: str, **arguments: Any) -> Any:
        async def call() -> Any:
            return self._core.do(name, arguments)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(ANSWER_SECONDS)

    def close(self) -> None:
        self._do("close")
        self._thread.join(ANSWER_SECONDS)


class _ProxyProcess(FaultProxy):
    def __init__(self, target: Target, port: int) -> None:
        command = [sys.executable, __file__, f"{target[0]}:{target[1]}", "--port", str(port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lock = threading.Lock()
        self.port = int(self._read()["port"])

    def _do(self, name: str, **arguments: Any) -> Any:
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"do": name, **arguments}) + "\n")
            self._process.stdin.flush()
            return self._read()["answer"]

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the proxy ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


# --- the proxy itself, on one event loop ----------------------------------------------------------------------------


@dataclass
class _Faults:
    """What is wrong now."""

    silent: bool = False
    frozen: set[Direction] = field(default_factory=set)
    one_way_seconds: float = 0
    connection_rate: float | None = None
    all_rate: float | None = None
    cut_after: tuple[Direction, int] | None = None
    cuts_left: int = 0
    lose_pattern: bytes = b""
    losses_left: int = 0


class _Pace:
    """When the next bytes may go, at so many bytes per second."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def book(self, count: int, rate: float | None) -> float:
        """Seconds to wait before so many bytes are sent."""
        if not rate:
            return 0
        now = time.monotonic()
        self._free_at = max(self._free_at, now - BURST_SECONDS) + count / rate
        return self._free_at - now


class _Core:
    def __init__(self, target: Target, port: int) -> None:
        self._target = self._part = target
        self._listener = _bind(port)
        self._listener.listen(256)
        self.port = int(self._listener.getsockname()[1])
        self.faults = _Faults()
        self.pace: dict[Direction, _Pace] = {"up": _Pace(), "down": _Pace()}
        self.counts = {"accepted": 0, "cuts": 0, "lost": 0, "up": 0, "down": 0}
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._closed = asyncio.Event()
        self._accepting: asyncio.Task[None] | None = None

    def do(self, name: str, arguments: dict[str, Any]) -> Any:
        answer = getattr(self, f"_do_{name}")(**arguments)
        self._changed.set()
        self._changed = asyncio.Event()
        return answer

    async def serve(self) -> None:
        self._accept()
        await self._closed.wait()
        for task in [*self._tasks, *([self._accepting] if self._accepting else [])]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()

    async def change(self) -> None:
        """Returns when something was asked of the proxy."""
        await self._changed.wait()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def drop(self, link: _Link) -> None:
        self._links.discard(link)

    def _accept(self) -> None:
        self._accepting = asyncio.create_task(self._accept_all())

    async def _accept_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(self._listener)
            except OSError:
                await asyncio.sleep(0.01)
                continue
            self.counts["accepted"] += 1
            link = _Link(self, client)
            self._links.add(link)
            link.began = self.start(link.run(self._target))

    # --- commands ---------------------------------------------------------------------------------------------------

    def _do_heal(self) -> None:
        refused = self._accepting is None
        self.faults = _Faults()
        if self._target != self._part:
            self._target = self._part
            self._do_cut()
        for link in [link for link in self._links if link.doomed]:
            link.reset()
        if refused:
            self._listener.listen(256)
            self._accept()

    def _do_refuse(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            self._accepting = None
            self._listener.shutdown(socket.SHUT_RDWR)
        self._do_cut()

    def _do_divert(self, port: int) -> None:
        self._target = (self._part[0], port)
        self._do_cut()

    def _do_half_open(self) -> None:
        self.faults.silent = True
        for link in self._links:
            link.doomed = True

    def _do_freeze(self, direction: Direction | None) -> None:
        self.faults.frozen |= {direction} if direction else {"up", "down"}

    def _do_cut(self) -> int:
        links = list(self._links)
        for link in links:
            link.reset()
        self.counts["cuts"] += len(links)
        return len(links)

    def _do_cut_after(self, count: int, direction: Direction, times: int) -> None:
        self.faults.cut_after, self.faults.cuts_left = (direction, count), times
        for link in self._links:
            link.forwarded[direction] = 0

    def _do_lose_answer(self, pattern: str, times: int) -> None:
        self.faults.lose_pattern, self.faults.losses_left = bytes.fromhex(pattern), times

    def _do_delay(self, round_trip_ms: float) -> None:
        self.faults.one_way_seconds = round_trip_ms / 2000

    def _do_throttle(self, connection_rate: float | None, all_rate: float | None) -> None:
        self.faults.connection_rate, self.faults.all_rate = connection_rate, all_rate

    def _do_count(self) -> dict[str, int]:
        return {"connections": len(self._links), **self.counts}

    def _do_close(self) -> None:
        self._closed.set()
        self._do_cut()


class _Link:
    """One connection of a client with its connection to the part."""

    def __init__(self, core: _Core, client: socket.socket) -> None:
        self.core = core
        self.doomed = core.faults.silent
        self.forwarded: dict[Direction, int] = {"up": 0, "down": 0}
        self.pace: dict[Direction, _Pace] = {"up": _Pace(), "down": _Pace()}
        self.began: asyncio.Task[None] | None = None
        self._sockets = [client]
        self._tail = b""
        self._loses_answer = False

    async def run(self, target: Target) -> None:
        loop = asyncio.get_running_loop()
        try:
            _prepare(self._sockets[0])
            while self.doomed:
                await self.core.change()
            part = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            self._sockets.append(part)
            _prepare(part)
            await loop.sock_connect(part, target)
            pumps = [self.core.start(_Pump(self, "up").run()), self.core.start(_Pump(self, "down").run())]
            try:
                await asyncio.gather(*pumps)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, _Reset):
            self._mark_reset()
        finally:
            self._close()

    def ends(self, direction: Direction) -> tuple[socket.socket, socket.socket]:
        client, part = self._sockets
        return (client, part) if direction == "up" else (part, client)

    def look_at(self, direction: Direction, chunk: bytes) -> None:
        """Raises `_Reset` when this is the answer that shall be lost."""
        faults = self.core.faults
        if direction == "down":
            if self._loses_answer:
                self.core.counts["lost"] += 1
                raise _Reset
            return
        if faults.losses_left > 0 and faults.lose_pattern:
            seen = self._tail + chunk
            if faults.lose_pattern in seen:
                faults.losses_left -= 1
                self._loses_answer = self.doomed = True
            self._tail = seen[-(len(faults.lose_pattern) - 1) :] if len(faults.lose_pattern) > 1 else b""

    def reset(self) -> None:
        """Both ends see a reset, not an orderly end."""
        self._mark_reset()
        if self.began is not None:
            self.began.cancel()

    def _mark_reset(self) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def _close(self) -> None:
        self.core.drop(self)
        for each in self._sockets:
            each.close()


class _Reset(Exception):
    """The connection is to be reset."""


class _Pump:
    """One direction of one connection: reads ahead, and sends each chunk when it is due."""

    def __init__(self, link: _Link, direction: Direction) -> None:
        self._link = link
        self._core = link.core
        self._direction: Direction = direction
        self._source, self._sink = link.ends(direction)
        self._chunks: deque[tuple[float, bytes | None]] = deque()
        self._ahead = 0
        self._moved = asyncio.Event()

    async def run(self) -> None:
        reading = asyncio.create_task(self._read())
        try:
            await self._send()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        chunk = b"."
        while chunk:
            while self._ahead > (AHEAD_WHEN_DELAYED_BYTES if self._core.faults.one_way_seconds else AHEAD_BYTES):
                await self._wait()
            try:
                chunk = await loop.sock_recv(self._source, CHUNK_BYTES)
            except OSError:
                self._chunks.append((0, None))
                self._move()
                return
            self._chunks.append((time.monotonic() + self._core.faults.one_way_seconds, chunk))
            self._ahead += len(chunk)
            self._move()

    async def _send(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._chunks:
                await self._wait()
            due, chunk = self._chunks.popleft()
            if chunk is None:
                raise _Reset
            await self._hold(due - time.monotonic())
            if not chunk:
                with suppress(OSError):
                    self._sink.shutdown(socket.SHUT_WR)
                return
            for piece in self._pieces(chunk):
                await self._pay(len(piece))
                self._link.look_at(self._direction, piece)
                await self._forward(loop, piece)
            self._ahead -= len(chunk)
            self._move()

    async def _hold(self, seconds: float) -> None:
        """Wait for the delay, and for as long as this direction is frozen or the connection is silent."""
        if seconds > 0:
            await asyncio.sleep(seconds)
        while self._direction in self._core.faults.frozen or self._core.faults.silent:
            await self._core.change()

    def _pieces(self, chunk: bytes) -> Iterator[bytes]:
        """Small enough that a slow connection trickles instead of jerking."""
        faults = self._core.faults
        rates = [rate for rate in (faults.connection_rate, faults.all_rate) if rate]
        size = max(512, min(CHUNK_BYTES, int(min(rates) / 50))) if rates else CHUNK_BYTES
        return (chunk[at : at + size] for at in range(0, len(chunk), size))

    async def _pay(self, count: int) -> None:
        faults = self._core.faults
        own = self._link.pace[self._direction].book(count, faults.connection_rate)
        seconds = max(own, self._core.pace[self._direction].book(count, faults.all_rate))
        await self._hold(seconds)

    async def _forward(self, loop: asyncio.AbstractEventLoop, piece: bytes) -> None:
        faults, direction = self._core.faults, self._direction
        cut_here = False
        if faults.cuts_left > 0 and faults.cut_after is not None and faults.cut_after[0] == direction:
            room = faults.cut_after[1] - self._link.forwarded[direction]
            cut_here = len(piece) >= room
            piece = piece[: max(room, 0)]
        if piece:
            await loop.sock_sendall(self._sink, piece)
        self._link.forwarded[direction] += len(piece)
        self._core.counts[direction] += len(piece)
        if cut_here:
            faults.cuts_left -= 1
            self._core.counts["cuts"] += 1
            await asyncio.sleep(DRAIN_SECONDS)
            raise _Reset

    def _move(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    async def _wait(self) -> None:
        await self._moved.wait()


def _bind(port: int) -> socket.socket:
    """Bound for good: to a port by its number, which Linux keeps when the listening ends. SO_REUSEADDR, so that it may listen
    again while connections of before are in TIME_WAIT, comes after: the port must be nobody else's at first."""
    for _ in range(1 if port else PORT_TRIES):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setblocking(False)
        try:
            listener.bind(("127.0.0.1", port or find_free_port(set())))
        except OSError:
            listener.close()
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            return listener
    raise OSError(f"no port for the proxy (asked for: {port or 'any'})")


def _prepare(each: socket.socket) -> None:
    each.setblocking(False)
    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def _serve_commands(target: Target, port: int) -> None:
    """Commands from standard input, answers to standard output; ends with its input."""
    core = _Core(target, port)
    serving = asyncio.create_task(core.serve())
    _say({"port": core.port})
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        answer = core.do(command.pop("do"), command)
        _say({"answer": answer})
    core.do("close", {})
    await serving


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", metavar="HOST:PORT", help="the part it stands in front of")
    parser.add_argument("--port", type=int, default=0, help="where it listens on 127.0.0.1 (default: a free one, printed)")
    arguments = parser.parse_args()
    host, _, port = arguments.target.rpartition(":")
    asyncio.run(_serve_commands((host, int(port)), arguments.port))


if __name__ == "__main__":
    main()
