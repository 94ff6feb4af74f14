"""An upload that was cut off goes on where it was: counted in bytes, on OpenSSH and on a server of bare SFTP version 3."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from dropoff_place import DropoffPlace, place_on
from fault_table import fault
from ncr_upload.adapters.sftp_dropoff.upload import MAX_BLOCK_BYTES, WIDE_WINDOW_BYTES, WINDOW_BYTES, Part, Upload
from ncr_upload.application.arrivals import Arrival
from ncr_upload.application.ports import LocalFile, Staged
from ncr_upload.domain.errors import Unavailable
from packages_on_disk import arriving, write_package
from servers import SftpServer

pytestmark = pytest.mark.anyio
MEGABYTE = 1024 * 1024
LARGE = os.urandom(12 * MEGABYTE)
SESSION_BYTES = 100_000
"""More than logging in, listing and renaming take on the wire."""


async def cut_off(place: DropoffPlace, fence: int, files: list[LocalFile], after_bytes: int) -> None:
    """An attempt whose connection is cut after so many bytes."""
    async with place.dropoff().session() as session:
        await session.adopt("task", fence)
        place.proxy.cut_after(after_bytes)
        with pytest.raises(Unavailable):
            await session.stage("task", fence, arriving(files), lambda _: None)
    place.proxy.heal()
    await place.at_rest()


@fault(
    "SFTP: cut in the middle of a file",
    injector="fault proxy",
    invariants="OP",
    outcome="the next attempt, from any host, sends the rest of the file only",
)
@pytest.mark.parametrize("host", ["same", "another"])
async def test_a_file_that_was_cut_off_goes_on_from_where_it_was(place: DropoffPlace, tmp_path: Path, host: str) -> None:
    contents = {"S/large.blend": LARGE}
    await cut_off(place, 1, write_package(tmp_path / "same", contents), 8 * MEGABYTE)
    (part,) = place.parts()
    arrived = part.stat().st_size
    assert arrived > 8 * MEGABYTE - WINDOW_BYTES
    assert LARGE.startswith(part.read_bytes()[: arrived - WINDOW_BYTES])
    staged, sent = await place.deliver(write_package(tmp_path / host, contents), fence=2)
    assert staged == Staged(0, arrived - WINDOW_BYTES)
    rest = len(LARGE) - arrived + WINDOW_BYTES
    assert rest <= sent <= rest + SESSION_BYTES
    assert place.delivered() == contents


async def test_a_file_that_is_cut_off_again_and_again_arrives_all_the_same(place: DropoffPlace, tmp_path: Path) -> None:
    files = write_package(tmp_path / "files", {"S/large.blend": LARGE})
    for fence in (1, 2, 3):
        await cut_off(place, fence, files, 4 * MEGABYTE)
    staged, _ = await place.deliver(files, fence=4)
    assert staged.kept_bytes > 4 * MEGABYTE
    assert place.delivered() == {"S/large.blend": LARGE}


@fault(
    "SFTP: cut in the middle of a package",
    injector="fault proxy",
    invariants="OP",
    outcome="files that were staged whole are not sent again",
)
async def test_files_that_were_staged_whole_are_not_sent_again(place: DropoffPlace, tmp_path: Path) -> None:
    contents = {f"S/{number}.png": os.urandom(MEGABYTE) for number in range(10)}
    files = write_package(tmp_path / "files", contents)
    await cut_off(place, 1, files, 6 * MEGABYTE)
    whole = len(list(place.folder.glob(".ncr-staging/task-1/package/S/*.png")))
    assert whole > 0
    staged, sent = await place.deliver(files, fence=2)
    assert staged == Staged(whole, whole * MEGABYTE)
    assert sent <= (len(contents) - whole) * MEGABYTE + SESSION_BYTES
    assert place.delivered() == contents


async def test_files_with_the_same_content_have_parts_of_their_own(place: DropoffPlace, tmp_path: Path) -> None:
    contents = {"S/a.bin": LARGE, "S/b.bin": LARGE}
    files = write_package(tmp_path / "files", contents)
    await cut_off(place, 1, files, 16 * MEGABYTE)
    assert len(place.parts()) == 2
    staged, _ = await place.deliver(files, fence=2)
    assert staged.kept_bytes > 8 * MEGABYTE
    assert place.delivered() == contents


@fault(
    "SFTP: a part at the destination is not what was sent",
    injector="bytes changed on the server",
    invariants="OP",
    outcome="that file is sent anew",
)
@pytest.mark.parametrize("damage", ["other bytes", "longer than the file", "shorter than the window"])
async def test_a_part_that_is_not_the_beginning_of_the_file_is_sent_anew(
    place: DropoffPlace, tmp_path: Path, damage: str
) -> None:
    files = write_package(tmp_path / "files", {"S/large.blend": LARGE})
    await cut_off(place, 1, files, 8 * MEGABYTE)
    (part,) = place.parts()
    content = {
        "other bytes": bytes(part.stat().st_size),
        "longer than the file": LARGE + b"x",
        "shorter than the window": LARGE[:WINDOW_BYTES],
    }
    part.write_bytes(content[damage])
    staged, _ = await place.deliver(files, fence=2)
    assert staged == Staged(0, 0)
    assert place.delivered() == {"S/large.blend": LARGE}


async def test_parts_of_files_that_no_longer_belong_go(place: DropoffPlace, tmp_path: Path) -> None:
    await cut_off(place, 1, write_package(tmp_path / "old", {"S/large.blend": LARGE}), 8 * MEGABYTE)
    files = write_package(tmp_path / "new", {"S/large.blend": LARGE[::-1]})
    async with place.dropoff().session() as session:
        await session.adopt("task", 2)
        staged = await session.stage("task", 2, arriving(files), lambda _: None)
    assert staged == Staged(0, 0)
    assert place.parts() == []


async def test_a_stale_worker_that_still_writes_into_the_part_does_no_harm(place: DropoffPlace, tmp_path: Path) -> None:
    """It has the file open, so that no rename takes it away; what it writes is what belongs there."""
    files = write_package(tmp_path / "files", {"S/large.blend": LARGE})
    await cut_off(place, 1, files, 8 * MEGABYTE)
    (part,) = place.parts()
    with part.open("r+b") as stale:
        offset = part.stat().st_size - MEGABYTE
        await place.deliver(files, fence=2)
        stale.seek(offset)
        stale.write(LARGE[offset : offset + MEGABYTE])
    assert place.delivered() == {"S/large.blend": LARGE}


async def test_a_server_that_will_not_continue_a_file_gets_it_anew(plain: SftpServer, tmp_path: Path) -> None:
    files = write_package(tmp_path / "files", {"S/large.blend": LARGE})
    with place_on(plain, tmp_path.name) as place:
        await cut_off(place, 1, files, 8 * MEGABYTE)
        plain.fault("no-continue")
        staged, _ = await place.deliver(files, fence=2)
    assert staged == Staged(0, 0)
    assert place.delivered() == {"S/large.blend": LARGE}


async def opened(*_: object) -> bytes:
    return b"handle"


async def closed(*_: object) -> None: ...


class SlowTrack:
    """Acknowledges writes in any order, and never the one it is told to withhold; several may stand for several connections."""

    acknowledged: ClassVar[set[int]] = set()

    def __init__(self, withheld: int | None, window_bytes: int) -> None:
        self.withheld = withheld
        self.window_bytes = window_bytes
        self.turn = asyncio.Lock()
        self.remote: Any = SimpleNamespace(open=opened, close=closed)
        self.size = 0

    def block_bytes(self, most: int) -> int:
        return most

    async def have_room(self, _: int) -> None:
        await asyncio.sleep(0)

    def write(self, _file: object, block: memoryview, offset: int) -> asyncio.Future[int]:
        lowest = min(set(range(0, offset + len(block), MAX_BLOCK_BYTES)) - self.acknowledged)
        assert offset + len(block) - lowest <= self.window_bytes, "beyond the window: a part of this size could have a hole"
        self.size = max(self.size, offset + len(block))
        answer = asyncio.get_running_loop().create_future()
        if offset != self.withheld:
            asyncio.get_running_loop().call_later(random.random() / 100, self.acknowledge, answer, offset)
        return answer

    def acknowledge(self, answer: asyncio.Future[int], offset: int) -> None:
        self.acknowledged.add(offset)
        answer.set_result(0)

    def heard(self, answer: asyncio.Future[int], _: int) -> None:
        answer.result()


@pytest.mark.parametrize("tracks", [1, 4])
@pytest.mark.parametrize("withheld", [None, 0, 5 * MAX_BLOCK_BYTES])
@pytest.mark.parametrize("window_bytes", [WINDOW_BYTES, WIDE_WINDOW_BYTES])
async def test_no_write_goes_out_further_than_the_window_beyond_what_was_acknowledged(
    tmp_path: Path, tracks: int, withheld: int | None, window_bytes: int
) -> None:
    SlowTrack.acknowledged.clear()
    (local,) = write_package(tmp_path / "files", {"S/large.blend": LARGE})
    told: list[int] = []
    upload = Upload(Part(Arrival.of(local), "parts/large", None, window_bytes), told.append)
    slow = [SlowTrack(withheld, window_bytes) for _ in range(tracks)]
    sending = asyncio.gather(*(upload.send(track) for track in slow))  # type: ignore[arg-type]
    if withheld is None:
        assert sum(await sending) == 1
        await upload.finish()
        assert sum(told) == len(LARGE) == MAX_BLOCK_BYTES * len(SlowTrack.acknowledged)
    else:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sending, 1)
        assert max(track.size for track in slow) == min(withheld + window_bytes, len(LARGE))
