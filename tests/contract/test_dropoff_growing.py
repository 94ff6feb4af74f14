"""A large file is sent while it arrives on the worker's disk; what was sent is taken for it only once its hash says so."""

from __future__ import annotations

import asyncio
import inspect
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dropoff_place import Download, DropoffPlace, coming, place_on
from fault_table import fault
from ncr_upload.adapters.sftp_dropoff.remote import start
from ncr_upload.adapters.sftp_dropoff.upload import SPLIT_BYTES, WIDE_WINDOW_BYTES
from ncr_upload.application.arrivals import Arrival
from ncr_upload.application.ports import Staged
from ncr_upload.domain.errors import Unavailable
from packages_on_disk import arriving, write_package
from servers import SftpServer

pytestmark = pytest.mark.anyio
MEGABYTE = 1024 * 1024
HUGE = random.Random(7).randbytes(SPLIT_BYTES + 8 * MEGABYTE + 12345)
OTHER = HUGE[: 5 * MEGABYTE] + b"other" + HUGE[5 * MEGABYTE + 5 :]
HALF = 20 * MEGABYTE
SESSION_BYTES = 300_000
"""More than logging in several times, listing and renaming take on the wire."""


def download(tmp_path: Path, content: bytes = HUGE, size: int | None = None, name: str = "huge") -> Download:
    return Download(tmp_path / name, f"S/{name}.blend", content, size)


async def half_sent(place: DropoffPlace, huge: Download) -> None:
    """What is here of it is sent, but for what does not fill a write."""
    before = place.sent()
    huge.grow(HALF)
    await place.until_sent(before + HALF - MEGABYTE)
    await place.at_rest()


async def test_a_large_file_is_sent_while_it_arrives(place: DropoffPlace, tmp_path: Path) -> None:
    huge = download(tmp_path)
    delivering = asyncio.create_task(place.deliver(coming(huge)))
    await half_sent(place, huge)
    (part,) = place.parts()
    assert part.name.endswith(".early")
    assert HUGE.startswith(part.read_bytes())
    assert place.staged(1) == {}, "it has no name yet by which it could be taken for the file"
    huge.finish()
    staged, sent = await delivering
    assert staged == Staged(0, 0)
    assert len(HUGE) <= sent <= len(HUGE) + SESSION_BYTES
    assert place.delivered() == {"S/huge.blend": HUGE}


async def test_small_files_are_not_kept_waiting_by_a_large_one_that_does_not_come(place: DropoffPlace, tmp_path: Path) -> None:
    contents = {f"S/m/{number}.png": os.urandom(5000) for number in range(80)}
    huge, files = download(tmp_path), write_package(tmp_path / "files", contents)

    async def huge_first() -> AsyncIterator[Arrival]:
        yield huge.arrival
        async for arrival in arriving(files):
            yield arrival
        await huge.arrival.whole()

    delivering = asyncio.create_task(place.deliver(huge_first()))
    async with asyncio.timeout(20):
        while place.staged(1) != contents:  # noqa: ASYNC110 - the server's disk is watched
            await asyncio.sleep(0.02)
    await half_sent(place, huge)
    huge.finish()
    await delivering
    assert place.delivered() == contents | {"S/huge.blend": HUGE}


async def test_two_files_with_the_same_content_arrive_side_by_side(place: DropoffPlace, tmp_path: Path) -> None:
    one, two = download(tmp_path), download(tmp_path, name="two")
    delivering = asyncio.create_task(place.deliver(coming(one, two)))
    one.grow(HALF)
    two.grow(HALF // 2)
    one.finish()
    two.finish()
    await delivering
    assert place.delivered() == {"S/huge.blend": HUGE, "S/two.blend": HUGE}


# --- the bytes are others ---------------------------------------------------------------------------------------


@fault(
    "S3: bytes of a large file that are sent already come again as others",
    injector="a download that writes over its own bytes, or begins anew",
    invariants="OP",
    outcome="what was sent of them is thrown away, and sent anew",
)
@pytest.mark.parametrize("manner", ["written over", "begun anew", "shorter in the end", "longer in the end"])
async def test_what_was_sent_early_is_dropped_when_the_file_is_another(
    place: DropoffPlace, tmp_path: Path, manner: str
) -> None:
    huge = download(tmp_path)
    delivering = asyncio.create_task(place.deliver(coming(huge)))
    await half_sent(place, huge)
    content = {"shorter in the end": OTHER[: HALF + MEGABYTE], "longer in the end": OTHER + b"more"}.get(manner, OTHER)
    if manner == "begun anew":
        huge.begin()
        huge.content = content
        huge.grow(HALF + 2 * MEGABYTE)
    huge.finish(content)
    staged, sent = await delivering
    assert staged == Staged(0, 0)
    assert sent > HALF - MEGABYTE + len(content), "all of it was sent once more"
    assert place.delivered() == {"S/huge.blend": content}


async def test_a_download_that_begins_anew_with_the_same_bytes_is_not_sent_again(place: DropoffPlace, tmp_path: Path) -> None:
    huge = download(tmp_path)
    delivering = asyncio.create_task(place.deliver(coming(huge)))
    await half_sent(place, huge)
    huge.path.unlink()
    huge.begin()
    huge.finish()
    _, sent = await delivering
    assert sent <= len(HUGE) + SESSION_BYTES
    assert place.delivered() == {"S/huge.blend": HUGE}


async def test_damage_that_came_and_went_between_two_looks_is_found_out(place: DropoffPlace, tmp_path: Path) -> None:
    """The damaged bytes were sent, the verified hash is that of the right ones."""
    huge = download(tmp_path)
    delivering = asyncio.create_task(place.deliver(coming(huge)))
    huge.content = OTHER
    await half_sent(place, huge)
    huge.finish(HUGE)
    _, sent = await delivering
    assert sent > HALF - MEGABYTE + len(HUGE)
    assert place.delivered() == {"S/huge.blend": HUGE}


# --- cut off ----------------------------------------------------------------------------------------------------


@fault(
    "SFTP: cut while a large file is sent that still arrives",
    injector="fault proxy",
    invariants="OP",
    outcome="what was sent is not taken for the file: the next attempt sends it anew, once its hash is known",
)
async def test_what_was_sent_before_the_hash_was_known_is_not_continued(place: DropoffPlace, tmp_path: Path) -> None:
    """The part may have been made of bytes that were never verified: here they were others."""
    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
        huge = download(tmp_path / "first", OTHER)
        staging = place.begin(session, coming(huge))
        await half_sent(place, huge)
        place.proxy.cut()
        huge.grow(HALF + 2 * MEGABYTE)
        with pytest.raises(Unavailable):
            await staging
    place.proxy.heal()
    await place.at_rest()
    (part,) = place.parts()
    assert part.stat().st_size > WIDE_WINDOW_BYTES
    before, huge = place.sent(), download(tmp_path / "second")
    delivering = asyncio.create_task(place.deliver(coming(huge), fence=2))
    huge.grow(HALF)
    async with asyncio.timeout(20):
        while place.parts():  # noqa: ASYNC110 - the server's disk is watched
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.5)
    assert place.sent() - before <= SESSION_BYTES, "nothing is sent before the hash is known"
    huge.finish()
    staged, sent = await delivering
    assert staged == Staged(0, 0)
    assert len(HUGE) <= sent <= len(HUGE) + SESSION_BYTES
    assert place.delivered() == {"S/huge.blend": HUGE}


@fault(
    "SFTP: cut while a large file is sent that has just arrived",
    injector="fault proxy",
    invariants="OP",
    outcome="the next attempt, from any host, sends the rest of the file only",
)
@pytest.mark.parametrize("host", ["same", "another"])
async def test_once_the_hash_is_known_the_rest_only_is_sent_after_a_cut(place: DropoffPlace, tmp_path: Path, host: str) -> None:
    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
        huge = download(tmp_path / "same")
        staging = place.begin(session, coming(huge))
        await half_sent(place, huge)
        place.proxy.throttle(all_bytes_per_second=2 * MEGABYTE)
        local = huge.finish()
        name = f"{local.file.sha256}.wide"
        async with asyncio.timeout(20):
            while [part.name for part in place.parts()] != [name]:  # noqa: ASYNC110 - the server's disk is watched
                await asyncio.sleep(0.02)
        place.proxy.cut()
        with pytest.raises(Unavailable):
            await staging
    place.proxy.heal()
    await place.at_rest()
    (part,) = place.parts()
    assert part.name == name
    arrived = part.stat().st_size
    assert HALF - MEGABYTE < arrived < len(HUGE)
    staged, sent = await place.deliver(write_package(tmp_path / host, {"S/huge.blend": HUGE}), fence=2)
    assert staged == Staged(0, arrived - WIDE_WINDOW_BYTES)
    assert sent <= len(HUGE) - staged.kept_bytes + SESSION_BYTES
    assert place.delivered() == {"S/huge.blend": HUGE}


async def test_a_download_that_fails_ends_the_stage_and_leaves_nothing_once_discarded(
    place: DropoffPlace, tmp_path: Path
) -> None:
    huge, failed = download(tmp_path), asyncio.Event()

    async def failing() -> AsyncIterator[Arrival]:
        yield huge.arrival
        await failed.wait()
        raise Unavailable("object_damaged", "it was replaced while it was read", "It is fetched again.")

    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
        staging = place.begin(session, failing())
        await half_sent(place, huge)
        failed.set()
        with pytest.raises(Unavailable, match="replaced while"):
            await staging
        assert place.staged(1) == {}
        await session.discard("task")
    assert list((place.folder / ".ncr-staging").iterdir()) == []


# --- what need not be sent --------------------------------------------------------------------------------------


async def test_what_an_earlier_attempt_staged_whole_is_not_sent_while_it_arrives_again(
    place: DropoffPlace, tmp_path: Path
) -> None:
    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
        await session.stage("task", 1, arriving(write_package(tmp_path / "files", {"S/huge.blend": HUGE})), lambda _: None)
    huge = download(tmp_path)
    delivering = asyncio.create_task(place.deliver(coming(huge), fence=2))
    huge.grow(HALF)
    await asyncio.sleep(0.5)
    huge.finish()
    staged, sent = await delivering
    assert (staged.kept_files, sent <= SESSION_BYTES) == (1, True)


async def test_what_was_delivered_before_is_linked_and_not_sent_while_it_arrives(openssh: SftpServer, tmp_path: Path) -> None:
    with place_on(openssh, tmp_path.name) as place:
        await place.deliver(write_package(tmp_path / "files", {"S/huge.blend": HUGE}), task="task-1")
        huge = download(tmp_path)
        delivering = asyncio.create_task(place.deliver(coming(huge), task="task-2"))
        huge.grow(HALF)
        await asyncio.sleep(0.5)
        huge.finish()
        staged, sent = await delivering
    assert (staged.linked_files, sent <= SESSION_BYTES) == (1, True)


# --- servers that take less -------------------------------------------------------------------------------------


@pytest.mark.parametrize("manner", ["in-order", "no-continue"])
async def test_a_server_that_takes_a_file_through_one_connection_only_gets_it_so(
    plain: SftpServer, tmp_path: Path, manner: str
) -> None:
    with place_on(plain, tmp_path.name) as place:
        place.proxy.delay(30)
        huge = download(tmp_path)
        plain.fault(manner)
        delivering = asyncio.create_task(place.deliver(coming(huge)))
        huge.grow(HALF)
        await asyncio.sleep(0.5)
        huge.finish()
        await delivering
        assert place.delivered() == {"S/huge.blend": HUGE}


# --- when all is given up ---------------------------------------------------------------------------------------


async def test_work_for_a_group_that_is_being_stopped_is_closed() -> None:
    """A file may become whole, or find room, in the moment in which another one has failed."""

    async def fail() -> None:
        raise Unavailable("sftp_unreachable", "gone", "")

    async def work() -> None:
        raise AssertionError("nobody wants it any more")

    async def start_while_stopping() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            try:
                await asyncio.sleep(10)
            finally:
                with pytest.raises(RuntimeError):
                    start(group, late)

    late = work()
    with pytest.raises(ExceptionGroup):
        await start_while_stopping()
    assert inspect.getcoroutinestate(late) == inspect.CORO_CLOSED
