"""Sending a file's bytes with few copies and few system calls.

asyncssh copies each block some fifteen times between a file's write and the socket, makes one system call for every 32 KiB, and
puts an empty packet before each of its packets, which only ciphers in CBC mode need (RFC 4251, 9.3.1). With AES-GCM that was
half of what an upload cost. This goes around it for the packets that carry a channel's data, by what asyncssh has inside;
everything else stays asyncssh's. So does all of it where `find_obstacle` finds an untested version, cipher or compression, and
where SFTP_FAST_TRANSPORT=off: then `SftpRequests` asks the same through `SFTPClient`. The contract suites run both ways.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
import time
from collections import deque
from functools import lru_cache
from typing import Any, Protocol

import asyncssh
from asyncssh.encryption import GCMEncryption
from asyncssh.packet import SSHPacket
from asyncssh.sftp import MAX_SFTP_PACKET_LEN
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MSG_CHANNEL_WINDOW_ADJUST, MSG_CHANNEL_DATA = 93, 94  # RFC 4254, 5.2
FXP_OPEN, FXP_CLOSE, FXP_WRITE, FXP_SETSTAT, FXP_RENAME = 3, 4, 6, 9, 18  # draft-ietf-secsh-filexfer-02, 3
FXP_STATUS, FXP_HANDLE = 101, 102
ATTR_ACMODTIME = 8
NO_ATTRS = bytes(4)
OK = bytes(4)
BATCH_BYTES = 256 * 1024
LARGE_BYTES = 128 * 1024
"""Sent at once; less waits for what else is asked in the same turn of the event loop, to share a packet with it."""

AROUND_BYTES = 64
"""More than there is in a packet beside its data."""

NOISE_BYTES = 4096
LAST_COUNT = 0xFFFFFFFFFFFFFFFF
_LENGTH = struct.Struct(">I")
_DATA = struct.Struct(">BBII")
_MESSAGE = struct.Struct(">IBI")
_PLACE = struct.Struct(">QI")
_TIMES = struct.Struct(">III")
Answer = tuple[int, Any]

TESTED_VERSION = (2, 24)
TESTED_CIPHERS = frozenset({"aes128-gcm@openssh.com", "aes256-gcm@openssh.com"})
NEEDED = (
    *("_auth_complete", "_channels", "_decompressor", "_inpbuf", "_recv_encryption", "_recv_pkthdr", "_recv_seq"),
    *("_compressor", "_kex_complete", "_rekey_bytes", "_rekey_bytes_sent", "_rekey_seconds", "_rekey_time", "_send"),
    *("_send_blocksize", "_send_encryption", "_send_seq"),
)
IS_FAST = "ncr_fast_transport"
log = logging.getLogger(__name__)


def quicken(connection: asyncssh.SSHClientConnection) -> bool:
    """Have `_Intake` read what comes on this connection where that was tested; return whether it was."""
    if connection.get_extra_info(IS_FAST) is None:
        obstacle = find_obstacle(connection)
        if obstacle is None:
            setattr(connection, "_recv_pkthdr", _Intake(connection).receive)  # noqa: B010 - mypy forbids to assign a method
        else:
            _say_once(obstacle)
        connection.set_extra_info(**{IS_FAST: obstacle is None})
    return bool(connection.get_extra_info(IS_FAST))


def find_obstacle(connection: asyncssh.SSHClientConnection) -> str | None:
    """Return why the fast transport was not tested with this connection; None if it was."""
    if tuple(asyncssh.__version__.split(".")[:2]) != tuple(map(str, TESTED_VERSION)):
        return f"asyncssh {asyncssh.__version__} is not {'.'.join(map(str, TESTED_VERSION))}"
    for direction in ("send", "recv"):
        cipher = connection.get_extra_info(f"{direction}_cipher")
        if cipher not in TESTED_CIPHERS:
            return f"the cipher {cipher} is not one of {', '.join(sorted(TESTED_CIPHERS))}"
        compression = connection.get_extra_info(f"{direction}_compression")
        if compression != "none":
            return f"the connection is compressed by {compression}"
    missing = [name for name in NEEDED if not hasattr(connection, name)]
    return f"asyncssh {asyncssh.__version__} lacks {', '.join(missing)}" if missing else None


@lru_cache(maxsize=64)
def _say_once(obstacle: str) -> None:
    log.info("fast_transport: not used, since %s; uploads take about twice the CPU time", obstacle[:200])


class Requests(Protocol):
    """The requests that each file takes. A handle is good for the object that opened it."""

    async def open(self, path: bytes, flags: int) -> bytes: ...

    async def close(self, handle: bytes) -> None: ...

    async def rename(self, old: bytes, new: bytes) -> None: ...

    async def set_time(self, path: bytes, mtime: int) -> None: ...

    async def read(self, handle: bytes, offset: int, count: int) -> bytes: ...

    def write(self, handle: bytes, block: memoryview, offset: int) -> asyncio.Future[Any]: ...

    def check(self, answer: asyncio.Future[Any]) -> None: ...


def requests_of(channel: asyncssh.SFTPClient, timeout_seconds: float, *, fast: bool) -> Requests:
    """Return a `Wire` where the channel's connection was quickened, else `SftpRequests`."""
    return Wire(channel, timeout_seconds) if fast else SftpRequests(channel, timeout_seconds)


class SftpRequests:
    """The requests of `Wire` through the public `SFTPClient`."""

    def __init__(self, channel: asyncssh.SFTPClient, timeout_seconds: float) -> None:
        self._channel = channel
        self._timeout_seconds = timeout_seconds
        self._files: dict[bytes, asyncssh.SFTPClientFile] = {}
        self._opened = 0

    async def open(self, path: bytes, flags: int) -> bytes:
        """See `Wire.open`."""
        async with asyncio.timeout(self._timeout_seconds):
            file = await self._channel.open(path, flags, encoding=None, block_size=0)
        self._opened += 1
        handle = b"%d" % self._opened
        self._files[handle] = file
        return handle

    async def close(self, handle: bytes) -> None:
        """Close the file of the handle."""
        async with asyncio.timeout(self._timeout_seconds):
            await self._files.pop(handle).close()

    async def rename(self, old: bytes, new: bytes) -> None:
        """Rename by the plain request of SFTP version 3."""
        async with asyncio.timeout(self._timeout_seconds):
            await self._channel.rename(old, new)

    async def set_time(self, path: bytes, mtime: int) -> None:
        """Set the times of access and change."""
        async with asyncio.timeout(self._timeout_seconds):
            await self._channel.utime(path, (mtime, mtime))

    async def read(self, handle: bytes, offset: int, count: int) -> bytes:
        """Return at most `count` bytes; nothing at the end of the file."""
        found = await self._files[handle].read(count, offset)
        assert isinstance(found, bytes)  # opened without an encoding
        return found

    def write(self, handle: bytes, block: memoryview, offset: int) -> asyncio.Future[Any]:
        """Send it as one request; the server's answer comes later, for `check`."""
        return asyncio.ensure_future(self._files[handle].write(bytes(block), offset))

    def check(self, answer: asyncio.Future[Any]) -> None:
        """Raise what the server said, or why it said nothing."""
        answer.result()


class _Intake:
    """Reads the packets that an upload is answered with: data, and how much more of it the server takes."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._plainly = connection._recv_pkthdr
        self._cipher: Any = None
        self.packets = 0

    def receive(self) -> bool:
        """All such packets that are here. What is none, or does not decrypt, is left to asyncssh, which decrypts it itself."""
        connection = self._connection
        encryption = connection._recv_encryption
        if isinstance(encryption, GCMEncryption) and connection._auth_complete and not connection._decompressor:
            self._open(connection)
        return bool(connection._inpbuf and self._plainly())

    def _open(self, connection: Any) -> None:
        cipher = connection._recv_encryption._cipher
        if cipher is not self._cipher:
            self._cipher, self._decrypt = cipher, AESGCM(cipher._key).decrypt
        fixed, count = _parts_of(cipher._iv)
        received, start, packets = connection._inpbuf, 0, 0
        while len(received) - start > 20:
            header = received[start : start + 4]
            end = start + 20 + int.from_bytes(header, "big")
            if end > len(received):
                break
            try:
                packet = self._decrypt(fixed + count.to_bytes(8, "big"), received[start + 4 : end], header)
            except InvalidTag:
                break
            if not _hand_over(connection._channels, packet):
                break
            count = (count + 1) & LAST_COUNT
            packets += 1
            start = end
        cipher._iv = fixed + count.to_bytes(8, "big")
        connection._recv_seq = (connection._recv_seq + packets) & 0xFFFFFFFF
        connection._inpbuf = received[start:]
        self.packets += packets


def _hand_over(channels: dict[int, Any], packet: bytes) -> bool:
    """False if it is anything but data, or room for data, for a channel that is open."""
    if len(packet) < _DATA.size:
        return False
    padding, kind, number, count = _DATA.unpack_from(packet)
    rest = len(packet) - _DATA.size - padding
    channel = channels.get(number)
    if channel is None or channel._recv_state != "open":
        return False
    if kind == MSG_CHANNEL_WINDOW_ADJUST and rest == 0:
        channel._send_window += count
        channel._flush_send_buf()
        return True
    if kind == MSG_CHANNEL_DATA and rest == count <= channel._recv_window:
        channel._accept_data(packet[_DATA.size : _DATA.size + count])
        return True
    return False


class Wire:
    """One SFTP channel: the requests that each file takes, and all that is sent and received in it. Raises `SFTPConnectionLost`
    where it is closed already."""

    def __init__(self, channel: asyncssh.SFTPClient, timeout_seconds: float) -> None:
        handler: Any = channel._handler
        if handler._writer is None or handler._writer.channel._session is None:
            raise asyncssh.SFTPConnectionLost("the channel is closed")
        self._handler = handler
        self._loop = asyncio.get_running_loop()
        self._channel = handler._writer.channel
        self._plainly = self._channel._flush_send_buf
        self._channel._flush_send_buf = self._send_soon
        self._sending = False
        session = self._channel._session
        self._leave = session.data_received
        self._received = b""
        if not any(session._recv_buf.values()):
            session.data_received = self._receive
        self._timeout_seconds = timeout_seconds
        self._awaited: deque[tuple[float, int, asyncio.Future[Answer]]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._cipher: Any = None
        self._noise = b""
        self.packets = 0

    async def open(self, path: bytes, flags: int) -> bytes:
        """The handle. This and all others raise what the server said, or why it said nothing."""
        kind, packet = await self._ask_within(FXP_OPEN, _text(path) + _LENGTH.pack(flags) + NO_ATTRS)
        if kind == FXP_HANDLE:
            return bytes(packet.get_string())
        self._check(kind, packet)
        raise asyncssh.SFTPBadMessage("no handle in the answer to an open")

    async def close(self, handle: bytes) -> None:
        self._check(*await self._ask_within(FXP_CLOSE, _text(handle)))

    async def rename(self, old: bytes, new: bytes) -> None:
        self._check(*await self._ask_within(FXP_RENAME, _text(old) + _text(new)))

    async def set_time(self, path: bytes, mtime: int) -> None:
        self._check(*await self._ask_within(FXP_SETSTAT, _text(path) + _TIMES.pack(ATTR_ACMODTIME, mtime, mtime)))

    async def read(self, handle: bytes, offset: int, count: int) -> bytes:
        """Return at most `count` bytes; nothing at the end of the file. The caller has the time-out."""
        try:
            return bytes((await self._handler.read(handle, offset, count))[0])
        except asyncssh.SFTPEOFError:
            return b""

    def write(self, handle: bytes, block: memoryview, offset: int) -> asyncio.Future[Answer]:
        """Send it now; the server's answer comes later, for `check`. Raises `SFTPConnectionLost`."""
        answer = self._ask(FXP_WRITE, _text(handle) + _PLACE.pack(offset, len(block)), block)
        if self._channel._send_buf_len >= LARGE_BYTES:
            self._send()
        return answer

    def check(self, answer: asyncio.Future[Answer]) -> None:
        self._check(*answer.result())

    def _check(self, kind: int, packet: SSHPacket) -> None:
        if kind != FXP_STATUS:
            raise asyncssh.SFTPBadMessage(f"unexpected answer {kind}")
        if not packet.get_remaining_payload().startswith(OK):
            self._handler._process_status(packet)

    def _ask_within(self, kind: int, content: bytes) -> asyncio.Future[Answer]:
        """`TimeoutError` if there is no answer in time. One timer serves all, as they run out in the order they are made."""
        awaited, number = self._awaited, self._handler._next_pktid
        answer = self._ask(kind, content)
        while awaited and awaited[0][2].done():
            awaited.popleft()
        awaited.append((self._loop.time() + self._timeout_seconds, number, answer))
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout_seconds, self._give_up)
        return answer

    def _give_up(self) -> None:
        """On what was not answered in time. An answer that comes later still finds somebody it is for."""
        awaited, now = self._awaited, self._loop.time()
        while awaited and (awaited[0][2].done() or awaited[0][0] <= now):
            _, number, answer = awaited.popleft()
            if not answer.done():
                answer.set_exception(TimeoutError())
                nobody = self._loop.create_future()
                nobody.cancel()
                self._handler._requests[number] = nobody
        self._timer = self._loop.call_at(awaited[0][0], self._give_up) if awaited else None

    def _ask(self, kind: int, content: bytes, block: bytes | memoryview = b"") -> asyncio.Future[Answer]:
        handler, channel = self._handler, self._channel
        if handler._writer is None or channel._send_state != "open":
            raise asyncssh.SFTPConnectionLost("the channel is closed")
        number = handler._next_pktid
        handler._next_pktid = (number + 1) & 0xFFFFFFFF
        answer: asyncio.Future[Answer] = self._loop.create_future()
        handler._requests[number] = answer
        request = _MESSAGE.pack(5 + len(content) + len(block), kind, number) + content
        channel._send_buf.append((request, None))
        if block:
            channel._send_buf.append((block, None))
        channel._send_buf_len += len(request) + len(block)
        self._send_soon()
        return answer

    def _receive(self, data: bytes, datatype: Any) -> None:
        """Answers to what was asked. If one is none, it is left to asyncssh with all that follows."""
        requests = self._handler._requests
        received, start = self._received + data, 0
        while len(received) - start >= _MESSAGE.size:
            length, kind, number = _MESSAGE.unpack_from(received, start)
            end = start + 4 + length
            if length < 5 or length > MAX_SFTP_PACKET_LEN or number not in requests:
                self._channel._session.data_received = self._leave
                self._leave(received[start:], datatype)
                return
            if end > len(received):
                break
            answer = requests.pop(number)
            if not answer.done():
                answer.set_result((kind, SSHPacket(received[start + _MESSAGE.size : end])))
            start = end
        self._received = received[start:]

    def _send_soon(self) -> None:
        if not self._sending:
            self._sending = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        """What waits in the channel, as far as its window goes."""
        self._sending = False
        channel = self._channel
        connection, waiting = channel._conn, channel._send_buf
        if connection is None or channel._send_chan is None:
            return
        while waiting and channel._send_window and _may_seal(connection):
            connection._send(self._seal(connection, channel))
        if waiting and channel._send_window:
            waiting[:] = [(bytearray().join(piece for piece, _ in waiting), None)]
        self._plainly()

    def _seal(self, connection: Any, channel: Any) -> memoryview:
        """Packets of data (RFC 4254, 5.2), encrypted with AES-GCM (RFC 5647)."""
        cipher = connection._send_encryption._cipher
        if cipher is not self._cipher:
            self._cipher, self._encrypt_into = cipher, AESGCM(cipher._key).encrypt_into
        fixed, count = _parts_of(cipher._iv)
        block_bytes, number = connection._send_blocksize, channel._send_chan
        most = min(BATCH_BYTES + channel._send_pktsize, channel._send_buf_len, channel._send_window)
        batch = memoryview(bytearray(most + (1 + most // channel._send_pktsize) * AROUND_BYTES))
        packets = total = at = 0
        while channel._send_buf and channel._send_window and total < BATCH_BYTES:
            size, pieces = _take(channel._send_buf, min(channel._send_window, channel._send_pktsize))
            channel._send_window -= size
            padding = 4 + -(size + 14) % block_bytes
            packet = b"".join((_DATA.pack(padding, MSG_CHANNEL_DATA, number, size), *pieces, self._random(padding)))
            header = _LENGTH.pack(len(packet))
            end = at + 20 + len(packet)
            batch[at : at + 4] = header
            self._encrypt_into(fixed + count.to_bytes(8, "big"), packet, header, batch[at + 4 : end])
            at = end
            packets += 1
            count = (count + 1) & LAST_COUNT
            total += size
            connection._rekey_bytes_sent += len(packet)
        channel._send_buf_len -= total
        connection._send_seq = (connection._send_seq + packets) & 0xFFFFFFFF
        cipher._iv = fixed + count.to_bytes(8, "big")
        self.packets += packets
        return batch[:at]

    def _random(self, count: int) -> bytes:
        """Each call of the system's costs as much as to encrypt the packet."""
        if len(self._noise) < count:
            self._noise = os.urandom(NOISE_BYTES)
        taken, self._noise = self._noise[:count], self._noise[count:]
        return taken


def _parts_of(nonce: bytes) -> tuple[bytes, int]:
    """What stays, and what counts the packets (RFC 5647, 7.1), from anywhere on."""
    return nonce[:4], int.from_bytes(nonce[4:], "big")


def _text(content: bytes) -> bytes:
    return _LENGTH.pack(len(content)) + content


def _may_seal(connection: Any) -> bool:
    """Not while keys are exchanged or about to be."""
    if not (connection._auth_complete and connection._kex_complete) or connection._compressor:
        return False
    if connection._rekey_bytes_sent >= connection._rekey_bytes:
        return False
    if connection._rekey_seconds and time.monotonic() >= connection._rekey_time:
        return False
    return isinstance(connection._send_encryption, GCMEncryption)


def _take(waiting: list[tuple[Any, Any]], most: int) -> tuple[int, list[Any]]:
    """The first bytes that wait, `most` at most, and how many they are."""
    pieces, size = [], 0
    while waiting and size < most:
        piece = waiting[0][0]
        if len(piece) > most - size:
            pieces.append(piece[: most - size])
            waiting[0] = (piece[most - size :], None)
            return most, pieces
        pieces.append(piece)
        size += len(piece)
        del waiting[0]
    return size, pieces
