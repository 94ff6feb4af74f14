"""The embedded SFTP server: one folder and nothing else, with OpenSSH's semantics."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncssh
import pytest

from ncr_upload.entrypoints.embedded.host_key import load_public_key

USERNAME, PASSWORD = "partner", "a password with spaces"


@dataclass(frozen=True)
class Server:
    port: int
    root: Path
    host_key: Path
    process: subprocess.Popen[str]


def start_server(folder: Path, port: int = 0) -> Server:
    root, host_key = folder / "root", folder / "host_key"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "ncr_upload.entrypoints.embedded.sftp_server"),
            *("--port", str(port), "--root", str(root), "--host-key", str(host_key)),
        ],
        env=dict(os.environ) | {"SFTP_USERNAME": USERNAME, "SFTP_PASSWORD": PASSWORD},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    return Server(int(line.split(",")[0].rsplit(":", 1)[1]), root, host_key, process)


def stop_server(server: Server) -> int:
    server.process.send_signal(signal.SIGTERM)
    try:
        return server.process.wait(10)
    finally:
        server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = start_server(tmp_path_factory.mktemp("sftp"))
    yield started
    stop_server(started)


@asynccontextmanager
async def login(server: Server, password: str = PASSWORD) -> AsyncIterator[asyncssh.SSHClientConnection]:
    pinned = asyncssh.import_known_hosts(f"[127.0.0.1]:{server.port} {load_public_key(server.host_key)}")
    async with asyncio.timeout(15):
        async with asyncssh.connect(
            "127.0.0.1", server.port, username=USERNAME, password=password, known_hosts=pinned, client_keys=None, config=None
        ) as connection:
            yield connection


def with_sftp(server: Server, work: Callable[[asyncssh.SFTPClient], Awaitable[None]]) -> None:
    async def run() -> None:
        async with login(server) as connection, connection.start_sftp_client() as sftp:
            await work(sftp)

    asyncio.run(run())


def test_what_is_written_lands_in_the_root_folder(server: Server) -> None:
    async def work(sftp: asyncssh.SFTPClient) -> None:
        await sftp.makedirs("/landed/deep")
        async with sftp.open("/landed/deep/file.bin", "wb") as file:
            await file.write(b"content")
        assert await sftp.getsize("landed/deep/file.bin") == 7
        assert await sftp.realpath(".") == "/"

    with_sftp(server, work)
    assert (server.root / "landed/deep/file.bin").read_bytes() == b"content"


@pytest.mark.parametrize("path", ["/../secret", "../../secret", "/inside/../../secret", "//../secret"])
def test_dots_do_not_lead_out_of_the_root(server: Server, path: str) -> None:
    (server.root.parent / "secret").write_text("outside")
    (server.root / "inside").mkdir(exist_ok=True)

    async def work(sftp: asyncssh.SFTPClient) -> None:
        assert not await sftp.exists(path)
        async with sftp.open(path, "wb") as file:
            await file.write(b"overwritten")
        await sftp.remove(path)

    with_sftp(server, work)
    assert (server.root.parent / "secret").read_text() == "outside"


@pytest.mark.parametrize("path", ["/way_out/secret", "/way_out/../way_out/secret", "/to_secret"])
def test_a_symbolic_link_does_not_lead_out_of_the_root(server: Server, path: str) -> None:
    outside = server.root.parent
    (outside / "secret").write_text("outside")
    for name, target in (("way_out", outside), ("to_secret", outside / "secret")):
        (server.root / name).unlink(missing_ok=True)
        (server.root / name).symlink_to(target)

    async def work(sftp: asyncssh.SFTPClient) -> None:
        for mode in ("rb", "wb", "ab"):
            with pytest.raises(asyncssh.SFTPPermissionDenied):
                await sftp.open(path, mode)
        for refused in (sftp.stat(path), sftp.truncate(path, 0), sftp.chmod(path, 0o777), sftp.link(path, "/linked")):
            with pytest.raises(asyncssh.SFTPPermissionDenied):
                await refused
        with pytest.raises(asyncssh.SFTPPermissionDenied):
            await sftp.listdir("/way_out")

    with_sftp(server, work)
    assert (outside / "secret").read_text() == "outside"


def test_a_link_that_becomes_a_way_out_by_being_moved_stays_closed(server: Server) -> None:
    (server.root.parent / "secret").write_text("outside")

    async def work(sftp: asyncssh.SFTPClient) -> None:
        await sftp.makedirs("/a")
        await sftp.symlink("../secret", "/a/link")
        await sftp.rename("/a/link", "/moved_link")
        with pytest.raises(asyncssh.SFTPPermissionDenied):
            await sftp.open("/moved_link", "rb")
        await sftp.remove("/moved_link")

    with_sftp(server, work)
    assert (server.root.parent / "secret").read_text() == "outside"


def test_a_plain_rename_never_overwrites(server: Server) -> None:
    async def work(sftp: asyncssh.SFTPClient) -> None:
        await sftp.makedirs("/plain/old")
        await sftp.makedirs("/plain/new")
        for name in ("one", "two"):
            async with sftp.open(f"/plain/{name}", "w") as file:
                await file.write(name)
        for old, new in (("one", "two"), ("old", "new"), ("one", "new"), ("old", "one")):
            with pytest.raises(asyncssh.SFTPError):
                await sftp.rename(f"/plain/{old}", f"/plain/{new}")
        await sftp.rename("/plain/one", "/plain/three")
        await sftp.rename("/plain/old", "/plain/moved")

    with_sftp(server, work)
    assert sorted(path.name for path in (server.root / "plain").iterdir()) == ["moved", "new", "three", "two"]
    assert (server.root / "plain/two").read_text() == "two"


def test_a_posix_rename_overwrites_a_file(server: Server) -> None:
    async def work(sftp: asyncssh.SFTPClient) -> None:
        await sftp.makedirs("/posix")
        for name in ("one", "two"):
            async with sftp.open(f"/posix/{name}", "w") as file:
                await file.write(name)
        await sftp.posix_rename("/posix/one", "/posix/two")

    with_sftp(server, work)
    assert {path.name: path.read_text() for path in (server.root / "posix").iterdir()} == {"two": "one"}


def test_of_many_renames_to_one_name_exactly_one_wins(server: Server) -> None:
    async def work(sftp: asyncssh.SFTPClient) -> None:
        for number in range(8):
            await sftp.makedirs(f"/race/{number}")
        renames = (sftp.rename(f"/race/{number}", "/race/final") for number in range(8))
        answers = await asyncio.gather(*renames, return_exceptions=True)
        assert sum(answer is None for answer in answers) == 1

    with_sftp(server, work)


def test_hard_links_statvfs_and_fsync_are_offered(server: Server) -> None:
    async def work(sftp: asyncssh.SFTPClient) -> None:
        async with sftp.open("/original", "wb") as file:
            await file.write(b"shared")
            await file.fsync()
        await sftp.link("/original", "/second_name")
        assert (await sftp.statvfs("/")).bavail > 0

    with_sftp(server, work)
    assert (server.root / "original").stat().st_ino == (server.root / "second_name").stat().st_ino


def test_a_wrong_password_is_refused(server: Server) -> None:
    async def work() -> None:
        with pytest.raises(asyncssh.PermissionDenied):
            async with login(server, password="wrong"):
                pass

    asyncio.run(work())


def test_there_is_no_shell_and_no_forwarding(server: Server) -> None:
    async def work() -> None:
        async with login(server) as connection:
            with pytest.raises(asyncssh.Error):
                await connection.run("id", check=True)
            with pytest.raises(asyncssh.Error):
                await connection.open_connection("127.0.0.1", server.port)

    asyncio.run(work())


def test_the_host_key_survives_a_restart_and_is_private(tmp_path: Path) -> None:
    first = start_server(tmp_path)
    key = load_public_key(first.host_key)
    assert stop_server(first) == 0
    second = start_server(tmp_path)

    async def work() -> None:
        async with login(second):
            pass

    try:
        asyncio.run(work())
        assert load_public_key(second.host_key) == key
        assert second.host_key.stat().st_mode & 0o777 == 0o600
    finally:
        assert stop_server(second) == 0


def test_it_ends_by_sigterm_while_clients_are_connected(tmp_path: Path) -> None:
    started = start_server(tmp_path)

    async def work() -> int:
        async with login(started) as connection, connection.start_sftp_client() as sftp:
            await sftp.listdir("/")
            return await asyncio.to_thread(stop_server, started)

    assert asyncio.run(work()) == 0


def test_it_does_not_start_without_a_login(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SFTP_")}
    command = [sys.executable, "-m", "ncr_upload.entrypoints.embedded.sftp_server", "--root", str(tmp_path)]
    done = subprocess.run([*command, "--host-key", str(tmp_path / "key")], env=environment, capture_output=True, timeout=30)
    assert done.returncode != 0
    assert b"SFTP_USERNAME" in done.stderr
