"""The way around asyncssh: what goes over the wire is the same, and whatever it does not know is left to asyncssh."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncssh
import pytest
from asyncssh.encryption import GCMEncryption
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ncr_upload.adapters.sftp_dropoff.remote import Missing, Remote
from ncr_upload.adapters.sftp_dropoff.upload import ANEW, _Source
from ncr_upload.adapters.sftp_dropoff.wire import SftpRequests, Wire, _Intake, _take, find_obstacle, quicken
from ncr_upload.domain.errors import Unavailable
from ncr_upload.entrypoints.bootstrap.deliveries import make_dropoff
from ncr_upload.entrypoints.settings import Settings
from patience import allowed
from servers import SftpServer

pytestmark = pytest.mark.anyio
MEGABYTE = 1024 * 1024
CONTENT = random.Random(6).randbytes(8 * MEGABYTE)


@pytest.mark.parametrize("cipher", ["aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com"])
async def test_writes_arrive_whatever_the_cipher_and_while_keys_are_exchanged(
    openssh: SftpServer, tmp_path: Path, cipher: str
) -> None:
    login = openssh.login
    content, file = CONTENT, openssh.folder / tmp_path.name
    async with asyncssh.connect(
        login.host or "",
        login.port,
        username=login.username or "",
        client_keys=[str(login.private_key)],
        known_hosts=None,
        encryption_algs=[cipher],
        rekey_bytes=MEGABYTE,
    ) as connection:
        aes = cipher.startswith("aes")
        assert quicken(connection) is aes
        channel = await connection.start_sftp_client()
        wire = Wire(channel, 10)
        handle = await wire.open(str(file).encode(), ANEW)
        for start in range(0, len(content), 200_001):
            answer = wire.write(handle, memoryview(content)[start : start + 200_001], start)
            if start % 4 == 0:
                assert (await channel.lstat(str(file))).size is not None
                await answer
                wire.check(answer)
        await wire.close(handle)
        opened_packets = getattr(connection._recv_pkthdr.__self__, "packets", 0)  # type: ignore[attr-defined]
    assert file.read_bytes() == content
    assert (wire.packets > len(content) / 32768 / 2) == aes, "all but what waits for keys, where the cipher is AES-GCM"
    assert (opened_packets > len(content) / 200_001 / 4) == aes, "and what is answered"


@pytest.mark.parametrize("window", [1, 9, 10, 11, 64, 1000])
def test_what_waits_is_cut_into_pieces_of_any_size(window: int) -> None:
    """As a channel cuts it whose window is nearly used up: also within a header, and over several writes."""
    waiting = [(b"0123456789", None), (memoryview(CONTENT)[:100], None), (bytearray(b"next"), None)]
    taken = []
    while waiting:
        size, pieces = _take(waiting, window)
        taken.append(b"".join(pieces))
        assert len(taken[-1]) == size
    assert b"".join(taken) == b"0123456789" + CONTENT[:100] + b"next"
    assert [len(each) for each in taken[:-1]] == [window] * (len(taken) - 1)


# --- other servers -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def connected(factory: Callable[..., asyncssh.SFTPServer], **options: Any) -> AsyncIterator[Remote]:
    """To a server in this process that takes everybody."""

    class Open(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            return False

    key = asyncssh.generate_private_key("ssh-ed25519")
    async with (
        asyncssh.listen(
            "127.0.0.1", 0, server_factory=Open, server_host_keys=[key], sftp_factory=factory, encoding=None, **options
        ) as listener,
        asyncssh.connect(
            "127.0.0.1", listener.get_port(), known_hosts=None, encryption_algs="aes128-gcm@openssh.com", config=None
        ) as connection,
    ):
        quicken(connection)
        yield Remote(await connection.start_sftp_client(), "there", 1)


@pytest.mark.parametrize(("window", "max_pktsize"), [(2 * MEGABYTE, 32768), (50_000, 32768), (3000, 1000), (1000, 32768)])
async def test_writes_arrive_whatever_the_server_takes_at_once(tmp_path: Path, window: int, max_pktsize: int) -> None:
    content = CONTENT[:300_000]
    async with connected(asyncssh.SFTPServer, window=window, max_pktsize=max_pktsize) as remote:
        handle = await remote.open("open", str(tmp_path / "file"), ANEW)
        writes = [
            remote.wire.write(handle, memoryview(content)[start : start + 70_001], start)
            for start in range(0, len(content), 70_001)
        ]
        for write in asyncio.as_completed(writes, timeout=10):
            await write
        await remote.close("close", handle)
        assert remote.wire.packets >= len(content) / min(window, max_pktsize)
    assert (tmp_path / "file").read_bytes() == content


class Slow(asyncssh.SFTPServer):
    """It answers nothing else while it renames."""

    rename_seconds = 0.0

    async def rename(self, oldpath: bytes, newpath: bytes) -> None:
        await asyncio.sleep(self.rename_seconds)


async def test_what_is_answered_too_late_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slow, "rename_seconds", 0.5)
    async with connected(Slow) as remote:
        await remote.rename("in", "time")
        began = time.monotonic()
        renames = await asyncio.gather(*(remote.rename("a", "b") for _ in range(4)), return_exceptions=True)
        assert [str(each) for each in renames[2:]] == [str(renames[3])] * 2
        assert "no answer for 1 s" in str(renames[3])
        assert renames[0] is None
        assert 0.9 < time.monotonic() - began < allowed(1.9)
        await asyncio.sleep(1)
        await remote.close("close", await remote.open("open", str(tmp_path / "file"), ANEW))


async def test_a_request_that_is_cancelled_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slow, "rename_seconds", 0.2)
    async with connected(Slow) as remote:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(remote.rename("a", "b"), 0.1)
        await asyncio.sleep(0.2)
        await remote.close("close", await remote.open("open", str(tmp_path / "file"), ANEW))


async def test_an_answer_to_nothing_ends_the_channel(tmp_path: Path) -> None:
    """As asyncssh says, which it is left to."""
    async with connected(asyncssh.SFTPServer) as remote:
        opening = asyncio.create_task(remote.open("open", str(tmp_path / "file"), ANEW))
        await asyncio.sleep(0)
        remote.channel._handler._requests.clear()
        opening.cancel()
        await asyncio.sleep(0.2)
        with pytest.raises(Unavailable, match="lost there"):
            await remote.rename("a", "b")


async def test_a_channel_that_is_lost_as_soon_as_it_is_open_is_none(tmp_path: Path) -> None:
    async with connected(asyncssh.SFTPServer) as remote:
        remote.channel._handler._writer.channel.get_connection().abort()
        await asyncio.sleep(0.1)
        with pytest.raises(asyncssh.SFTPConnectionLost):
            Remote(remote.channel, "there", 1)
        with pytest.raises(Unavailable, match="lost there"):
            await remote.open("open", str(tmp_path / "file"), ANEW)


# --- what comes in -----------------------------------------------------------------------------------------------

KEY, FIXED = bytes(range(16)), b"four"
LAST = 2**64 - 1


def sealed(count: int, plain: bytes) -> bytes:
    header = len(plain).to_bytes(4, "big")
    return header + AESGCM(KEY).encrypt(FIXED + count.to_bytes(8, "big"), plain, header)


def data(channel: int, content: bytes) -> bytes:
    return bytes([4, 94]) + channel.to_bytes(4, "big") + len(content).to_bytes(4, "big") + content + bytes(4)


def room(channel: int, count: int) -> bytes:
    return bytes([6, 93]) + channel.to_bytes(4, "big") + count.to_bytes(4, "big") + bytes(6)


class Channel:
    def __init__(self) -> None:
        self._recv_state = "open"
        self._recv_window = 100
        self._send_window = 0
        self.flushes = 0
        self.taken: list[bytes] = []

    def _accept_data(self, content: bytes) -> None:
        self.taken.append(content)

    def _flush_send_buf(self) -> None:
        self.flushes += 1


def receiving(received: bytes, count: int, channel: Channel) -> Any:
    """A connection that has received this, and leaves to asyncssh what is left to it."""
    return SimpleNamespace(
        _recv_encryption=GCMEncryption.new("aes128-gcm", KEY, FIXED + count.to_bytes(8, "big")),
        _auth_complete=True,
        _decompressor=None,
        _channels={3: channel},
        _inpbuf=received,
        _recv_seq=0xFFFFFFFF,
        _recv_pkthdr=lambda: False,
    )


def test_data_and_room_are_taken_also_where_the_counter_starts_anew() -> None:
    channel = Channel()
    packets = [data(3, b"hello"), room(3, 7), data(3, b"world"), room(3, 8)]
    received = b"".join(sealed((LAST - 1 + number) & LAST, packet) for number, packet in enumerate(packets))
    connection = receiving(received + sealed(2, data(3, b"cut off"))[:-1], LAST - 1, channel)
    _Intake(connection).receive()
    assert (channel.taken, channel._send_window, channel.flushes) == ([b"hello", b"world"], 15, 2)
    assert connection._inpbuf == sealed(2, data(3, b"cut off"))[:-1]
    assert connection._recv_encryption._cipher._iv == FIXED + (2).to_bytes(8, "big")
    assert connection._recv_seq == 3


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(sealed(1, data(4, b"x")), id="another channel"),
        pytest.param(sealed(1, data(3, bytes(101))), id="more than its window"),
        pytest.param(sealed(1, data(3, b"x") + b"more"), id="too long"),
        pytest.param(sealed(1, room(3, 1) + b"more"), id="too long room"),
        pytest.param(sealed(1, bytes([4, 97]) + bytes(14)), id="another kind"),
        pytest.param(sealed(1, b""), id="empty"),
        pytest.param(sealed(1, b"short"), id="short"),
        pytest.param(sealed(2, data(3, b"x")), id="out of order"),
        pytest.param(sealed(1, data(3, b"x"))[:-1] + b"?", id="forged"),
    ],
)
def test_what_is_anything_else_is_left_to_asyncssh_as_it_came(packet: bytes) -> None:
    channel, rest = Channel(), sealed(2, data(3, b"behind it"))
    connection = receiving(sealed(0, data(3, b"before it")) + packet + rest, 0, channel)
    _Intake(connection).receive()
    assert channel.taken == [b"before it"]
    assert connection._inpbuf == packet + rest
    assert connection._recv_encryption._cipher._iv == FIXED + (1).to_bytes(8, "big")


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [None, "not in memory", "in part"])
def test_what_is_not_in_memory_is_left_to_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: str | None) -> None:
    def preadv(*_: object) -> int:
        if known == "not in memory":
            raise BlockingIOError
        return 10

    (tmp_path / "file").write_bytes(CONTENT[:1000])
    if known is None:
        monkeypatch.setattr("ncr_upload.adapters.sftp_dropoff.upload.FROM_MEMORY", None)
    else:
        monkeypatch.setattr(os, "preadv", preadv)
    source = _Source((tmp_path / "file").open, 1000, hashed=False)  # type: ignore[arg-type]
    assert not source.read_from_memory(100, 200)
    assert source.take(100, 200) is None
    source.read(100, 200)
    assert source.take(100, 200) == CONTENT[100:300]
    source.close()


# --- where it was not tested -------------------------------------------------------------------------------------


@asynccontextmanager
async def logged_in(openssh: SftpServer, **options: Any) -> AsyncIterator[asyncssh.SSHClientConnection]:
    login = openssh.login
    async with asyncssh.connect(
        login.host or "",
        login.port,
        username=login.username or "",
        client_keys=[str(login.private_key)],
        known_hosts=None,
        encryption_algs=["aes128-gcm@openssh.com"],
        **options,
    ) as connection:
        yield connection


async def test_the_fast_transport_is_taken_where_all_is_as_tested(openssh: SftpServer) -> None:
    async with logged_in(openssh) as connection:
        assert find_obstacle(connection) is None
        assert quicken(connection)
        intake = connection._recv_pkthdr
        assert quicken(connection), "once for each channel that is opened in it"
        assert connection._recv_pkthdr == intake


@pytest.mark.parametrize("version", ["2.23.0", "2.25.0", "3.0.0", "2.3"])
async def test_another_version_of_asyncssh_falls_back_and_it_is_said_once(
    openssh: SftpServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    monkeypatch.setattr(asyncssh, "__version__", version)
    caplog.set_level("INFO", "ncr_upload")
    for _ in range(2):
        async with logged_in(openssh) as connection:
            plain = connection._recv_pkthdr
            assert not quicken(connection)
            assert connection._recv_pkthdr == plain
    (said,) = [record.getMessage() for record in caplog.records if "fast_transport" in record.getMessage()]
    assert f"asyncssh {version} is not 2.24" in said


async def test_compression_and_a_renamed_attribute_fall_back_too(openssh: SftpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with logged_in(openssh, compression_algs=["zlib@openssh.com"]) as connection:
        assert "compressed by zlib@openssh.com" in str(find_obstacle(connection))
    async with logged_in(openssh) as connection:
        del connection._rekey_bytes_sent
        try:
            assert "lacks _rekey_bytes_sent" in str(find_obstacle(connection))
        finally:
            connection._rekey_bytes_sent = 0


@pytest.mark.parametrize("fast", [True, False])
async def test_both_transports_give_the_same_answers(openssh: SftpServer, tmp_path: Path, fast: bool) -> None:
    path, content = openssh.folder / tmp_path.name, CONTENT[:1_000_000]
    async with logged_in(openssh) as connection:
        assert quicken(connection)
        remote = Remote(await connection.start_sftp_client(), "there", 10, fast=fast)
        assert isinstance(remote.wire, Wire if fast else SftpRequests)
        handle = await remote.open("open", str(path), ANEW)
        writes = [
            remote.wire.write(handle, memoryview(content)[at : at + 100_000], at) for at in range(0, len(content), 100_000)
        ]
        for write in writes:
            await write
            remote.wire.check(write)
        await remote.close("close", handle)
        await remote.set_time(str(path), 1_500_000_000)
        handle = await remote.open("open", str(path), asyncssh.FXF_READ)
        assert await remote.read_at("read", handle, 999_990, 100) == content[-10:]
        assert await remote.read_at("read", handle, 1_000_000, 100) == b""
        denied = remote.wire.write(handle, memoryview(b"x"), 0)
        await asyncio.wait([denied])
        with pytest.raises((asyncssh.SFTPError, OSError)):
            remote.wire.check(denied)
        await remote.close("close", handle)
        await remote.rename(str(path), f"{path}.new")
        with pytest.raises(Missing):
            await remote.open("open", str(path), asyncssh.FXF_READ)
    renamed = path.with_name(f"{path.name}.new")
    assert renamed.read_bytes() == content
    assert renamed.stat().st_mtime == 1_500_000_000


@pytest.mark.parametrize(("setting", "fast"), [("auto", True), ("off", False)])
async def test_the_setting_says_which_one_a_session_uses(openssh: SftpServer, setting: str, fast: bool) -> None:
    settings = Settings(_env_file=None, sftp_fast_transport=setting, sftp_base_dir=openssh.base_dir)  # type: ignore[call-arg, arg-type]
    login = openssh.login
    settings = settings.model_copy(
        update={
            "sftp_host": login.host,
            "sftp_port": login.port,
            "sftp_username": login.username,
            "sftp_private_key": login.private_key,
            "sftp_host_key": login.host_key,
        }
    )
    async with make_dropoff(settings).session() as session:
        assert isinstance(session._channels.first.wire, Wire if fast else SftpRequests)
