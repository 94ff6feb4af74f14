"""The partner's folder over SFTP: sessions, probes and what is left in the staging folder; see `publishing.py` for the rest."""

from __future__ import annotations

import posixpath
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from ncr_upload.adapters.sftp_dropoff.allowance import Allowance, Limits
from ncr_upload.adapters.sftp_dropoff.channels import Channels
from ncr_upload.adapters.sftp_dropoff.links import Links
from ncr_upload.adapters.sftp_dropoff.login import SftpLogin
from ncr_upload.adapters.sftp_dropoff.package import STAGING, StagedPackage
from ncr_upload.adapters.sftp_dropoff.publishing import FOLDER, Publisher, name_folder
from ncr_upload.adapters.sftp_dropoff.remote import DISK_FULL, Failed, Missing, disk_full
from ncr_upload.application.arrivals import Arrival
from ncr_upload.application.ports import AnnouncedPublish, Leftover, OnBytes, Previous, Staged, Successor
from ncr_upload.domain.errors import DeliveryError, DestinationParked, Unavailable
from ncr_upload.domain.publishing import Sizes

ROOM_FOR_MORE_BYTES = 1024 * 1024
PROBE = "probe."
PROBE_BYTES = 256 * 1024


class SftpDropoff:
    """A session uses up to `connections`, each with up to `channels`; `timeout_seconds` bounds each wait for an answer."""

    def __init__(
        self,
        login: SftpLogin,
        base_dir: str = "/",
        channels: int = 4,
        timeout_seconds: float = 30,
        connections: int = 4,
        limits: Limits | None = None,
    ) -> None:
        self._login = login
        self._base = posixpath.normpath(base_dir) if base_dir else "."
        self._connections = connections
        self._limits = limits
        self._channels = channels
        self._timeout_seconds = timeout_seconds

    @property
    def destination(self) -> str:
        return f"{self._login.username}@{self._login.address}:{self._base}"[:255]

    @asynccontextmanager
    async def session(self, patience_seconds: float = 0) -> AsyncIterator[SftpSession]:
        allowance = Allowance(self.destination, self._limits, lambda: channels.abort())
        channels = Channels(self._login, self._timeout_seconds, self._connections, self._channels, allowance)
        try:
            await channels.start(patience_seconds)
            yield SftpSession(channels, self._base)
        finally:
            await channels.close()

    async def probe(self) -> tuple[str, ...]:
        """Probe as a session does; the extensions the server offers."""
        async with self.session() as session:
            await session.probe()
            return session.extensions()


class SftpSession:
    """Logged in. Nothing outside STAGING is ever removed, but for folders that are empty."""

    def __init__(self, channels: Channels, base: str) -> None:
        self._channels = channels
        self._remote = channels.first
        self._base = base
        self._publisher = Publisher(channels, base)

    # --- probing ------------------------------------------------------------------------------------------------

    async def probe(self) -> None:
        """The file is larger than what a full disk may still take in."""
        staging = posixpath.join(self._base, STAGING)
        folder = posixpath.join(staging, PROBE + secrets.token_hex(8))
        file = posixpath.join(folder, "file")
        async with self._full_disk_told():
            await self._remote.make_folders(staging)
            try:
                await self._remote.make_folder(folder)
                await self._remote.write(file, bytes(PROBE_BYTES))
            except DeliveryError:
                with suppress(DeliveryError):
                    await self._remote.remove_tree(folder)
                raise
            await self._remote.remove_tree(folder)

    def extensions(self) -> tuple[str, ...]:
        return self._remote.extensions()

    # --- ownership and publishing -------------------------------------------------------------------------------

    async def adopt(self, task_id: str, fence: int, announced: AnnouncedPublish | None = None) -> str:
        """Raises `LeaseLost` when a newer fence has been here."""
        async with self._full_disk_told():
            return await self._publisher.adopt(task_id, fence, announced)

    async def is_published(self, task_id: str, fence: int) -> bool:
        return await self._publisher.is_published(task_id, fence)

    async def publish(self, task_id: str, fence: int, job_id: str, between: Callable[[], None]) -> str:
        return await self._publisher.publish(task_id, fence, job_id, between)

    async def discard(self, task_id: str, successor: Successor = Successor.NONE) -> None:
        await self._publisher.discard(task_id, successor)

    # --- what is left over --------------------------------------------------------------------------------------

    async def leftovers(self) -> list[Leftover]:
        """Whatever else is in the staging folder is not ours, and not listed."""
        staged = {name: attrs for name, attrs in (await self._publisher.list_folders()).items() if _is_ours(name)}
        now = await self._read_clock() if staged else 0.0
        return [
            Leftover(
                name,
                found["task"] if (found := FOLDER.fullmatch(name)) else None,
                await self._idle_seconds(name, attrs.mtime or 0, now),
            )
            for name, attrs in staged.items()
        ]

    async def clear(self, leftover: Leftover, successor: Successor = Successor.UNKNOWN) -> None:
        if leftover.task_id is None:
            await self._remote.remove_tree(self._publisher.path(leftover.name))
        else:
            await self._publisher.clear(leftover.name, successor)

    async def _read_clock(self) -> float:
        """The server's, by the time of a folder that was just made; 0 where it does not tell."""
        name = PROBE + secrets.token_hex(8)
        await self._remote.make_folder(self._publisher.path(name))
        try:
            made = (await self._publisher.list_folders()).get(name)
            return float(made.mtime or 0) if made else 0.0
        finally:
            await self._remote.remove_tree(self._publisher.path(name))

    async def _idle_seconds(self, name: str, own_mtime: float, now: float) -> float:
        """Every file comes to its place by way of `parts`, so what is below `package` need not be looked through."""
        own = self._publisher.path(name)
        changed = [own_mtime]
        for folder in (own, posixpath.join(own, "parts")):
            with suppress(Missing):
                changed += [attrs.mtime or 0 for attrs in (await self._remote.entries(folder)).values()]
        return max(0.0, now - max(changed)) if max(changed) else 0.0

    # --- staging ------------------------------------------------------------------------------------------------

    async def stage(
        self,
        task_id: str,
        fence: int,
        files: AsyncIterator[Arrival],
        on_bytes: OnBytes,
        previous: Previous | None = None,
    ) -> Staged:
        """On a full disk nothing stays staged: of several jobs that wait for room, one at least shall find it."""
        name, publisher = name_folder(task_id, fence), self._publisher
        package = StagedPackage(self._channels, publisher.path(name), Links(self._remote, self._base, previous), on_bytes)
        fresh = publisher.take_fresh(name)
        before: Sizes | None = None

        async def look_at_previous() -> None:
            nonlocal before
            before = await publisher.list_final(previous.job_id) if previous else None

        try:
            async with self._full_disk_told():
                staged = await package.stage(files, fresh, look_at_previous)
            publisher.note_staged(name, package.sizes(), before)
            return staged
        except DestinationParked as failure:
            if failure.code == DISK_FULL:
                with suppress(Unavailable, DestinationParked):
                    await publisher.remove([name], Successor.NONE)
            raise

    @asynccontextmanager
    async def _full_disk_told(self) -> AsyncIterator[None]:
        """OpenSSH says only that it failed; the free space tells whether that is why."""
        try:
            yield
        except Failed as failure:
            free = await self._remote.free_room(self._base)
            if free is None or (free.size >= ROOM_FOR_MORE_BYTES and free.files > 0):
                raise
            raise disk_full(failure.message, f"{free.size} bytes and {free.files} files are free") from None


def _is_ours(name: str) -> bool:
    return name.startswith(PROBE) or FOLDER.fullmatch(name) is not None
