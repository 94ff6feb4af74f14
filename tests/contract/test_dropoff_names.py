"""Names on a partner's server are bytes: foreign ones, in no encoding, are compared, moved and removed as they are."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from dropoff_place import DropoffPlace, place_on
from fault_table import fault
from ncr_upload.adapters.sftp_dropoff.package import check_relative
from ncr_upload.adapters.sftp_dropoff.remote import escaped
from ncr_upload.application.arrivals import Arrival
from ncr_upload.application.ports import LocalFile
from ncr_upload.domain.errors import DeliveryError, Rejected, Unavailable
from packages_on_disk import write_package
from servers import SftpServer

pytestmark = pytest.mark.anyio
CONTENTS = {"S/S.glb": b"g" * 300_000, "S/ü ß.png": b"p" * 10}
FOREIGN = [b"caf\xe9", b"\xff\xfe\x80", b"line\nbreak", b"\xed\xb3\xa9", b"caf\xe9-7", b"tab\tand\x1b[31m"]
"""Latin-1; no encoding at all; a line break; a surrogate written as UTF-8; what looks like a task's; an escape sequence."""


@pytest.fixture(params=["asyncssh_server", "openssh"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DropoffPlace]:
    with place_on(request.getfixturevalue(request.param), tmp_path.name) as place:
        yield place


@pytest.fixture
def files(tmp_path: Path) -> list[LocalFile]:
    return write_package(tmp_path / "files", CONTENTS)


def plant(folder: Path) -> None:
    """Files and folders with such names, and one of each below the other."""
    for name in FOREIGN:
        path = os.path.join(os.fsencode(folder), name)  # noqa: PTH118 - a name of bytes
        os.makedirs(path, exist_ok=True)  # noqa: PTH103
        with open(os.path.join(path, b"in\xe9"), "wb") as file:  # noqa: PTH118, PTH123
            file.write(b"foreign")
        with open(path + b".file", "wb") as file:  # noqa: PTH123
            file.write(b"foreign")


def names(folder: Path) -> set[bytes]:
    return set(os.listdir(os.fsencode(folder)))  # noqa: PTH208


@fault(
    "SFTP: foreign names beside ours",
    injector="files in Latin-1, with line breaks and escape sequences",
    invariants="LOP",
    outcome="left alone in the base and staging folders; delivered all the same",
)
async def test_foreign_names_in_the_base_and_staging_folders_are_left_alone(
    place: DropoffPlace, files: list[LocalFile]
) -> None:
    staging = place.folder / ".ncr-staging"
    staging.mkdir()
    plant(staging)
    plant(place.folder)
    planted = names(staging)
    await place.deliver(files, task="task-1")
    await place.deliver(files, task="task-2")
    async with place.dropoff().session() as session:
        assert await session.leftovers() == []
        await session.probe()
    assert names(staging) == planted
    assert {name for name in names(place.folder) if name not in (b"job-1", b".ncr-staging")} == planted


@fault(
    "SFTP: foreign names in a delivered package",
    injector="files in Latin-1, with line breaks and escape sequences",
    invariants="LOPR",
    outcome="replaced as a whole, and removed with the delivery they were put into",
)
async def test_a_delivery_with_foreign_names_in_it_is_replaced_and_removed(place: DropoffPlace, files: list[LocalFile]) -> None:
    await place.deliver(files, task="task-1")
    for folder in ("job-1", "job-1/S"):
        plant(place.folder / folder)
    staged, _ = await place.deliver(files, task="task-2")
    assert staged.linked_files == len(CONTENTS)
    assert place.delivered() == CONTENTS
    assert names(place.folder / ".ncr-staging") == set()


async def test_foreign_names_that_an_attempt_left_in_staging_are_removed(place: DropoffPlace, files: list[LocalFile]) -> None:
    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
    for folder in ("package", "parts"):
        plant(place.folder / ".ncr-staging" / "task-1" / folder)
    await place.deliver(files, fence=2)
    assert place.delivered() == CONTENTS
    assert names(place.folder / ".ncr-staging") == set()


async def test_a_foreign_name_is_told_escaped(place: DropoffPlace, files: list[LocalFile]) -> None:
    """A message must fit in UTF-8: it goes to SQL, Redis, JSON and the log."""

    async def planted_meanwhile() -> AsyncIterator[Arrival]:
        yield Arrival.of(files[0])
        package = place.folder / ".ncr-staging" / "task-1" / "package"
        async with asyncio.timeout(20):
            while not (package / files[0].file.target).exists():  # noqa: ASYNC110 - another process makes it
                await asyncio.sleep(0.01)
        Path(os.fsdecode(os.fsencode(package) + b"/a\xe9\n")).touch()  # noqa: ASYNC240 - at once
        yield Arrival.of(files[1])

    async with place.dropoff().session() as session:
        await session.adopt("task", 1)
        with pytest.raises(Unavailable) as caught:
            await session.stage("task", 1, planted_meanwhile(), lambda _: None)
    assert caught.value.code == "staged_differs"
    assert r"a\xe9\n" in caught.value.message
    assert caught.value.message.isprintable()


@fault(
    "SFTP: names that no file can have",
    injector="sftp_program lists '', 'a/b', '../..' and NUL",
    invariants="LOPR",
    outcome="left out",
)
async def test_names_that_no_path_can_lead_to_are_left_out(
    asyncssh_server: SftpServer, tmp_path: Path, files: list[LocalFile]
) -> None:
    with place_on(asyncssh_server, tmp_path.name) as place:
        outside = asyncssh_server.folder / "escaped"
        outside.write_text("not ours")
        asyncssh_server.fault("odd-names")
        await place.deliver(files, task="task-1")
        await place.deliver(files, task="task-2")
        assert place.delivered() == CONTENTS
        assert outside.exists()


async def test_our_own_names_are_utf8_or_refused(place: DropoffPlace) -> None:
    for target in ("S/caf\udce9", "S/\ud800"):
        with pytest.raises(Rejected):
            check_relative(target)
    assert escaped("S/ü ß.png") == "S/ü ß.png"
    assert escaped("caf\udce9\n\x1b\u202e") == r"caf\xe9\n\x1b\u202e"


async def test_a_failure_names_a_foreign_path_escaped(place: DropoffPlace) -> None:
    async with place.dropoff().session() as session:
        with pytest.raises(DeliveryError) as caught:
            await session._remote.size(f"{place.base}/caf\udce9")
    assert r"caf\xe9" in caught.value.message
    assert caught.value.message.isprintable()
