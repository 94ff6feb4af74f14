"""The supervisor's promises, on small programs that stand in for the parts."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ncr_upload.entrypoints.embedded.credentials import load_credentials
from ncr_upload.entrypoints.embedded.parts import Part
from ncr_upload.entrypoints.embedded.probes import Probe
from ncr_upload.entrypoints.embedded.stack import Stack, StackRefused
from ncr_upload.entrypoints.embedded.supervisor import PartFailed, Supervisor
from patience import until, until_async

SLEEP = (sys.executable, "-c", "import time; time.sleep(120)")
WITH_CHILD = (
    sys.executable,
    "-c",
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)']);"
    "open(sys.argv[1], 'w').write(str(child.pid)); time.sleep(120)",
)


async def ready() -> bool:
    return True


async def never() -> bool:
    return False


def part(name: str, *command: str, is_ready: Probe = ready, stop_seconds: float = 5) -> Part:
    return Part(name, command, dict(os.environ), is_ready, stop_seconds=stop_seconds)


class Told:
    def __init__(self) -> None:
        self.restarts = 0
        self.lines: list[str] = []

    def on_restart(self) -> None:
        self.restarts += 1


def supervise(folder: Path, told: Told, *parts: Part) -> Supervisor:
    return Supervisor(parts, run_dir=folder, log_dir=folder, on_restart=told.on_restart, tell=told.lines.append)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_part_that_dies_is_started_again_with_a_new_process(tmp_path: Path) -> None:
    async def run() -> None:
        told = Told()
        supervisor = supervise(tmp_path, told, part("redis", *SLEEP), part("s3", *SLEEP))
        try:
            await supervisor.start()
            before = supervisor.pids()
            os.kill(before["redis"], signal.SIGKILL)
            await until_async(lambda: told.restarts == 1)
            after = supervisor.pids()
            assert after["redis"] != before["redis"]
            assert after["s3"] == before["s3"]
            assert is_alive(after["redis"])
            assert "redis was killed by SIGKILL" in told.lines[0]
        finally:
            await supervisor.stop()
        assert not any(is_alive(pid) for pid in after.values())

    asyncio.run(run())


def test_a_part_that_dies_again_and_again_is_started_ever_less_often(tmp_path: Path) -> None:
    async def run() -> None:
        told = Told()
        supervisor = supervise(tmp_path, told, part("redis", sys.executable, "-c", "import time; time.sleep(0.05)"))
        try:
            await supervisor.start()
            await until_async(lambda: told.restarts == 4)
        finally:
            await supervisor.stop()
        delays = [float(line.split(" in ")[1].removesuffix(" s")) for line in told.lines if "again in" in line]
        assert delays[:4] == [0.2, 0.4, 0.8, 1.6]

    asyncio.run(run())


def test_what_a_dead_part_left_behind_is_ended_before_it_is_started_again(tmp_path: Path) -> None:
    note = tmp_path / "child"

    async def run() -> None:
        told = Told()
        supervisor = supervise(tmp_path, told, part("worker", *WITH_CHILD, str(note)))
        try:
            await supervisor.start()
            await until_async(lambda: note.exists() and note.read_text() != "")
            orphan = int(note.read_text())
            os.kill(supervisor.pids()["worker"], signal.SIGKILL)
            await until_async(lambda: not is_alive(orphan))
            await until_async(lambda: note.read_text() not in ("", str(orphan)))
            child = int(note.read_text())
        finally:
            await supervisor.stop()
        await until_async(lambda: not is_alive(child))

    asyncio.run(run())


def test_a_part_that_cannot_start_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    async def run() -> None:
        broken = part("sftp", sys.executable, "-c", "print('the disk is on fire'); raise SystemExit(3)", is_ready=never)
        supervisor = supervise(tmp_path, Told(), part("redis", *SLEEP), broken)
        try:
            with pytest.raises(PartFailed) as failed:
                await supervisor.start()
        finally:
            await supervisor.stop()
        assert failed.value.name == "sftp"
        assert "exited with status 3" in str(failed.value)
        assert "the disk is on fire" in str(failed.value)

    asyncio.run(run())


def test_a_part_that_does_not_heed_sigterm_is_killed_when_its_time_is_up(tmp_path: Path) -> None:
    note = tmp_path / "armed"
    deaf = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open(sys.argv[1], 'w'); time.sleep(120)"

    async def run() -> None:
        told = Told()
        supervisor = supervise(tmp_path, told, part("worker", sys.executable, "-c", deaf, str(note), stop_seconds=0.3))
        await supervisor.start()
        await until_async(note.exists)
        pid = supervisor.pids()["worker"]
        await supervisor.stop()
        assert not is_alive(pid)
        assert any("worker did not stop" in line for line in told.lines)

    asyncio.run(run())


def test_the_parts_die_with_the_supervisor_however_it_dies(tmp_path: Path) -> None:
    program = f"""
import asyncio, os, sys
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from test_supervisor import SLEEP, Told, part, supervise

async def run():
    supervisor = supervise(Path({str(tmp_path)!r}), Told(), part("redis", *SLEEP), part("s3", *SLEEP))
    await supervisor.start()
    print(*supervisor.pids().values(), flush=True)
    await asyncio.sleep(120)

asyncio.run(run())
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_alive(pid) for pid in pids)
    finally:
        process.kill()
        process.communicate()
    until(lambda: not any(is_alive(pid) for pid in pids))


def test_a_taken_api_port_is_refused_naming_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StackRefused, match=f"port {port}.*--port"):
            Stack(tmp_path, api_port=port, tell=print)


def test_the_wanted_redis_port_is_used_when_free_and_another_when_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        other = Stack(tmp_path, redis_port=port, tell=print)
        assert other.site.ports["redis"] != port
    asyncio.run(other.stop())
    wanted = Stack(tmp_path, redis_port=port, tell=print)
    assert wanted.site.ports["redis"] == port
    asyncio.run(wanted.stop())


def test_a_second_stack_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    first = Stack(tmp_path, tell=print)
    with pytest.raises(StackRefused, match="already running"):
        Stack(tmp_path, tell=print)
    asyncio.run(first.stop())
    asyncio.run(Stack(tmp_path, tell=print).stop())


def test_secrets_are_random_for_each_folder_kept_and_private(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = load_credentials(tmp_path / "one"), load_credentials(tmp_path / "two")
    assert load_credentials(tmp_path / "one") == one
    values = [getattr(made, name) for made in (one, two) for name in one.__slots__]
    assert len(set(values)) == len(values) == 12
    assert (tmp_path / "one/secrets.json").stat().st_mode & 0o777 == 0o600
    assert not any(value in repr(one) for value in values)
