"""What real SFTP servers do wrong, and how it is told: pins, logins, full disks, cuts and silence."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import asyncssh
import pytest

from disks import small_disk
from fault_table import fault
from ncr_upload.adapters.sftp_dropoff import SftpDropoff, SftpLogin
from ncr_upload.application.arrivals import Arrival
from ncr_upload.application.ports import LocalFile
from ncr_upload.domain.errors import DeliveryError, DestinationParked, NotPublished, Unavailable
from packages_on_disk import arriving, write_package
from parts import require
from servers import SftpServer, free_port, start_asyncssh, start_sshd

pytestmark = pytest.mark.anyio
CONTENTS = {"S/S.glb": b"g" * 900_000, "S/S.png": b"p" * 10}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SftpServer]:
    with start_asyncssh(tmp_path_factory.mktemp("faulty"), extensions=False) as server:
        yield server


@pytest.fixture
def server(shared: SftpServer, tmp_path: Path) -> Iterator[SftpServer]:
    """The server that fails on request, with a base folder of the test's own; well again afterwards."""
    folder = shared.folder / tmp_path.name
    folder.mkdir()
    yield replace(shared, base_dir=f"/{tmp_path.name}", folder=folder)
    shared.fault("")


@pytest.fixture
def files(tmp_path: Path) -> list[LocalFile]:
    return write_package(tmp_path / "files", CONTENTS)


def ignore(_: int) -> None:
    """For tests that do not count bytes."""


def nothing() -> None:
    """For tests that do nothing between the two renames of a publish."""


def open_dropoff(server: SftpServer, timeout_seconds: float = 10, **login: object) -> SftpDropoff:
    return SftpDropoff(server.with_login(**login), server.base_dir, channels=2, timeout_seconds=timeout_seconds)


async def stage_and_publish(dropoff: SftpDropoff, files: list[LocalFile], fence: int = 1, task: str = "task") -> None:
    async with dropoff.session() as session:
        await session.adopt(task, fence)
        await session.stage(task, fence, arriving(files), ignore)
        await session.publish(task, fence, "job-1", nothing)


async def refusal(dropoff: SftpDropoff) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        async with dropoff.session():
            pass
    return caught.value


# --- the pinned host key ----------------------------------------------------------------------------------------


@fault("SFTP: no host key pinned", injector="no SFTP_HOST_KEY", invariants="LH", outcome="parked; nothing is sent")
async def test_without_a_pin_nothing_is_sent(server: SftpServer) -> None:
    error = await refusal(open_dropoff(server, host_key=None))
    assert (type(error), error.code) == (DestinationParked, "host_key_unpinned")
    assert "SFTP_HOST_KEY" in error.next_step


async def test_another_host_key_parks_the_destination_naming_its_fingerprint(server: SftpServer) -> None:
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    error = await refusal(open_dropoff(server, host_key=other))
    assert (type(error), error.code) == (DestinationParked, "host_key_mismatch")
    assert asyncssh.import_public_key(server.login.host_key or "").get_fingerprint() in error.message
    assert server.login.address in error.message
    assert "nothing was sent" in error.message


async def test_a_pin_of_another_type_is_a_mismatch_too(server: SftpServer) -> None:
    other = asyncssh.generate_private_key("ecdsa-sha2-nistp256").export_public_key().decode()
    error = await refusal(open_dropoff(server, host_key=other))
    assert (type(error), error.code) == (DestinationParked, "host_key_mismatch")
    assert asyncssh.import_public_key(server.login.host_key or "").get_fingerprint() in error.message


@fault("SFTP: impostor", injector="a server with another key", invariants="LH", outcome="parked; not even the login is tried")
async def test_no_password_is_sent_to_a_host_with_another_key(tmp_path: Path) -> None:
    """A server that would take any login, and writes down whether one was tried."""
    tried: list[str] = []

    class Curious(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            tried.append(username)
            return True

    key, other = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    async with asyncssh.listen("127.0.0.1", 0, server_factory=Curious, server_host_keys=[key]) as listener:
        pinned = other.export_public_key().decode()
        login = SftpLogin("127.0.0.1", listener.get_port(), "partner", "secret", host_key=pinned)
        error = await refusal(SftpDropoff(login))
    assert error.code == "host_key_mismatch"
    assert tried == []


async def test_any_of_several_pinned_keys_will_do(server: SftpServer) -> None:
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().strip()
    for separator in (",", "\n"):
        async with open_dropoff(server, host_key=f"{other}{separator}{server.login.host_key}").session():
            pass


@pytest.mark.parametrize("pattern", ["[127.0.0.1]:{port}", "127.0.0.1", "*"])
async def test_a_known_hosts_file_pins_as_well(server: SftpServer, tmp_path: Path, pattern: str) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(f"{pattern.format(port=server.login.port)} {server.login.host_key}\n")
    async with open_dropoff(server, host_key=None, known_hosts=known).session():
        pass


async def test_a_known_hosts_file_without_the_host_is_no_pin(server: SftpServer, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(f"elsewhere.example {server.login.host_key}\n")
    assert (await refusal(open_dropoff(server, host_key=None, known_hosts=known))).code == "host_key_unpinned"


async def test_a_pin_that_cannot_be_read_is_told(server: SftpServer, tmp_path: Path) -> None:
    for login in ({"host_key": "ssh-ed25519 nonsense"}, {"host_key": None, "known_hosts": tmp_path / "missing"}):
        assert (await refusal(open_dropoff(server, **login))).code == "host_key_unreadable"


# --- the login --------------------------------------------------------------------------------------------------


@fault("SFTP: wrong password", injector="wrong SFTP_PASSWORD", invariants="LH", outcome="parked, naming the login")
async def test_a_wrong_password_parks_the_destination_naming_the_login_not_the_password(server: SftpServer) -> None:
    error = await refusal(open_dropoff(server, password="not-the-password"))
    assert (type(error), error.code) == (DestinationParked, "login_refused")
    assert "partner" in error.message
    assert server.login.address in error.message
    assert "SFTP_PASSWORD" in error.next_step
    assert "not-the-password" not in str(error) + repr(server.with_login(password="not-the-password"))


@pytest.mark.parametrize(
    ("unset", "name"),
    [({"host": None}, "SFTP_HOST"), ({"username": ""}, "SFTP_USERNAME"), ({"password": None}, "SFTP_PASSWORD")],
)
async def test_an_unset_setting_is_named(server: SftpServer, unset: dict[str, object], name: str) -> None:
    error = await refusal(open_dropoff(server, **unset))
    assert (type(error), error.code) == (DestinationParked, "sftp_unset")
    assert name in error.message


async def test_a_key_with_a_passphrase_logs_in(openssh: SftpServer, tmp_path: Path) -> None:
    assert openssh.login.private_key is not None
    locked = tmp_path / "locked"
    key = asyncssh.read_private_key(str(openssh.login.private_key))
    locked.write_bytes(key.export_private_key("pkcs8-pem", passphrase="open sesame"))
    async with open_dropoff(openssh, private_key=locked, passphrase="open sesame").session():
        pass
    for passphrase in (None, "wrong"):
        error = await refusal(open_dropoff(openssh, private_key=locked, passphrase=passphrase))
        assert (type(error), error.code) == (DestinationParked, "login_key_unreadable")
        assert str(locked) in error.message


async def test_keys_of_the_account_are_not_used_unasked(
    openssh: SftpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert openssh.login.private_key is not None
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_ed25519").write_bytes(openssh.login.private_key.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    error = await refusal(open_dropoff(openssh, private_key=None, password="x"))
    assert error.code == "login_refused"


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    started = subprocess.run([require("ssh-agent"), "-s"], capture_output=True, text=True, check=True, timeout=10).stdout
    found = dict(re.findall(r"(SSH_\w+)=([^;]+);", started))
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    yield
    os.kill(int(found["SSH_AGENT_PID"]), signal.SIGTERM)


@pytest.mark.usefixtures("agent")
async def test_the_agents_key_logs_in_when_asked_to(openssh: SftpServer) -> None:
    assert openssh.login.private_key is not None
    key = asyncssh.read_private_key(str(openssh.login.private_key))
    assert (await refusal(open_dropoff(openssh, private_key=None, agent=True))).code == "agent_empty"
    async with asyncssh.connect_agent() as running:
        await running.add_keys([key])
    async with open_dropoff(openssh, private_key=None, agent=True).session():
        pass
    assert (await refusal(open_dropoff(openssh, private_key=None, password="x"))).code == "login_refused"


# --- the connection ---------------------------------------------------------------------------------------------


async def test_a_server_that_is_down_is_unavailable_and_named(server: SftpServer) -> None:
    port = free_port()
    error = await refusal(open_dropoff(server, port=port))
    assert (type(error), error.code) == (Unavailable, "sftp_unreachable")
    assert f"127.0.0.1:{port}" in error.message


@fault(
    "SFTP: silent from the start",
    injector="a socket that never answers",
    invariants="L",
    outcome="given up within the time-out",
)
async def test_a_server_that_never_speaks_is_given_up(server: SftpServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts for it
        error = await refusal(open_dropoff(server, timeout_seconds=1, port=silent.getsockname()[1]))
    assert (type(error), error.code) == (Unavailable, "sftp_unreachable")
    assert "in time" in error.message


@pytest.mark.parametrize("fault", ["hang", "hang-large"])
async def test_a_server_that_stops_answering_is_given_up(server: SftpServer, files: list[LocalFile], fault: str) -> None:
    server.fault(fault)
    with pytest.raises(Unavailable) as caught:
        await stage_and_publish(open_dropoff(server, timeout_seconds=2), files)
    assert caught.value.code == "sftp_unreachable"


async def test_a_cut_upload_leaves_no_file_that_looks_whole_and_is_resumed(server: SftpServer, files: list[LocalFile]) -> None:
    server.fault("cut-on-write")
    with pytest.raises(Unavailable):
        await stage_and_publish(open_dropoff(server), files)
    package = server.folder / ".ncr-staging" / "task-1" / "package"
    assert all(path.stat().st_size == len(CONTENTS[f"S/{path.name}"]) for path in package.rglob("*") if path.is_file())
    await stage_and_publish(open_dropoff(server), files, fence=2)
    assert {path.name: path.read_bytes() for path in (server.folder / "job-1" / "S").iterdir()} == {
        Path(target).name: content for target, content in CONTENTS.items()
    }


async def test_a_publish_whose_answer_is_lost_is_found_done(server: SftpServer, files: list[LocalFile]) -> None:
    server.fault("cut-after-publish")
    with pytest.raises(Unavailable):
        await stage_and_publish(open_dropoff(server), files)
    assert (server.folder / "job-1" / "S" / "S.glb").exists()
    async with open_dropoff(server).session() as session:
        await session.adopt("task", 2)
        assert await session.is_published("task", 2)


async def test_a_server_with_one_session_a_connection_will_do(tmp_path: Path, files: list[LocalFile]) -> None:
    with start_sshd(tmp_path / "sshd", max_sessions=1) as narrow:
        await stage_and_publish(open_dropoff(narrow), files)
        assert (narrow.folder / "job-1" / "S" / "S.glb").exists()


# --- what the server refuses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["no-space", "quota"])
async def test_a_full_destination_is_parked(server: SftpServer, files: list[LocalFile], fault: str) -> None:
    server.fault(fault)
    with pytest.raises(DestinationParked) as caught:
        await stage_and_publish(open_dropoff(server), files)
    assert caught.value.code == "disk_full"
    assert server.login.address in caught.value.message
    assert list((server.folder / ".ncr-staging").iterdir()) == [], "jobs that wait for room must not keep it from each other"


@fault("SFTP: failure without a reason", injector="SFTP server", invariants="LH", outcome="tried again, naming the file")
async def test_a_failure_without_a_reason_is_tried_again(server: SftpServer, files: list[LocalFile]) -> None:
    server.fault("vague")
    with pytest.raises(Unavailable) as caught:
        await stage_and_publish(open_dropoff(server), files)
    assert caught.value.code == "sftp_failure"
    assert "S/S.glb" in caught.value.message


@pytest.mark.parametrize(("harm", "found"), [("cut short", "3 bytes"), ("removed", "None bytes"), ("added to", "7 bytes")])
@fault(
    "SFTP: what was staged changes before the publish",
    injector="a staged file cut short, removed or added on the server",
    invariants="LOPH",
    outcome="noticed by the last look at every size, named, tried again",
)
async def test_a_server_that_does_not_keep_what_it_took_is_found_out_before_the_publish(
    server: SftpServer, files: list[LocalFile], harm: str, found: str
) -> None:
    small, large = sorted(files, key=lambda local: local.file.size)
    package = server.folder / ".ncr-staging" / "task-1" / "package"

    async def harmed_meanwhile() -> AsyncIterator[Arrival]:
        yield Arrival.of(small)
        staged = package / small.file.target
        async with asyncio.timeout(20):
            while not staged.exists():  # noqa: ASYNC110 - another process makes it
                await asyncio.sleep(0.01)
        match harm:
            case "cut short":
                os.truncate(staged, 3)
            case "removed":
                staged.unlink()
            case _:
                staged.with_name("foreign").write_bytes(b"foreign")
        yield Arrival.of(large)

    async with open_dropoff(server).session() as session:
        await session.adopt("task", 1)
        with pytest.raises(Unavailable) as caught:
            await session.stage("task", 1, harmed_meanwhile(), ignore)
    assert (caught.value.code, found in caught.value.message) == ("staged_differs", True), caught.value.message
    await stage_and_publish(open_dropoff(server), files, fence=2)
    assert (server.folder / "job-1" / small.file.target).read_bytes() == CONTENTS[small.file.target]
    assert {path.name for path in (server.folder / "job-1" / "S").iterdir()} == {"S.glb", "S.png"}


async def test_a_full_disk_behind_openssh_is_told_by_its_free_space(
    openssh: SftpServer, tmp_path: Path, files: list[LocalFile]
) -> None:
    """OpenSSH says only 'Failure' when the disk is full."""
    small = openssh.folder / "small"
    small.mkdir()
    with small_disk(small, "512k"):
        with pytest.raises(DestinationParked) as caught:
            await stage_and_publish(open_dropoff(replace(openssh, base_dir=str(small), folder=small)), files)
        assert caught.value.code == "disk_full"
        assert list((small / ".ncr-staging").iterdir()) == []


@fault(
    "SFTP: no room for a folder", injector="a tmpfs without a free inode", invariants="L", outcome="parked, no attempt spent"
)
async def test_a_disk_too_full_for_a_folder_is_told_by_its_free_room(openssh: SftpServer) -> None:
    small = openssh.folder / "no-inodes"
    small.mkdir()
    with small_disk(small, "8m", files=3):
        with pytest.raises(DestinationParked) as caught:
            async with open_dropoff(replace(openssh, base_dir=str(small), folder=small)).session() as session:
                await session.adopt("task", 1)
        assert caught.value.code == "disk_full"


async def test_a_base_folder_that_refuses_is_parked_naming_it(server: SftpServer, files: list[LocalFile]) -> None:
    server.fault("denied")
    with pytest.raises(DestinationParked) as caught:
        await stage_and_publish(open_dropoff(server), files)
    assert caught.value.code == "permission_denied"
    assert f"{server.base_dir}/.ncr-staging" in caught.value.message


async def test_a_publish_that_fails_puts_the_previous_delivery_back(server: SftpServer, files: list[LocalFile]) -> None:
    await stage_and_publish(open_dropoff(server), files)
    (server.folder / "job-1" / "marker").write_text("the previous one")
    server.fault("refuse-publish")
    with pytest.raises(NotPublished) as refused:
        await stage_and_publish(open_dropoff(server), files, task="second")
    assert refused.value.cause.code == "publish_refused"
    assert (server.folder / "job-1" / "marker").exists()
    server.fault("")
    await stage_and_publish(open_dropoff(server), files, fence=2, task="second")
    assert not (server.folder / "job-1" / "marker").exists()


@fault(
    "SFTP: links planted in staging",
    injector="symbolic links",
    invariants="OR",
    outcome="never followed; nothing else is removed",
)
async def test_nothing_outside_the_staging_folder_is_ever_removed(server: SftpServer, files: list[LocalFile]) -> None:
    for name in ("other-job", "task-1", ".hidden"):
        (server.folder / name).mkdir()
        (server.folder / name / "file").write_text("the partner's own")
    (server.folder / "file").write_text("the partner's own")
    link = server.folder / ".ncr-staging" / "task-1" / "package" / "link"
    async with open_dropoff(server).session() as session:
        await session.adopt("task", 1)
        link.symlink_to(server.folder / "other-job")
        await session.stage("task", 1, arriving(files), ignore)
        await session.publish("task", 1, "job-1", nothing)
        await session.adopt("task", 2)
        (server.folder / ".ncr-staging" / "task-2" / "link").symlink_to(server.folder / "other-job")
        await session.discard("task")
    assert {path.name for path in server.folder.iterdir()} == {
        "other-job",
        "task-1",
        ".hidden",
        "file",
        "job-1",
        ".ncr-staging",
    }
    for name in ("other-job", "task-1", ".hidden"):
        assert (server.folder / name / "file").exists()
    assert not (server.folder / "job-1" / "link").is_symlink()
