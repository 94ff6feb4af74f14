"""A re-delivery sends what changed and links the rest, where the server can; what it links is known, and never written into."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dropoff_place import DropoffPlace, place_on
from fault_table import fault
from ncr_upload.adapters.sftp_dropoff.links import Links
from ncr_upload.adapters.sftp_dropoff.scratch import Ability
from ncr_upload.application.ports import LocalFile, Previous
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.packages import DeliveredFile
from packages_on_disk import arriving, write_package
from servers import SftpServer, start_rclone

pytestmark = pytest.mark.anyio
MEGABYTE = 1024 * 1024
CONTENTS = {f"S/materials/{number}.png": random.Random(number).randbytes(MEGABYTE) for number in range(8)}
CHANGED = CONTENTS | {"S/materials/3.png": os.urandom(MEGABYTE)}
SESSION_BYTES = 100_000


@pytest.fixture(params=["asyncssh_server", "openssh"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DropoffPlace]:
    with place_on(request.getfixturevalue(request.param), tmp_path.name) as place:
        yield place


@pytest.fixture
def bare(plain: SftpServer, tmp_path: Path) -> Iterator[DropoffPlace]:
    """On a server without the extension."""
    with place_on(plain, tmp_path.name) as place:
        yield place


def model(place: DropoffPlace, number: int) -> Path:
    """A delivered file."""
    return place.folder / "job-1" / "S" / "materials" / f"{number}.png"


@pytest.fixture
def first(tmp_path: Path) -> list[LocalFile]:
    return write_package(tmp_path / "first", CONTENTS)


@pytest.fixture
def second(tmp_path: Path) -> list[LocalFile]:
    return write_package(tmp_path / "second", CHANGED)


async def test_a_redelivery_sends_only_what_changed(
    place: DropoffPlace, first: list[LocalFile], second: list[LocalFile]
) -> None:
    await place.deliver(first, task="task-1")
    kept = model(place, 0).stat().st_ino
    staged, sent = await place.deliver(second, task="task-2")
    assert (staged.linked_files, staged.linked_bytes) == (7, 7 * MEGABYTE)
    assert MEGABYTE <= sent <= 1.1 * MEGABYTE
    assert place.delivered() == CHANGED
    assert model(place, 0).stat().st_ino == kept
    staged, sent = await place.deliver(second, task="task-3")
    assert staged.linked_files == 8, "what was linked is known as well as what was sent"
    assert sent <= SESSION_BYTES
    assert place.delivered() == CHANGED
    assert not list((place.folder / ".ncr-staging").iterdir())


async def test_a_file_that_moved_is_linked_to_its_new_place(
    place: DropoffPlace, first: list[LocalFile], tmp_path: Path
) -> None:
    await place.deliver(first, task="task-1")
    moved = {f"S/other/{target}": content for target, content in CONTENTS.items()}
    staged, sent = await place.deliver(write_package(tmp_path / "moved", moved), task="task-2")
    assert (staged.linked_files, sent <= SESSION_BYTES) == (8, True)
    assert place.delivered() == moved


@pytest.mark.parametrize("moment", ["at once", "later"])
async def test_a_file_that_the_partner_changed_in_place_is_sent_again(
    place: DropoffPlace, first: list[LocalFile], second: list[LocalFile], moment: str
) -> None:
    """Same size, and as soon after the publish as can be: its time tells."""
    await place.deliver(first, task="task-1")
    if moment == "later":
        os.utime(model(place, 5), (time.time() + 60,) * 2)
    with model(place, 5).open("r+b") as live:
        live.write(b"retouched")
    staged, _ = await place.deliver(second, task="task-2")
    assert staged.linked_files == 6
    assert place.delivered() == CHANGED


async def test_a_file_that_the_partner_removed_or_cut_short_is_sent_again(place: DropoffPlace, first: list[LocalFile]) -> None:
    await place.deliver(first, task="task-1")
    seen = model(place, 2).stat()
    os.truncate(model(place, 2), 10)
    os.utime(model(place, 2), (seen.st_atime, seen.st_mtime))
    model(place, 4).unlink()
    staged, _ = await place.deliver(first, task="task-2")
    assert staged.linked_files == 6
    assert place.delivered() == CONTENTS


async def test_what_is_not_written_down_is_sent_again(place: DropoffPlace, first: list[LocalFile]) -> None:
    """Rows of a version that knew no times, or none at all."""
    await place.deliver(first, task="task-1")
    place.previous = Previous("job-1", [])
    staged, sent = await place.deliver(first, task="task-2")
    assert (staged.linked_files, sent > 8 * MEGABYTE) == (0, True)
    assert place.delivered() == CONTENTS


async def test_a_server_without_the_extension_gets_everything(
    bare: DropoffPlace, first: list[LocalFile], second: list[LocalFile]
) -> None:
    staged, _ = await bare.deliver(first, task="task-1")
    assert staged.mtimes == {}, "nothing is written down that cannot be used"
    bare.previous = Previous("job-1", [DeliveredFile(f.file.target, f.file.size, f.file.sha256, 1) for f in first])
    staged, sent = await bare.deliver(second, task="task-2")
    assert (staged.linked_files, sent > 8 * MEGABYTE) == (0, True)
    assert bare.delivered() == CHANGED


async def test_a_file_that_cannot_be_linked_is_sent(
    place: DropoffPlace, first: list[LocalFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.deliver(first, task="task-1")
    link = Links.link

    async def refuse_some(self: Links, source: str, to: str) -> bool:
        return (
            False if to.endswith(("1.png", "2.png")) else await link(self, source + "-gone" if "7" in to[-6:] else source, to)
        )

    monkeypatch.setattr(Links, "link", refuse_some)
    staged, _ = await place.deliver(first, task="task-2")
    assert staged.linked_files == 5
    assert place.delivered() == CONTENTS


@fault(
    "SFTP: the partner changes a delivered file while a re-delivery is staged",
    injector="a write on the server",
    invariants="OP",
    outcome="found out before the publish, and sent anew by the next attempt",
)
async def test_a_file_that_changes_after_it_was_linked_is_found_out(
    place: DropoffPlace, first: list[LocalFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.deliver(first, task="task-1")
    link = Links.link

    async def then_change(self: Links, source: str, to: str) -> bool:
        linked = await link(self, source, to)
        if to.endswith("6.png"):
            with model(place, 6).open("r+b") as live:
                live.write(b"retouched")
        return linked

    monkeypatch.setattr(Links, "link", then_change)
    async with place.dropoff().session() as session:
        await session.adopt("task-2", 1)
        with pytest.raises(Unavailable, match=r"6\.png was changed"):
            await session.stage("task-2", 1, arriving(first), lambda _: None, place.previous)
        monkeypatch.undo()
        await session.adopt("task-2", 2)
        staged = await session.stage("task-2", 2, arriving(first), lambda _: None, place.previous)
        assert (staged.kept_files, staged.linked_files) == (7, 0)
        await session.publish("task-2", 2, "job-1", lambda: None)
    assert place.delivered() == CONTENTS


async def test_a_link_that_is_given_up_leaves_the_delivery_as_it_is(
    place: DropoffPlace, first: list[LocalFile], second: list[LocalFile]
) -> None:
    """Staged as links, then continued with other content, then discarded: the live files are the same files throughout."""
    await place.deliver(first, task="task-1")
    before = {number: (model(place, number).stat().st_ino, model(place, number).stat().st_mtime_ns) for number in range(8)}
    async with place.dropoff().session() as session:
        for fence, files in ((1, first), (2, second), (3, first)):
            await session.adopt("task-2", fence)
            await session.stage("task-2", fence, arriving(files), lambda _: None, place.previous)
        await session.discard("task-2")
    after = {number: (model(place, number).stat().st_ino, model(place, number).stat().st_mtime_ns) for number in range(8)}
    assert after == before
    assert place.delivered() == CONTENTS


async def test_every_recorded_time_is_older_than_the_publish(place: DropoffPlace, first: list[LocalFile]) -> None:
    """So that a write into a delivered file gives it another time, even within the same second."""
    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
        staged = await session.stage("task", 1, arriving(first), lambda _: None)
        marker = place.folder / "marker"
        marker.touch()
        assert set(staged.mtimes) == set(CONTENTS)
        assert max(staged.mtimes.values()) < int(marker.stat().st_mtime)


# --- servers whose links are not what they say


@pytest.mark.parametrize("kind", ["no-links", "empty-links"])
@fault(
    "SFTP: hard links are answered OK and not made",
    injector="sftp_program",
    invariants="LOPR",
    outcome="one link is tried in a session, and everything is sent",
)
async def test_a_server_whose_links_are_not_there_gets_no_more_of_them(
    asyncssh_server: SftpServer, tmp_path: Path, first: list[LocalFile], kind: str
) -> None:
    assert asyncssh_server.control is not None
    tried = asyncssh_server.control.with_name("links")
    with place_on(asyncssh_server, tmp_path.name) as place:
        await place.deliver(first, task="task-1")
        asyncssh_server.fault(kind)
        tried.unlink(missing_ok=True)
        staged, _ = await place.deliver(first, task="task-2")
        assert staged.linked_files == 0
        assert place.delivered() == CONTENTS
        assert tried.read_text().splitlines() == ["link"]


async def test_a_server_that_makes_copies_instead_of_links_sends_nothing_again(
    asyncssh_server: SftpServer, tmp_path: Path, first: list[LocalFile]
) -> None:
    with place_on(asyncssh_server, tmp_path.name) as place:
        await place.deliver(first, task="task-1")
        for number in range(8):
            seen = model(place, number).stat()
            os.utime(model(place, number), (seen.st_atime, seen.st_mtime - 100))
        assert place.previous is not None
        place.previous = Previous(
            "job-1", [replace(file, mtime=int(model(place, 0).stat().st_mtime)) for file in place.previous.files]
        )
        for number in range(8):
            os.utime(model(place, number), (place.previous.files[0].mtime,) * 2)
        asyncssh_server.fault("copy-links")
        staged, sent = await place.deliver(first, task="task-2")
        assert (staged.linked_files, sent <= SESSION_BYTES) == (8, True)
        assert place.delivered() == CONTENTS


@fault(
    "SFTP: rclone 1.60, which answers that it has linked",
    injector="Debian's rclone",
    invariants="LOPR",
    outcome="noticed at the first link; everything is sent",
)
async def test_debians_rclone_is_delivered_to_again(tmp_path: Path, first: list[LocalFile], second: list[LocalFile]) -> None:
    with start_rclone(tmp_path / "rclone") as server, place_on(server, "place") as place:
        await place.deliver(first, task="task-1")
        staged, _ = await place.deliver(second, task="task-2")
        assert staged.linked_files in (0, 7), "as its version has it"
        assert place.delivered() == CHANGED
        report = await place.dropoff().examine()
        assert (staged.linked_files == 0) == (Ability.LINK in report.failures)
