"""The faults: each is made, held for a moment that the seed chooses, and made good again by itself."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil
from redis import RedisError
from sqlalchemy import text

from chaos.stack import DATABASES, LEASE_SECONDS, ChaosStack
from ncr_upload.application.crash_points import CRASH_POINTS

BULK = {("s3", "down"), ("validator", "up"), ("sftp", "up")}
"""Where files go; elsewhere are only small messages."""

MEET_SECONDS = 10.0
"""How long a fault waits for something to happen to."""

STEP_SECONDS = 0.05

Make = Callable[[ChaosStack, random.Random], Awaitable[bool]]


@dataclass(frozen=True)
class Fault:
    """`name` is `part: fault`; two faults of one part are not made at once. `make` says whether it met anything."""

    name: str
    make: Make
    databases: Sequence[str] = DATABASES
    needs_disk: bool = False
    copies: bool = False
    """Whether the destination cannot rename folders meanwhile, so that nothing can become visible at once."""

    @property
    def part(self) -> str:
        return self.name.partition(":")[0]


def list_faults(database: str, *, has_disk: bool) -> list[Fault]:
    """Those that can be made here, in an order that does not change."""
    everything = [*_processes(), *_crashes(), *_redis(), *_sql(), *_connections(), *_destination()]
    return [fault for fault in everything if database in fault.databases and (has_disk or not fault.needs_disk)]


def deal(numbers: random.Random, faults: Sequence[Fault], first: Fault) -> list[Fault]:
    """`first`, and none to two more of other parts."""
    dealt = [first]
    for _ in range(numbers.choices((0, 1, 2), weights=(35, 50, 15))[0]):
        others = [fault for fault in faults if fault.part not in {each.part for each in dealt}]
        dealt += [numbers.choice(others)] if others else []
    return dealt


# --- processes -------------------------------------------------------------------------------------------------------


def _processes() -> list[Fault]:
    killed = [Fault(f"{part}: killed", _kill(part)) for part in ("api", "worker", "beat", "redis", "s3", "validator", "sftp")]
    return [
        *killed,
        Fault("worker: a child killed", _kill_child),
        Fault("worker: every child killed", _kill_children),
        Fault("worker: SIGTERM", _terminate_worker),
        Fault("worker: SIGTERM twice", _terminate_worker_twice),
        Fault("worker: a child stopped longer than its lease", _stop_child),
        Fault("worker: stopped whole, longer than the lease", _stop_worker),
        Fault("sftp: sessions killed", _kill_sessions),
        Fault("beat: stopped", _stop_process("beat")),
        Fault("redis: stopped", _stop_process("redis")),
        Fault("validator: stopped", _stop_process("validator")),
    ]


def _kill(part: str) -> Make:
    async def make(stack: ChaosStack, numbers: random.Random) -> bool:
        return _signal([stack.process(part)], signal.SIGKILL)

    return make


async def _kill_child(stack: ChaosStack, numbers: random.Random) -> bool:
    children = await asyncio.to_thread(stack.busy_children)
    return bool(children) and _signal([numbers.choice(children)], signal.SIGKILL)


async def _kill_children(stack: ChaosStack, numbers: random.Random) -> bool:
    return _signal(stack.worker_children(), signal.SIGKILL)


async def _terminate_worker(stack: ChaosStack, numbers: random.Random) -> bool:
    return _signal([stack.process("worker")], signal.SIGTERM)


async def _terminate_worker_twice(stack: ChaosStack, numbers: random.Random) -> bool:
    worker = stack.process("worker")
    _signal([worker], signal.SIGTERM)
    await asyncio.sleep(numbers.uniform(0.1, 2))
    return _signal([worker], signal.SIGTERM)


async def _stop_child(stack: ChaosStack, numbers: random.Random) -> bool:
    children = await asyncio.to_thread(stack.busy_children)
    if not children:
        return False
    return await _stop([numbers.choice(children)], LEASE_SECONDS + numbers.uniform(1, 4))


async def _stop_worker(stack: ChaosStack, numbers: random.Random) -> bool:
    processes = [stack.process("worker"), *stack.worker_children()]
    return await _stop(processes, LEASE_SECONDS + numbers.uniform(0.5, 2))


def _stop_process(part: str) -> Make:
    async def make(stack: ChaosStack, numbers: random.Random) -> bool:
        return await _stop([stack.process(part)], numbers.uniform(1, 6))

    return make


async def _kill_sessions(stack: ChaosStack, numbers: random.Random) -> bool:
    met = False
    for _ in range(numbers.randint(1, 3)):
        # The observer's own sessions too: it logs in again.
        await _until(lambda: stack.proxies["sftp"].count()["connections"] > 0, MEET_SECONDS)
        await asyncio.sleep(numbers.uniform(0, 0.7))
        met |= _signal(stack.process("sftp").children(recursive=True), signal.SIGKILL)
    return met


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> bool:
    met = False
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)
            met = True
    return met


async def _stop(processes: Sequence[psutil.Process], seconds: float) -> bool:
    met = _signal(processes, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        _signal(processes, signal.SIGCONT)
    return met


# --- crash points ----------------------------------------------------------------------------------------------------


def _crashes() -> list[Fault]:
    in_worker = [Fault(f"worker: crash at {point}", _crash(point)) for point in CRASH_POINTS]
    return [*in_worker, Fault("api: crash between commit and ring", _crash("ring:before"))]


def _crash(point: str) -> Make:
    """The next process that comes to the point kills itself there."""

    async def make(stack: ChaosStack, numbers: random.Random) -> bool:
        stack.crash_order.write_text(point)
        try:
            for _ in range(int(MEET_SECONDS / STEP_SECONDS)):
                if not stack.crash_order.exists():
                    return True
                await asyncio.sleep(STEP_SECONDS)
            return False
        finally:
            stack.crash_order.unlink(missing_ok=True)

    return make


# --- Redis -----------------------------------------------------------------------------------------------------------


def _redis() -> list[Fault]:
    return [
        Fault("redis: FLUSHALL", _flush),
        Fault("redis: maxmemory reached", _fill_redis),
        Fault("redis: a BRPOP reply cut", _lose("redis", b"BRPOP")),
        Fault("redis: an LPUSH reply cut", _lose("redis", b"LPUSH")),
    ]


async def _flush(stack: ChaosStack, numbers: random.Random) -> bool:
    return await asyncio.to_thread(_ask_redis, stack, "FLUSHALL")


async def _fill_redis(stack: ChaosStack, numbers: random.Random) -> bool:
    met = await asyncio.to_thread(_ask_redis, stack, "CONFIG", "SET", "maxmemory", "1")
    try:
        await asyncio.sleep(numbers.uniform(1, 4))
    finally:
        # Killed meanwhile, it comes back without the limit.
        for _ in range(50):
            if await asyncio.to_thread(_ask_redis, stack, "CONFIG", "SET", "maxmemory", "0"):
                break
            await asyncio.sleep(0.2)
    return met


def _ask_redis(stack: ChaosStack, *command: str) -> bool:
    try:
        with stack.redis() as client:
            client.execute_command(*command)
    except (RedisError, OSError):
        return False
    return True


# --- the database ----------------------------------------------------------------------------------------------------

SERVERS = DATABASES[1:]


def _sql() -> list[Fault]:
    on_connections = [
        Fault(f"database: {name}", make, SERVERS)
        for name, make in _connection_faults("database").items()
        if name not in ("a connection cut mid-answer", "throttled")
    ]
    return [
        *on_connections,
        Fault("database: locked", _lock),
        Fault("database: killed", _kill_database, SERVERS),
        Fault("database: COMMIT's answer lost", _lose("database", b"COMMIT\0"), ("postgresql",)),  # not READ COMMITTED
        Fault("database: COMMIT's answer lost", _lose("database", b"COMMIT"), ("mariadb", "mysql")),
    ]


async def _kill_database(stack: ChaosStack, numbers: random.Random) -> bool:
    await asyncio.to_thread(stack.restart_database)
    return True


async def _lock(stack: ChaosStack, numbers: random.Random) -> bool:
    """The ledger, for some seconds, as a careless migration or a backup does."""
    statement = {
        "sqlite": "SELECT 1",  # its transactions lock the whole file as they begin
        "postgresql": "LOCK TABLE ncr_jobs IN ACCESS EXCLUSIVE MODE",
        "mariadb": "LOCK TABLES ncr_jobs WRITE",
        "mysql": "LOCK TABLES ncr_jobs WRITE",
    }[stack.database]
    seconds = numbers.uniform(1, 6)

    def hold() -> bool:
        with stack.engine.begin() as connection:
            connection.execute(text(statement))
            time.sleep(seconds)
            if stack.database in ("mariadb", "mysql"):
                connection.execute(text("UNLOCK TABLES"))
        return True

    return await asyncio.to_thread(hold)


# --- connections through the proxies ---------------------------------------------------------------------------------


def _connections() -> list[Fault]:
    parts = ("redis", "s3", "validator", "sftp")
    faults = [Fault(f"{part}: {name}", make) for part in parts for name, make in _connection_faults(part).items()]
    return [
        *faults,
        Fault("validator: answer lost after it ran", _lose("validator", b"POST /validate")),
        Fault("sftp: answers lost after the work was done", _lose_work("sftp")),
    ]


def _connection_faults(part: str) -> dict[str, Make]:
    return {
        "connections cut": _cut(part),
        "refused": _held(part, "refuse"),
        "half open": _held(part, "half_open"),
        "frozen": _held(part, "freeze"),
        "a connection cut mid-request": _cut_within(part, "up"),
        "a connection cut mid-answer": _cut_within(part, "down"),
        "throttled": _throttle(part),
    }


def _cut(part: str) -> Make:
    async def make(stack: ChaosStack, numbers: random.Random) -> bool:
        met = 0
        for _ in range(numbers.randint(1, 4)):
            await _until(lambda: stack.proxies[part].count()["connections"] > 0, MEET_SECONDS)
            await asyncio.sleep(numbers.choice((0, numbers.uniform(0, 0.5))))
            met += stack.proxies[part].cut()
        return met > 0

    return make


def _held(part: str, name: str) -> Make:
    async def make(stack: ChaosStack, numbers: random.Random) -> bool:
        proxy = stack.proxies[part]
        await _until(lambda: proxy.count()["connections"] > 0, MEET_SECONDS)
        before = proxy.count()
        getattr(proxy, name)()
        try:
            await asyncio.sleep(numbers.uniform(0.5, 7))
        finally:
            after = proxy.count()
            proxy.heal()
        return before["connections"] > 0 or after["accepted"] > before["accepted"]

    return make


def _cut_within(part: str, direction: str) -> Make:
    """After some bytes: within the first message, or far into a file."""

    async def make(stack: ChaosStack, numbers: random.Random) -> bool:
        proxy = stack.proxies[part]
        before = proxy.count()["cuts"]
        times = numbers.randint(1, 3)
        most = 6 if (part, direction) in BULK else 4
        proxy.cut_after(int(10 ** numbers.uniform(1, most)), direction, times)  # type: ignore[arg-type]
        try:
            return await _until(lambda: proxy.count()["cuts"] >= before + times, MEET_SECONDS)
        finally:
            proxy.heal()

    return make


def _throttle(part: str) -> Make:
    async def make(stack: ChaosStack, numbers: random.Random) -> bool:
        proxy = stack.proxies[part]
        before = proxy.count()
        proxy.throttle(all_bytes_per_second=10 ** numbers.uniform(4, 6))
        proxy.delay(numbers.uniform(0, 100))
        try:
            await asyncio.sleep(numbers.uniform(1, 6))
        finally:
            proxy.heal()
        return proxy.count()["up"] > before["up"]

    return make


def _lose(part: str, request: bytes) -> Make:
    async def make(stack: ChaosStack, numbers: random.Random) -> bool:
        proxy = stack.proxies[part]
        before, times = proxy.count()["lost"], numbers.randint(1, 3)
        proxy.lose_answer(request, times)
        try:
            await _until(lambda: proxy.count()["lost"] >= before + times, MEET_SECONDS)
            return proxy.count()["lost"] > before
        finally:
            proxy.heal()

    return make


def _lose_work(part: str) -> Make:
    """Requests still arrive and are done; their answers do not, and then the connection is gone."""

    async def make(stack: ChaosStack, numbers: random.Random) -> bool:
        proxy, met = stack.proxies[part], 0
        for _ in range(numbers.randint(1, 4)):
            await _until(lambda: proxy.count()["connections"] > 0, MEET_SECONDS)
            await asyncio.sleep(numbers.uniform(0.1, 0.8))
            proxy.freeze("down")
            await asyncio.sleep(numbers.uniform(0.02, 0.3))
            met += proxy.cut()
            proxy.heal()
        return met > 0

    return make


async def _until(holds: Callable[[], bool], seconds: float) -> bool:
    for _ in range(int(seconds / STEP_SECONDS)):
        if holds():
            return True
        await asyncio.sleep(STEP_SECONDS)
    return holds()


# --- the destination's disk ------------------------------------------------------------------------------------------


def _destination() -> list[Fault]:
    return [
        Fault("destination: disk full", _fill_disk, needs_disk=True),
        Fault("destination: permission denied", _deny("")),
        Fault("destination: permission denied in staging", _deny(".ncr-staging")),
        Fault("sftp: folders are renamed by copying", _copy_folders(breaks_off=False), copies=True),
        Fault("sftp: renames of folders break off", _copy_folders(breaks_off=True), copies=True),
    ]


def _copy_folders(*, breaks_off: bool) -> Make:
    """Another server on the same folder, for a while. At its end it is killed, perhaps while it copies."""

    async def make(stack: ChaosStack, numbers: random.Random) -> bool:
        stops = numbers.randint(0, 8) if breaks_off else -1
        deletes = numbers.choice(("each", "end", "never"))
        seconds = numbers.choice((0, 0.02, 0.3, 1.5))
        before = stack.proxies["sftp"].count()["accepted"]
        async with stack.copying_server(stops, deletes, seconds) as port:
            stack.proxies["sftp"].divert(port)
            try:
                await asyncio.sleep(numbers.uniform(4, 12))
            finally:
                met = stack.proxies["sftp"].count()["accepted"] > before
                stack.proxies["sftp"].heal()
        return met

    return make


async def _fill_disk(stack: ChaosStack, numbers: random.Random) -> bool:
    stack.destination.fill(numbers.choice((0, 100_000, 1_000_000)))
    try:
        await asyncio.sleep(numbers.uniform(1, 6))
    finally:
        stack.destination.empty()
    return True


def _deny(name: str) -> Make:
    async def make(stack: ChaosStack, numbers: random.Random) -> bool:
        folder = stack.destination.root / name
        if not folder.exists():
            return False
        folder.chmod(0o555)
        try:
            await asyncio.sleep(numbers.uniform(1, 5))
        finally:
            folder.chmod(0o755)
        return True

    return make
