"""The connections of a session, and the SFTP channels in them. All but the first are opened when somebody asks for them."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import asyncssh

from ncr_upload.adapters.sftp_dropoff.allowance import Allowance
from ncr_upload.adapters.sftp_dropoff.login import SftpLogin, connect, disconnect
from ncr_upload.adapters.sftp_dropoff.remote import Remote
from ncr_upload.adapters.sftp_dropoff.wire import quicken
from ncr_upload.domain.errors import DeliveryError, Unavailable

Place = tuple[int, int]
"""Number of a connection, and of a channel in it."""


class Channels:
    """At most `connections` with `channels` in each. A server that refuses some is used with the rest."""

    def __init__(
        self,
        login: SftpLogin,
        timeout_seconds: float,
        connections: int,
        channels: int,
        allowance: Allowance,
        *,
        fast_transport: bool = True,
    ) -> None:
        self._login = login
        self._fast_transport = fast_transport
        self.allowance = allowance
        self._timeout_seconds = timeout_seconds
        self._most_connections = connections
        self._channels = channels
        self._connections: dict[int, asyncssh.SSHClientConnection | None] = {}
        self._connecting: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._remotes: dict[Place, Remote] = {}
        self.most = connections * channels

    @property
    def first(self) -> Remote:
        return self._remotes[0, 0]

    def places(self, connections: int) -> list[Place]:
        """Every place in so many connections, one in each of them first."""
        return [
            (connection, channel)
            for channel in range(self._channels)
            for connection in range(min(connections, self._most_connections))
        ]

    async def start(self, patience_seconds: float = 0) -> None:
        """Open the first channel. Raises `DestinationParked` (host key, login, settings), `Unavailable`, or `Deferred`."""
        await self.allowance.take_first(patience_seconds)
        self._connections[0] = connection = await self._connect()
        self._remotes[0, 0] = await self._start_sftp(connection)

    async def open(self, place: Place) -> Remote | None:
        """None if it is refused."""
        if place not in self._remotes:
            try:
                connection = await self._connection(place[0])
                if connection is None:
                    return None
                self._remotes[place] = await self._start_sftp(connection)
            except DeliveryError:
                return None
        return self._remotes[place]

    async def close(self) -> None:
        await asyncio.gather(*(disconnect(each) for each in self._connections.values() if each is not None))
        await self.allowance.close()

    def abort(self) -> None:
        """Close every connection at once: this session has no right to them any more."""
        for connection in self._connections.values():
            if connection is not None:
                connection.abort()

    async def _connection(self, number: int) -> asyncssh.SSHClientConnection | None:
        async with self._connecting[number]:
            if number not in self._connections:
                self._connections[number] = None  # not asked for again, whatever comes
                if await self.allowance.take_further():
                    try:
                        self._connections[number] = await self._connect()
                    except DeliveryError:
                        await self.allowance.give_back_one()
                        raise
            return self._connections[number]

    async def _connect(self) -> asyncssh.SSHClientConnection:
        return await connect(self._login, self._timeout_seconds)

    async def _start_sftp(self, connection: asyncssh.SSHClientConnection) -> Remote:
        address = self._login.address
        try:
            fast = self._fast_transport and quicken(connection)
            opening = connection.start_sftp_client(path_errors="surrogateescape")
            channel = await asyncio.wait_for(opening, self._timeout_seconds)
            return Remote(channel, address, self._timeout_seconds, fast=fast)
        except (asyncssh.Error, OSError) as error:
            raise Unavailable(
                "sftp_unreachable",
                f"{address} let the login in but offered no SFTP ({type(error).__name__})",
                "It is tried again; ask the partner whether SFTP is allowed for this login.",
            ) from None
