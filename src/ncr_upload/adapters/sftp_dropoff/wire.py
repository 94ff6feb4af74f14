"""Sending a file's bytes with few copies and few system calls.

asyncssh copies each block some fifteen times between a file's write and the socket, makes one system call for every 32 KiB, and
puts an empty packet before each of its packets, which only ciphers in CBC mode need (RFC 4251, 9.3.1). With AES-GCM that was
half of what an upload cost. This goes around it for the two packets that carry a file's bytes, by what asyncssh has inside;
everything else stays asyncssh's, and so does all of it on a connection with another cipher. The version of asyncssh is pinned
in requirements.txt, and tests say whether the way around is taken.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
from typing import Any

import asyncssh
from asyncssh.encryption import GCMEncryption
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MSG_CHANNEL_DATA = 94  # RFC 4254, 5.2
FXP_WRITE, FXP_STATUS = 6, 101  # draft-ietf-secsh-filexfer-02, 3
BATCH_BYTES = 256 * 1024
NOISE_BYTES = 4096
_WRITE = struct.Struct(">IBII")
_PLACE = struct.Struct(">QI")
Answer = tuple[int, Any]


def quicken(connection: asyncssh.SSHClientConnection) -> None:
    """Let this connection seal channel data by `_Seal`."""
    setattr(connection, "send_packet", _Seal(connection).send_packet)  # noqa: B010 - mypy forbids to assign a method


class _Seal:
    """Encrypts channel data with AES-GCM (RFC 5647) and hands it to the socket in batches."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._plainly = connection.send_packet
        self._loop = asyncio.get_running_loop()
        self._cipher: Any = None
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._noise = b""
        self.packets = 0

    def send_packet(self, kind: int, *content: bytes, handler: Any = None) -> None:
        if kind != MSG_CHANNEL_DATA or not self._may_seal():
            self.flush()  # packets are numbered: none may overtake another
            self._plainly(kind, *content, handler=handler)
            return
        self._seal(content)

    def _may_seal(self) -> bool:
        """Not while keys are exchanged or about to be."""
        connection = self._connection
        if not (connection._auth_complete and connection._kex_complete) or connection._compressor:
            return False
        if connection._rekey_bytes_sent >= connection._rekey_bytes:
            return False
        if connection._rekey_seconds and time.monotonic() >= connection._rekey_time:
            return False
        return isinstance(connection._send_encryption, GCMEncryption)

    def _seal(self, content: tuple[bytes, ...]) -> None:
        connection = self._connection
        cipher = connection._send_encryption._cipher
        if cipher is not self._cipher:
            self._cipher, self._sealed = cipher, AESGCM(cipher._key).encrypt
        length = 1 + sum(map(len, content))
        padding = -(connection._send_enchdrlen + length) % connection._send_blocksize
        if padding < 4:
            padding += connection._send_blocksize
        header = (1 + length + padding).to_bytes(4, "big")
        packet = b"".join((bytes((padding, MSG_CHANNEL_DATA)), *content, self._random(padding)))
        sealed = self._sealed(cipher._iv, packet, header)
        cipher._update_iv()
        connection._send_seq = (connection._send_seq + 1) & 0xFFFFFFFF
        connection._rekey_bytes_sent += len(packet)
        self.packets += 1
        if not self._batch:
            self._loop.call_soon(self.flush)
        self._batch += (header, sealed)
        self._batch_bytes += len(sealed)
        if self._batch_bytes >= BATCH_BYTES:
            self.flush()

    def _random(self, count: int) -> bytes:
        """Each call of the system's costs as much as to encrypt the packet."""
        if len(self._noise) < count:
            self._noise = os.urandom(NOISE_BYTES)
        taken, self._noise = self._noise[:count], self._noise[count:]
        return taken

    def flush(self) -> None:
        if self._batch:
            batch = b"".join(self._batch)
            self._batch.clear()
            self._batch_bytes = 0
            self._connection._send(batch)


class _Write:
    """An SFTP write in a channel's buffer, which takes it from there in pieces."""

    def __init__(self, header: bytes, block: memoryview) -> None:
        self._header = header
        self._block = block

    def __len__(self) -> int:
        return len(self._header) + len(self._block)

    def __getitem__(self, piece: slice) -> bytes | memoryview:
        header, count = self._header, piece.stop
        if not header:
            return self._block[:count]
        return header + self._block[: count - len(header)] if count > len(header) else header[:count]

    def __delitem__(self, piece: slice) -> None:
        count = piece.stop
        self._block = self._block[max(0, count - len(self._header)) :]
        self._header = self._header[count:]

    def __radd__(self, before: bytes) -> bytes:
        return b"".join((before, self._header, self._block))


class Wire:
    """The writes of one SFTP channel."""

    def __init__(self, channel: asyncssh.SFTPClient) -> None:
        self._handler: Any = channel._handler
        self._loop = asyncio.get_running_loop()

    def write(self, file: asyncssh.SFTPClientFile, block: memoryview, offset: int) -> asyncio.Future[Answer]:
        """Send it now; the server's answer comes later, for `check`. Raises `SFTPConnectionLost`."""
        handler, handle = self._handler, file.handle
        writer = handler._writer
        if writer is None or handle is None or writer.channel._send_state != "open":
            raise asyncssh.SFTPConnectionLost("the channel is closed")
        number = handler._next_pktid
        handler._next_pktid = (number + 1) & 0xFFFFFFFF
        answer = handler._requests[number] = self._loop.create_future()
        rest = handle + _PLACE.pack(offset, len(block))
        header = _WRITE.pack(9 + len(rest) + len(block), FXP_WRITE, number, len(handle)) + rest
        write = _Write(header, block)
        channel = writer.channel
        channel._send_buf.append((write, None))
        channel._send_buf_len += len(write)
        channel._flush_send_buf()
        return answer

    def check(self, answer: asyncio.Future[Answer]) -> None:
        """Raises what the server said, or why it said nothing."""
        kind, packet = answer.result()
        if kind != FXP_STATUS:
            raise asyncssh.SFTPBadMessage(f"unexpected answer {kind} to a write")
        self._handler._process_status(packet)
