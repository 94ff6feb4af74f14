"""Connecting to the partner's server by itself: what is wrong before a byte is sent, and what servers may say or not say."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from fault_proxy import fault_proxy
from ncr_upload.adapters.sftp_dropoff import login as module
from ncr_upload.adapters.sftp_dropoff.login import SftpLogin, connect, disconnect
from ncr_upload.domain.errors import DeliveryError, DestinationParked, Unavailable
from patience import allowed
from servers import SftpServer

pytestmark = pytest.mark.anyio
KEY = asyncssh.generate_private_key("ssh-ed25519")
PUBLIC = KEY.export_public_key().decode().strip()
COMPLETE = SftpLogin("127.0.0.1", 22, "partner", "the password", host_key=PUBLIC)


async def refusal(login: SftpLogin, timeout_seconds: float = 5) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        await disconnect(await connect(login, timeout_seconds))
    return caught.value


# --- before anything is sent


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"host": None}, "sftp_unset", "SFTP_HOST"),
        ({"username": ""}, "sftp_unset", "SFTP_USERNAME"),
        ({"password": None}, "sftp_unset", "SFTP_PASSWORD (or SFTP_PRIVATE_KEY or SFTP_AGENT)"),
        ({"host_key": None}, "host_key_unpinned", "127.0.0.1:22"),
        ({"host_key": " , \n"}, "host_key_unpinned", "127.0.0.1:22"),
        ({"host_key": "ssh-ed25519 nonsense"}, "host_key_unreadable", "SFTP_HOST_KEY"),
        ({"host_key": f"{PUBLIC},nonsense"}, "host_key_unreadable", "SFTP_HOST_KEY"),
        ({"host_key": None, "known_hosts": "none/here"}, "host_key_unreadable", "none/here"),
        ({"host_key": None, "known_hosts": "empty"}, "host_key_unpinned", "127.0.0.1:22"),
        ({"private_key": "none/here"}, "login_key_unreadable", "none/here"),
        ({"private_key": "empty"}, "login_key_unreadable", "empty"),
        ({"private_key": "locked"}, "login_key_unreadable", "passphrase"),
        ({"private_key": "locked", "passphrase": "another passphrase"}, "login_key_unreadable", "passphrase"),
        ({"agent": True}, "agent_empty", "SFTP_AGENT"),
    ],
)
async def test_a_login_that_cannot_work_is_refused_by_name_and_nothing_is_connected_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], code: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "no agent"))
    (tmp_path / "empty").write_text("")
    (tmp_path / "locked").write_bytes(KEY.export_private_key(passphrase="the passphrase"))
    changes = {name: Path(value) if name in ("known_hosts", "private_key") else value for name, value in changes.items()}
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        error = await refusal(replace(COMPLETE, port=port, **changes))
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(server.accept)
    assert (type(error), error.code) == (DestinationParked, code)
    assert named.replace(":22", f":{port}") in error.message + error.next_step
    assert not any(secret in str(error) for secret in ("the password", "another passphrase", "nonsense"))


def test_a_login_shows_no_secret_of_its_own() -> None:
    shown = repr(replace(COMPLETE, passphrase="the passphrase"))
    assert "the pass" not in shown


# --- what a known_hosts file may hold


def known_hosts(form: str) -> Callable[[SftpServer], str]:
    def write(server: SftpServer) -> str:
        key, place = server.login.host_key or "", f"[127.0.0.1]:{server.login.port}"
        return form.format(place=place, key=key, other=PUBLIC)

    return write


@pytest.mark.parametrize(
    ("form", "code"),
    [
        ("# a comment\n\n{place} {key}\n", None),
        ("{place} {other}\n{place} {key}\n", None),
        ("elsewhere {key}\n", "host_key_unpinned"),
        ("{place} {other}\n", "host_key_mismatch"),
        ("@revoked {place} {key}\n{place} {other}\n", "host_key_mismatch"),
        ("@cert-authority {place} {other}\n", "host_key_mismatch"),
    ],
)
async def test_a_known_hosts_file_is_read_as_openssh_reads_it(
    plain: SftpServer, tmp_path: Path, form: str, code: str | None
) -> None:
    path = tmp_path / "known_hosts"
    path.write_text(known_hosts(form)(plain))
    login = plain.with_login(host_key=None, known_hosts=path)
    if code is None:
        await disconnect(await connect(login, 10))
    else:
        assert (await refusal(login, 10)).code == code


# --- what a server may say


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (b"", ""),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ""),
        (b"\xff\x00\x1b[31m" * 50 + b"\r\n", ""),
        (b"SSH-1.5-old\r\n", "version"),
        (b"SSH-2.0-x\r\n" + b"\x00" * 64, ""),
    ],
)
async def test_a_server_that_speaks_no_ssh_is_unreachable_in_printable_words(said: bytes, cause: str) -> None:
    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    error = await refusal(replace(COMPLETE, port=port))
    server.close()
    assert (type(error), error.code) == (Unavailable, "sftp_unreachable")
    assert f"127.0.0.1:{port}" in error.message
    assert cause in error.message.lower()
    assert len(error.message) < 300
    assert re.fullmatch(r"[ -~]+", error.message)


@pytest.mark.parametrize("username", ["partner", "somebody else"])
async def test_a_refused_login_says_which_ways_were_tried(plain: SftpServer, username: str) -> None:
    error = await refusal(plain.with_login(username=username, password="wrong password"))
    assert (type(error), error.code) == (DestinationParked, "login_refused")
    assert f"{username!r} (tried: password)" in error.message
    assert "wrong password" not in str(error)


async def test_no_file_of_the_account_takes_part(plain: SftpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that would send every connection elsewhere."""
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("Host *\n  Hostname 192.0.2.1\n  Port 9\n  User nobody\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    connection = await connect(plain.login, 10)
    assert connection.get_extra_info("peername")[:2] == ("127.0.0.1", plain.login.port)
    assert connection.get_extra_info("username") == "partner"
    await disconnect(connection)


@pytest.mark.parametrize("cipher", ["aes128-gcm@openssh.com"])
async def test_the_fastest_cipher_that_both_know_is_taken(plain: SftpServer, cipher: str) -> None:
    connection = await connect(plain.login, 10)
    assert connection.get_extra_info("send_cipher") == connection.get_extra_info("recv_cipher") == cipher
    await disconnect(connection)


# --- the end


async def test_a_connection_to_a_server_that_went_silent_is_left_in_bounded_time(
    plain: SftpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.5)
    with fault_proxy((plain.login.host or "", plain.login.port)) as proxy:
        connection = await connect(plain.with_login(port=proxy.port), 30)
        proxy.freeze()
        began = time.monotonic()
        await disconnect(connection)
        assert time.monotonic() - began < allowed(10)
        assert connection.is_closed()


async def test_disconnecting_twice_harms_nothing(plain: SftpServer) -> None:
    connection = await connect(plain.login, 10)
    await disconnect(connection)
    await disconnect(connection)
