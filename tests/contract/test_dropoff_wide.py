"""Several connections and few round trips: a large file is sent through all of them, and goes on where it was cut off."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import asyncssh
import pytest

from dropoff_place import DropoffPlace, place_on
from fault_table import fault
from ncr_upload.adapters.sftp_dropoff.package import plan_connections
from ncr_upload.adapters.sftp_dropoff.upload import SPLIT_BYTES, WIDE_WINDOW_BYTES
from ncr_upload.application.ports import LocalFile, Staged
from ncr_upload.domain.errors import Unavailable
from packages_on_disk import arriving, write_package
from servers import SftpServer

pytestmark = pytest.mark.anyio
MEGABYTE = 1024 * 1024
HUGE = random.Random(6).randbytes(SPLIT_BYTES + 8 * MEGABYTE + 12345)
SESSION_BYTES = 300_000
"""More than logging in several times, listing and renaming take on the wire."""


@pytest.fixture
def place(place: DropoffPlace) -> DropoffPlace:
    """Far away."""
    place.proxy.delay(30)
    return place


def huge(folder: Path) -> list[LocalFile]:
    return write_package(folder, {"S/huge.blend": HUGE})


# --- several connections ----------------------------------------------------------------------------------------


async def test_a_large_file_goes_through_several_connections_and_arrives_as_it_was(place: DropoffPlace, tmp_path: Path) -> None:
    staged, _ = await place.deliver(huge(tmp_path / "files"))
    assert staged == Staged(0, 0)
    assert place.proxy.count()["accepted"] == 3
    assert place.delivered() == {"S/huge.blend": HUGE}


async def test_large_and_small_files_share_the_connections(place: DropoffPlace, tmp_path: Path) -> None:
    contents = {"S/huge.blend": HUGE, "S/copy.blend": HUGE} | {f"S/m/{number}.png": os.urandom(5000) for number in range(100)}
    await place.deliver(write_package(tmp_path / "files", contents))
    assert place.delivered() == contents


@pytest.mark.parametrize(("size", "accepted"), [(100, 1), (9 * MEGABYTE, 2)])
async def test_a_connection_is_opened_only_for_what_is_worth_it(
    place: DropoffPlace, tmp_path: Path, size: int, accepted: int
) -> None:
    await place.deliver(write_package(tmp_path / "files", {"S/a.bin": HUGE[:size], "S/b.bin": HUGE[:100]}))
    assert place.proxy.count()["accepted"] == accepted


async def test_a_server_that_is_near_is_met_through_one_connection(openssh: SftpServer, tmp_path: Path) -> None:
    with place_on(openssh, tmp_path.name) as place:
        await place.deliver(huge(tmp_path / "files"))
        assert place.proxy.count()["accepted"] == 1
    assert plan_connections(2**30, round_trip_seconds=0.001) == 1
    assert plan_connections(2**30, round_trip_seconds=0.04) > 16
    assert plan_connections(0, round_trip_seconds=0.04) == 1


@fault(
    "SFTP: a second connection is refused",
    injector="further logins fail",
    invariants="OP",
    outcome="the upload goes on with those that were not refused",
)
async def test_a_server_that_refuses_more_connections_is_used_with_one(
    place: DropoffPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ncr_upload.adapters.sftp_dropoff import channels

    connect, tried = channels.connect, []

    async def refuse_the_second(*arguments: object) -> asyncssh.SSHClientConnection:
        tried.append(arguments)
        if len(tried) > 1:
            raise Unavailable("sftp_unreachable", "refused", "")
        return await connect(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(channels, "connect", refuse_the_second)
    await place.deliver(huge(tmp_path / "files"))
    assert len(tried) == 3
    assert place.delivered() == {"S/huge.blend": HUGE}


@fault(
    "SFTP: files can be written by one connection only",
    injector="server that wants writes in order, or opens a file once",
    invariants="OP",
    outcome="a large file is sent again through one",
)
@pytest.mark.parametrize("manner", ["in-order", "no-continue"])
async def test_a_server_that_takes_a_file_through_one_connection_only_gets_it_so(
    plain: SftpServer, tmp_path: Path, manner: str
) -> None:
    with place_on(plain, tmp_path.name) as place:
        place.proxy.delay(30)
        plain.fault(manner)
        await place.deliver(huge(tmp_path / "files"))
    assert place.delivered() == {"S/huge.blend": HUGE}


# --- cut off ----------------------------------------------------------------------------------------------------


@fault(
    "SFTP: cut in the middle of a file that goes through several connections",
    injector="fault proxy",
    invariants="OP",
    outcome="the next attempt, from any host, sends the rest of the file only",
)
@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("host", ["same", "another"])
async def test_a_split_file_that_was_cut_off_goes_on_from_where_it_was(
    place: DropoffPlace, tmp_path: Path, host: str, connections: int
) -> None:
    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
        place.proxy.throttle(all_bytes_per_second=20 * MEGABYTE)
        staging = asyncio.create_task(session.stage("task", 1, arriving(huge(tmp_path / "same")), lambda _: None))
        await place.until_sent(22 * MEGABYTE)
        assert place.proxy.cut() == 3
        with pytest.raises(Unavailable):
            await staging
    place.proxy.heal()
    await place.at_rest()
    (part,) = place.parts()
    arrived, content = part.stat().st_size, part.read_bytes()
    assert arrived > WIDE_WINDOW_BYTES
    assert HUGE.startswith(content[: arrived - WIDE_WINDOW_BYTES])
    staged, sent = await place.deliver(huge(tmp_path / host), fence=2, connections=connections)
    assert staged == Staged(0, arrived - WIDE_WINDOW_BYTES)
    rest = len(HUGE) - staged.kept_bytes
    assert rest <= sent <= rest + SESSION_BYTES
    assert place.delivered() == {"S/huge.blend": HUGE}


async def test_a_hole_within_the_window_is_filled(place: DropoffPlace, tmp_path: Path) -> None:
    """What connections that died at different moments leave: bytes that never came, before others that did."""
    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
    arrived = 25 * MEGABYTE
    content = bytearray(HUGE[:arrived])
    content[arrived - WIDE_WINDOW_BYTES : arrived - MEGABYTE] = bytes(WIDE_WINDOW_BYTES - MEGABYTE)
    (local,) = huge(tmp_path / "files")
    (place.folder / ".ncr-staging" / "task-1" / "parts" / f"{local.file.sha256}.wide").write_bytes(content)
    staged, _ = await place.deliver([local], fence=2)
    assert staged.kept_bytes == arrived - WIDE_WINDOW_BYTES
    assert place.delivered() == {"S/huge.blend": HUGE}


# --- round trips ------------------------------------------------------------------------------------------------

ROUND_TRIP_SECONDS = 0.3


@pytest.fixture
def laps() -> Callable[[], float]:
    """Round trips since it was asked last."""
    last = time.monotonic()

    def lap() -> float:
        nonlocal last
        before, last = last, time.monotonic()
        return (last - before) / ROUND_TRIP_SECONDS

    return lap


async def test_many_small_files_take_few_round_trips(openssh: SftpServer, tmp_path: Path, laps: Callable[[], float]) -> None:
    """The round trips are so long that what a busy machine adds counts for little."""
    files = write_package(tmp_path / "files", {f"S/m{number % 5}/deep/{number}.png": os.urandom(2000) for number in range(300)})
    with place_on(openssh, tmp_path.name) as place:
        place.proxy.delay(ROUND_TRIP_SECONDS * 1000)
        laps()
        async with place.dropoff(channels=4).session() as session:
            assert laps() < 13
            await session.adopt("task", 1)
            assert laps() < 15
            await session.stage("task", 1, arriving(files), lambda _: None)
            assert laps() < 22, "8 files at a time, 4 round trips each, would be 150"
            await session.publish("task", 1, "job-1", lambda: None)
            assert laps() < 9, "3 for the record of what is published, 1 for the rename, 3 to list what came of it"
    assert len(place.delivered()) == 300
