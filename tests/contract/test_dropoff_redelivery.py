"""A re-delivery sends what changed and links the rest, where the server can; what it links is known, and never written into."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fault_proxy import FaultProxy, fault_proxy
from fault_table import fault
from ncr_upload.adapters.sftp_dropoff import SftpDropoff
from ncr_upload.adapters.sftp_dropoff.links import Links
from ncr_upload.application.ports import LocalFile, Previous, Staged
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.packages import DeliveredFile
from packages_on_disk import arriving, write_package
from servers import SftpServer, start_asyncssh, start_sshd

pytestmark = pytest.mark.anyio
MEGABYTE = 1024 * 1024
CONTENTS = {f"S/materials/{number}.png": random.Random(number).randbytes(MEGABYTE) for number in range(8)}
CHANGED = CONTENTS | {"S/materials/3.png": os.urandom(MEGABYTE)}
SESSION_BYTES = 100_000


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SftpServer]:
    with start_asyncssh(tmp_path_factory.mktemp("plain"), extensions=False) as server:
        yield server


@pytest.fixture(scope="module")
def asyncssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SftpServer]:
    with start_asyncssh(tmp_path_factory.mktemp("asyncssh")) as server:
        yield server


@pytest.fixture(scope="module")
def openssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SftpServer]:
    with start_sshd(tmp_path_factory.mktemp("openssh")) as server:
        yield server


@dataclass
class Place:
    """A base folder of its own behind a counting proxy, and what the ledger would have written down of the last delivery."""

    dropoff: SftpDropoff
    proxy: FaultProxy
    folder: Path
    previous: Previous | None = None

    async def deliver(self, files: list[LocalFile], task: str) -> tuple[Staged, int]:
        """Also the bytes it sent."""
        before, told = self.proxy.count()["up"], list[int]()
        async with self.dropoff.session() as session:
            await session.adopt(task, 1)
            staged = await session.stage(task, 1, arriving(files), told.append, self.previous)
            await session.publish(task, 1, "job-1", lambda: None)
            await session.discard(task)
        assert sum(told) == sum(local.file.size for local in files)
        self.remember(files, staged)
        return staged, self.proxy.count()["up"] - before

    def remember(self, files: list[LocalFile], staged: Staged) -> None:
        known = [local.file for local in files if local.file.target in staged.mtimes]
        times = staged.mtimes
        self.previous = Previous(
            "job-1", [DeliveredFile(each.target, each.size, each.sha256, times[each.target]) for each in known]
        )

    def delivered(self) -> dict[str, bytes]:
        final = self.folder / "job-1"
        return {path.relative_to(final).as_posix(): path.read_bytes() for path in final.rglob("*") if path.is_file()}

    def file(self, number: int) -> Path:
        return self.folder / "job-1" / "S" / "materials" / f"{number}.png"


def place_on(server: SftpServer, name: str) -> Iterator[Place]:
    assert server.login.host is not None
    folder = server.folder / name
    folder.mkdir()
    with fault_proxy((server.login.host, server.login.port)) as proxy:
        dropoff = SftpDropoff(server.with_login(port=proxy.port), f"{server.base_dir.rstrip('/')}/{name}", timeout_seconds=20)
        yield Place(dropoff, proxy, folder)


@pytest.fixture(params=["asyncssh_server", "openssh"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    yield from place_on(request.getfixturevalue(request.param), tmp_path.name)


@pytest.fixture
def bare(plain: SftpServer, tmp_path: Path) -> Iterator[Place]:
    """A server without the extension."""
    yield from place_on(plain, tmp_path.name)


@pytest.fixture
def first(tmp_path: Path) -> list[LocalFile]:
    return write_package(tmp_path / "first", CONTENTS)


@pytest.fixture
def second(tmp_path: Path) -> list[LocalFile]:
    return write_package(tmp_path / "second", CHANGED)


async def test_a_redelivery_sends_only_what_changed(place: Place, first: list[LocalFile], second: list[LocalFile]) -> None:
    await place.deliver(first, "task-1")
    kept = place.file(0).stat().st_ino
    staged, sent = await place.deliver(second, "task-2")
    assert (staged.linked_files, staged.linked_bytes) == (7, 7 * MEGABYTE)
    assert MEGABYTE <= sent <= 1.1 * MEGABYTE
    assert place.delivered() == CHANGED
    assert place.file(0).stat().st_ino == kept
    staged, sent = await place.deliver(second, "task-3")
    assert staged.linked_files == 8, "what was linked is known as well as what was sent"
    assert sent <= SESSION_BYTES
    assert place.delivered() == CHANGED
    assert not list((place.folder / ".ncr-staging").iterdir())


async def test_a_file_that_moved_is_linked_to_its_new_place(place: Place, first: list[LocalFile], tmp_path: Path) -> None:
    await place.deliver(first, "task-1")
    moved = {f"S/other/{target}": content for target, content in CONTENTS.items()}
    staged, sent = await place.deliver(write_package(tmp_path / "moved", moved), "task-2")
    assert (staged.linked_files, sent <= SESSION_BYTES) == (8, True)
    assert place.delivered() == moved


@pytest.mark.parametrize("moment", ["at once", "later"])
async def test_a_file_that_the_partner_changed_in_place_is_sent_again(
    place: Place, first: list[LocalFile], second: list[LocalFile], moment: str
) -> None:
    """Same size, and as soon after the publish as can be: its time tells."""
    await place.deliver(first, "task-1")
    if moment == "later":
        os.utime(place.file(5), (time.time() + 60,) * 2)
    with place.file(5).open("r+b") as live:
        live.write(b"retouched")
    staged, _ = await place.deliver(second, "task-2")
    assert staged.linked_files == 6
    assert place.delivered() == CHANGED


async def test_a_file_that_the_partner_removed_or_cut_short_is_sent_again(place: Place, first: list[LocalFile]) -> None:
    await place.deliver(first, "task-1")
    seen = place.file(2).stat()
    os.truncate(place.file(2), 10)
    os.utime(place.file(2), (seen.st_atime, seen.st_mtime))
    place.file(4).unlink()
    staged, _ = await place.deliver(first, "task-2")
    assert staged.linked_files == 6
    assert place.delivered() == CONTENTS


async def test_what_is_not_written_down_is_sent_again(place: Place, first: list[LocalFile]) -> None:
    """Rows of a version that knew no times, or none at all."""
    await place.deliver(first, "task-1")
    place.previous = Previous("job-1", [])
    staged, sent = await place.deliver(first, "task-2")
    assert (staged.linked_files, sent > 8 * MEGABYTE) == (0, True)
    assert place.delivered() == CONTENTS


async def test_a_server_without_the_extension_gets_everything(
    bare: Place, first: list[LocalFile], second: list[LocalFile]
) -> None:
    staged, _ = await bare.deliver(first, "task-1")
    assert staged.mtimes == {}, "nothing is written down that cannot be used"
    bare.previous = Previous("job-1", [DeliveredFile(f.file.target, f.file.size, f.file.sha256, 1) for f in first])
    staged, sent = await bare.deliver(second, "task-2")
    assert (staged.linked_files, sent > 8 * MEGABYTE) == (0, True)
    assert bare.delivered() == CHANGED


async def test_a_file_that_cannot_be_linked_is_sent(
    place: Place, first: list[LocalFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.deliver(first, "task-1")
    link = Links.link

    async def refuse_some(self: Links, source: str, to: str) -> bool:
        return (
            False if to.endswith(("1.png", "2.png")) else await link(self, source + "-gone" if "7" in to[-6:] else source, to)
        )

    monkeypatch.setattr(Links, "link", refuse_some)
    staged, _ = await place.deliver(first, "task-2")
    assert staged.linked_files == 5
    assert place.delivered() == CONTENTS


@fault(
    "SFTP: the partner changes a delivered file while a re-delivery is staged",
    injector="a write on the server",
    invariants="OP",
    outcome="found out before the publish, and sent anew by the next attempt",
)
async def test_a_file_that_changes_after_it_was_linked_is_found_out(
    place: Place, first: list[LocalFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.deliver(first, "task-1")
    link = Links.link

    async def then_change(self: Links, source: str, to: str) -> bool:
        linked = await link(self, source, to)
        if to.endswith("6.png"):
            with place.file(6).open("r+b") as live:
                live.write(b"retouched")
        return linked

    monkeypatch.setattr(Links, "link", then_change)
    async with place.dropoff.session() as session:
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
    place: Place, first: list[LocalFile], second: list[LocalFile]
) -> None:
    """Staged as links, then continued with other content, then discarded: the live files are the same files throughout."""
    await place.deliver(first, "task-1")
    before = {number: (place.file(number).stat().st_ino, place.file(number).stat().st_mtime_ns) for number in range(8)}
    async with place.dropoff.session() as session:
        for fence, files in ((1, first), (2, second), (3, first)):
            await session.adopt("task-2", fence)
            await session.stage("task-2", fence, arriving(files), lambda _: None, place.previous)
        await session.discard("task-2")
    after = {number: (place.file(number).stat().st_ino, place.file(number).stat().st_mtime_ns) for number in range(8)}
    assert after == before
    assert place.delivered() == CONTENTS


async def test_every_recorded_time_is_older_than_the_publish(place: Place, first: list[LocalFile]) -> None:
    """So that a write into a delivered file gives it another time, even within the same second."""
    async with place.dropoff.session() as session:
        await session.adopt("task", 1)
        staged = await session.stage("task", 1, arriving(first), lambda _: None)
        marker = place.folder / "marker"
        marker.touch()
        assert set(staged.mtimes) == set(CONTENTS)
        assert max(staged.mtimes.values()) < int(marker.stat().st_mtime)
