"""The partner's folder over SFTP: sessions, probes and what is left in the staging folder; see `publishing.py` for the rest."""

from __future__ import annotations

import posixpath
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from ncr_upload.adapters.sftp_dropoff.allowance import Allowance, Limits
from ncr_upload.adapters.sftp_dropoff.channels import Channels
from ncr_upload.adapters.sftp_dropoff.links import Links
from ncr_upload.adapters.sftp_dropoff.login import SftpLogin
from ncr_upload.adapters.sftp_dropoff.package import StagedPackage
from ncr_upload.adapters.sftp_dropoff.publishing import FOLDER, Publisher, name_folder
from ncr_upload.adapters.sftp_dropoff.remote import DISK_FULL, Denied, Failed, Missing
from ncr_upload.adapters.sftp_dropoff.scratch import IN_BASE, PROBE, Report, Scratch, find_full_disk
from ncr_upload.application.arrivals import Arrival
from ncr_upload.application.ports import AnnouncedPublish, Leftover, OnBytes, Previous, Staged, Successor
from ncr_upload.domain.errors import DestinationParked, NotPublished, Unavailable
from ncr_upload.domain.publishing import Sizes

CLOCK = PROBE + "clock"
P = ParamSpec("P")
T = TypeVar("T")


def concerning_a_job(
    method: Callable[Concatenate[SftpSession, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[SftpSession, P], Coroutine[Any, Any, T]]:
    """Have the scratch folder judge whether a refusal concerns the destination, which is parked then, or only the job."""

    @wraps(method)
    async def judged(session: SftpSession, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await method(session, *args, **kwargs)
        except (Denied, Failed) as failure:
            raise await session.scratch.judge(failure) from None
        except NotPublished as failure:
            if not isinstance(failure.cause, Denied | Failed):
                raise
            raise NotPublished(await session.scratch.judge(failure.cause)) from None

    return judged


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
        *,
        fast_transport: bool = True,
    ) -> None:
        self._login = login
        self._base = posixpath.normpath(base_dir) if base_dir else "."
        self._connections = connections
        self._limits = limits
        self._fast_transport = fast_transport
        self._channels = channels
        self._timeout_seconds = timeout_seconds

    @property
    def destination(self) -> str:
        return f"{self._login.username}@{self._login.address}:{self._base}"[:255]

    @asynccontextmanager
    async def session(self, patience_seconds: float = 0) -> AsyncIterator[SftpSession]:
        allowance = Allowance(self.destination, self._limits, lambda: channels.abort())
        sizes = (self._timeout_seconds, self._connections, self._channels)
        channels = Channels(self._login, *sizes, allowance, fast_transport=self._fast_transport)
        try:
            await channels.start(patience_seconds)
            yield SftpSession(channels, self._base)
        finally:
            await channels.close()

    async def examine(self) -> Report:
        """Try all that a session may do, in the scratch folder."""
        async with self.session() as session:
            return await session.scratch.examine(publish=True)


class SftpSession:
    """Logged in. Nothing outside STAGING is ever removed, but for folders that are empty."""

    def __init__(self, channels: Channels, base: str) -> None:
        self._channels = channels
        self._remote = channels.first
        self._base = base
        self.scratch = Scratch(self._remote, base)
        self._publisher = Publisher(channels, base)

    # --- probing ------------------------------------------------------------------------------------------------

    async def probe(self, parked_for: str = "") -> None:
        await self.scratch.probe(parked_for)

    # --- ownership and publishing -------------------------------------------------------------------------------

    @concerning_a_job
    async def adopt(self, task_id: str, fence: int, announced: AnnouncedPublish | None = None) -> str:
        """Raises `LeaseLost` when a newer fence has been here."""
        async with self._full_disk_told():
            return await self._publisher.adopt(task_id, fence, announced)

    @concerning_a_job
    async def is_published(self, task_id: str, fence: int) -> bool:
        return await self._publisher.is_published(task_id, fence)

    @concerning_a_job
    async def publish(self, task_id: str, fence: int, job_id: str, between: Callable[[], None]) -> str:
        return await self._publisher.publish(task_id, fence, job_id, between)

    async def discard(self, task_id: str, successor: Successor = Successor.NONE) -> None:
        await self._publisher.discard(task_id, successor)

    # --- what is left over --------------------------------------------------------------------------------------

    async def leftovers(self) -> list[Leftover]:
        """Whatever else is in the staging folder is not ours, and not listed."""
        staged = {name: attrs for name, attrs in (await self._publisher.list_folders()).items() if _is_ours(name)}
        with suppress(Missing, Denied):
            staged[IN_BASE] = await self._remote.stat(self._path(IN_BASE))
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
            await self._remote.remove_tree(self._path(leftover.name))
        else:
            await self._publisher.clear(leftover.name, successor)

    async def _read_clock(self) -> float:
        """The server's, by the time of a folder that was just made; 0 where it does not tell. Where nothing may be deleted, the
        time is that of the first call: then nothing there is old, nor could be cleared."""
        clock = self._path(CLOCK)
        with suppress(Denied):
            await self._remote.remove_tree(clock)
        await self._remote.make_folders(clock)
        try:
            return float((await self._remote.stat(clock)).mtime or 0)
        finally:
            with suppress(Denied):
                await self._remote.remove_tree(clock)

    async def _idle_seconds(self, name: str, own_mtime: float, now: float) -> float:
        """Every file comes to its place by way of `parts`, so what is below `package` need not be looked through."""
        own = self._path(name)
        changed = [own_mtime]
        for folder in (own, posixpath.join(own, "parts")):
            with suppress(Missing):
                changed += [attrs.mtime or 0 for attrs in (await self._remote.entries(folder)).values()]
        return max(0.0, now - max(changed)) if max(changed) else 0.0

    def _path(self, name: str) -> str:
        return self.scratch.in_base if name == IN_BASE else self._publisher.path(name)

    # --- staging ------------------------------------------------------------------------------------------------

    @concerning_a_job
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
        try:
            yield
        except Failed as failure:
            full = await find_full_disk(self._remote, self._base, failure)
            if full is None:
                raise
            raise full from None


def _is_ours(name: str) -> bool:
    return (name.startswith(PROBE) and name.isprintable()) or FOLDER.fullmatch(name) is not None
