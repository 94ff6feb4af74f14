"""What the login may do is tried in one scratch folder: it tells a destination's refusal from a job's, and nothing grows."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fault_table import fault
from ncr_upload.adapters.sftp_dropoff import SftpDropoff
from ncr_upload.adapters.sftp_dropoff.scratch import Ability
from ncr_upload.application.ports import LocalFile
from ncr_upload.domain.errors import DeliveryError, DestinationParked, NotPublished, Unavailable
from packages_on_disk import arriving, write_package
from parts import miss
from servers import SftpServer, start_sshd

pytestmark = pytest.mark.anyio
CONTENTS = {"S/S.glb": b"g" * 300_000, "S/S.png": b"p" * 10}
PARTNER_UID = 12345


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SftpServer]:
    """OpenSSH that refuses what it is told to."""
    with start_sshd(tmp_path_factory.mktemp("refusing"), refusing=True) as server:
        yield server


@pytest.fixture
def server(shared: SftpServer, tmp_path: Path) -> Iterator[SftpServer]:
    folder = shared.folder / tmp_path.name
    folder.mkdir()
    yield SftpServer(shared.login, str(folder), folder, shared.control)
    shared.fault("")


@pytest.fixture
def shared_drop_folder() -> Iterator[SftpServer]:
    """A sticky drop folder, as of several logins: whoever made a job's folder may rename it, and nobody else."""
    if os.geteuid() != 0:
        miss("only root can make a folder that belongs to somebody else")
    folder = Path(tempfile.mkdtemp(prefix="ncr-sticky-"))
    folder.chmod(0o755)
    with start_sshd(folder, user="nobody") as server:
        server.folder.chmod(0o1777)
        yield server
    shutil.rmtree(folder)


@pytest.fixture
def files(tmp_path: Path) -> list[LocalFile]:
    return write_package(tmp_path / "files", CONTENTS)


def open_dropoff(server: SftpServer) -> SftpDropoff:
    return SftpDropoff(server.login, server.base_dir, channels=2, timeout_seconds=10)


async def deliver(server: SftpServer, files: list[LocalFile], task: str = "task", fence: int = 1) -> None:
    async with open_dropoff(server).session() as session:
        await session.adopt(task, fence)
        await session.stage(task, fence, arriving(files), lambda _: None)
        try:
            await session.publish(task, fence, "job-1", lambda: None)
        except NotPublished as failure:
            raise failure.cause from None


async def probe(server: SftpServer, parked_for: str = "") -> str | None:
    """The code of what a probe fails with."""
    async with open_dropoff(server).session() as session:
        try:
            await session.probe(parked_for)
        except DeliveryError as failure:
            return failure.code
    return None


def content(folder: Path) -> dict[str, int | None]:
    """Everything below the folder, with the size of files."""
    return {
        str(path.relative_to(folder)): path.stat().st_size if path.is_file() else None
        for path in folder.rglob("*")
        if "task" not in str(path.relative_to(folder))
    }


# --- what a login is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refused", "ability", "code"),
    [
        ("rename,posix-rename", Ability.RENAME, "rename_refused"),
        ("mkdir", Ability.MAKE, "permission_denied"),
        ("opendir,readdir", Ability.LIST, "permission_denied"),
        ("write", Ability.WRITE, "permission_denied"),
    ],
)
@fault(
    "SFTP: the login is refused what every delivery needs",
    injector="sftp-server -P",
    invariants="LPRH",
    outcome="parked with a code of its own, until that works again; nothing more is left by each probe",
)
async def test_what_a_delivery_cannot_do_without_parks_the_destination_until_it_works(
    server: SftpServer, files: list[LocalFile], refused: str, ability: Ability, code: str
) -> None:
    server.fault(f"-P {refused}")
    with pytest.raises(DestinationParked) as caught:
        await deliver(server, files)
    assert caught.value.code == code
    assert "Ask the partner" in caught.value.next_step
    left = content(server.folder)
    for _ in range(3):
        assert await probe(server, code) == code
        assert content(server.folder) == left
    report = await open_dropoff(server).examine()
    assert list(report.failures) == [ability]
    server.fault("")
    assert await probe(server, code) is None
    await deliver(server, files, fence=2)


@pytest.mark.parametrize(
    ("refused", "ability"),
    [
        ("read", Ability.READ),
        ("hardlink", Ability.LINK),
        ("setstat,fsetstat", Ability.SET_TIME),
        ("statvfs", Ability.FREE_SPACE),
        ("remove,rmdir", Ability.DELETE),
        ("rmdir", Ability.DELETE),
    ],
)
@fault(
    "SFTP: the login is refused what a delivery can do without",
    injector="sftp-server -P",
    invariants="LOP",
    outcome="delivered; `ncr doctor` says what it costs",
)
async def test_what_a_delivery_can_do_without_is_a_doubt_and_no_reason_to_refuse(
    server: SftpServer, files: list[LocalFile], refused: str, ability: Ability
) -> None:
    server.fault(f"-P {refused}")
    await deliver(server, files, task="task-1")
    await deliver(server, files, task="task-2")
    assert await probe(server) is None
    report = await open_dropoff(server).examine()
    assert list(report.failures) == [ability]


async def test_a_login_that_may_do_all_is_found_so_and_nothing_is_left(server: SftpServer) -> None:
    report = await open_dropoff(server).examine()
    assert (set(report.works()), report.failures) == (set(Ability), {})
    assert content(server.folder) == {".ncr-staging": None}


# --- one folder, whoever probes ---------------------------------------------------------------------------------


@fault(
    "SFTP: a parked destination refuses to delete",
    injector="sftp-server -P",
    invariants="R",
    outcome="every probe uses the same folder and file again",
)
async def test_where_nothing_may_be_deleted_probes_use_one_folder_again(server: SftpServer) -> None:
    server.fault("-P remove,rmdir")
    assert await probe(server, "delete_refused") == "delete_refused"
    left = content(server.folder)
    assert len([size for size in left.values() if size]) <= 2
    for _ in range(4):
        await open_dropoff(server).examine()
        assert await probe(server, "delete_refused") == "delete_refused"
        async with open_dropoff(server).session() as session:
            await session.leftovers()
    assert {name for name in content(server.folder) if "clock" not in name} == set(left)
    assert sum(size or 0 for size in content(server.folder).values()) == sum(size or 0 for size in left.values())
    server.fault("")
    assert await probe(server, "delete_refused") is None
    async with open_dropoff(server).session() as session:
        for leftover in await session.leftovers():
            await session.clear(leftover)
    assert content(server.folder) == {".ncr-staging": None}


async def test_several_may_probe_at_once(server: SftpServer) -> None:
    reports = await asyncio.gather(*(open_dropoff(server).examine() for _ in range(5)))
    assert [report.failures for report in reports] == [{}] * 5
    assert await asyncio.gather(*(probe(server) for _ in range(5))) == [None] * 5
    await open_dropoff(server).examine()
    assert content(server.folder) == {".ncr-staging": None}


async def test_a_probe_that_was_cut_off_in_the_base_folder_is_taken_back(server: SftpServer) -> None:
    left = server.folder / ".ncr-staging.probe"
    left.mkdir()
    (left / "file").write_bytes(b"of a probe before")
    async with open_dropoff(server).session() as session:
        (found,) = await session.leftovers()
        assert (found.task_id, found.name) == (None, left.name)
    assert (await open_dropoff(server).examine()).failures == {}
    assert content(server.folder) == {".ncr-staging": None}


@pytest.mark.parametrize("ability", ["read", "remove,rmdir", "rename,posix-rename"])
async def test_a_destination_is_healed_only_when_what_failed_works_again(server: SftpServer, ability: str) -> None:
    code = {"read": "read_refused", "remove,rmdir": "delete_refused", "rename,posix-rename": "rename_refused"}[ability]
    server.fault(f"-P {ability}")
    assert await probe(server, code) == code
    server.fault("")
    assert await probe(server, code) is None


# --- whose refusal it is ----------------------------------------------------------------------------------------


@fault(
    "SFTP: a job's folder belongs to somebody else",
    injector="sshd, a sticky drop folder of two users",
    invariants="LOPH",
    outcome="that job waits, saying whose folder it is; no other does",
)
async def test_a_folder_of_somebody_else_concerns_its_own_job_alone(
    shared_drop_folder: SftpServer, files: list[LocalFile]
) -> None:
    foreign = shared_drop_folder.folder / "job-1"
    foreign.mkdir()
    os.chown(foreign, PARTNER_UID, PARTNER_UID)
    with pytest.raises(Unavailable) as caught:
        await deliver(shared_drop_folder, files)
    assert caught.value.code == "job_folder_denied"
    assert f"{shared_drop_folder.base_dir}/job-1" in caught.value.message
    assert f"uid {PARTNER_UID}" in caught.value.message
    assert "Ask the partner to give" in caught.value.next_step
    os.chown(foreign, 65534, 65534)
    await deliver(shared_drop_folder, files, fence=2)
    assert (foreign / "S" / "S.glb").read_bytes() == CONTENTS["S/S.glb"]


async def test_staging_of_somebody_else_concerns_its_own_job_alone(
    shared_drop_folder: SftpServer, files: list[LocalFile]
) -> None:
    staging = shared_drop_folder.folder / ".ncr-staging"
    (staging / "task-1").mkdir(parents=True)
    staging.chmod(0o1777)
    os.chown(staging / "task-1", PARTNER_UID, PARTNER_UID)
    with pytest.raises(Unavailable) as caught:
        await deliver(shared_drop_folder, files, fence=2)
    assert caught.value.code == "job_folder_denied"
    assert ".ncr-staging/task-1 " in caught.value.message
    await deliver(shared_drop_folder, files, task="other")


@pytest.mark.parametrize("harm", ["a folder nobody may enter", "a file of somebody else"])
async def test_what_the_partner_put_into_a_delivered_package_hinders_no_new_one(
    shared_drop_folder: SftpServer, files: list[LocalFile], harm: str
) -> None:
    await deliver(shared_drop_folder, files, task="first")
    if harm == "a folder nobody may enter":
        foreign = shared_drop_folder.folder / "job-1" / "S" / "closed"
        foreign.mkdir(mode=0)
    else:
        foreign = shared_drop_folder.folder / "job-1" / "S" / "foreign"
        foreign.write_bytes(b"theirs")
        foreign.chmod(0)
    os.chown(foreign, PARTNER_UID, PARTNER_UID)
    await deliver(shared_drop_folder, files, task="second")
    assert sorted(path.name for path in (shared_drop_folder.folder / "job-1" / "S").iterdir()) == ["S.glb", "S.png"]


async def test_a_file_where_a_jobs_folder_belongs_is_replaced(server: SftpServer, files: list[LocalFile]) -> None:
    (server.folder / "job-1").write_text("a file")
    await deliver(server, files)
    assert (server.folder / "job-1" / "S" / "S.png").read_bytes() == CONTENTS["S/S.png"]


@pytest.mark.parametrize("parked_for", ["", "permission_denied"])
async def test_a_base_folder_that_takes_no_publish_is_the_destinations(
    shared_drop_folder: SftpServer, files: list[LocalFile], parked_for: str
) -> None:
    """The staging folder is writable; a probe shows itself beside the deliveries only where that is what failed."""
    staging = shared_drop_folder.folder / ".ncr-staging"
    staging.mkdir()
    staging.chmod(0o777)
    shared_drop_folder.folder.chmod(0o755)
    with pytest.raises(DestinationParked) as caught:
        await deliver(shared_drop_folder, files)
    assert caught.value.code == "permission_denied"
    assert "into the base folder" in caught.value.next_step
    assert await probe(shared_drop_folder, parked_for) == (parked_for or None)
    shared_drop_folder.folder.chmod(0o1777)
    assert await probe(shared_drop_folder, parked_for) is None
