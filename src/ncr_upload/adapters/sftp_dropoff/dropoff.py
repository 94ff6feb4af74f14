"""Staging a package beside the deliveries and publishing it by one rename.

    {base}/.ncr-staging/{task_id}-{fence}/package/{sku}/…    becomes {base}/{job_id}
                                          previous/{job_id}  the delivery it replaces, once renamed aside
                                          parts/             files while they arrive, by the SHA-256 they will have
                                          manifest.json      target → SHA-256 of what `package` has, or is about to have

The folder's name is the fence. A newer attempt renames the folder to its own name, and from then on no path that the
older attempt holds exists. A folder is made complete under `….new` and removed as `….gone`, each by a rename, so that
one that has its plain name always has its three subfolders, but for `package` once that is published.
"""

from __future__ import annotations

import asyncio
import posixpath
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress

import asyncssh

from ncr_upload.adapters.sftp_dropoff.allowance import Allowance, Limits
from ncr_upload.adapters.sftp_dropoff.channels import Channels
from ncr_upload.adapters.sftp_dropoff.links import Links
from ncr_upload.adapters.sftp_dropoff.login import SftpLogin
from ncr_upload.adapters.sftp_dropoff.package import STAGING, StagedPackage, check_relative
from ncr_upload.adapters.sftp_dropoff.remote import DISK_FULL, Failed, Missing, disk_full
from ncr_upload.application.arrivals import Arrival
from ncr_upload.application.ports import Leftover, OnBytes, Previous, Staged
from ncr_upload.domain.errors import DeliveryError, DestinationParked, LeaseLost, Unavailable

ROOM_FOR_MORE_BYTES = 1024 * 1024
PROBE = "probe."
PROBE_BYTES = 256 * 1024
_FOLDER = re.compile(r"(?P<task>.+)-(?P<fence>\d+)(?P<state>\.new|\.gone)?")


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

    async def probe(self) -> tuple[str, ...]:
        """Probe as a session does; the extensions the server offers."""
        async with self.session() as session:
            await session.probe()
            return session.extensions()


class SftpSession:
    """Logged in. Nothing outside STAGING is ever removed."""

    def __init__(self, channels: Channels, base: str) -> None:
        self._channels = channels
        self._remote = channels.first
        self._base = base
        self._fresh: set[str] = set()  # folders that this session has made, and staged nothing into

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

    # --- ownership ----------------------------------------------------------------------------------------------

    async def adopt(self, task_id: str, fence: int) -> None:
        """Raises `LeaseLost` when a newer fence has been here."""
        async with self._full_disk_told():
            await self._adopt(task_id, fence)

    async def _adopt(self, task_id: str, fence: int) -> None:
        # The second look is for an attempt that came in between: whichever of two made its folder last sees the other's.
        for _ in range(2):
            staged = await self._staged(make=True)
            fences = _fences(task_id, staged)
            if any(other > fence for other in fences):
                if fence in fences:
                    await self._remove(_name(task_id, fence))
                raise LeaseLost(task_id, fence)
            if fence not in fences:
                await self._take(task_id, fence, max(fences, default=None), staged)
                continue
            for older in fences:
                if older < fence:
                    await self._remove(_name(task_id, older))

    async def is_published(self, task_id: str, fence: int) -> bool:
        own = self._path(_name(task_id, fence))
        published = "package" not in await self._remote.entries(own)
        await self._remote.size(own)  # what was listed may have been renamed meanwhile, and be a newer attempt's by now
        return published

    async def discard(self, task_id: str) -> None:
        """A delivery that was renamed aside for a package that never followed is put back first."""
        for name in await self._staged():
            if (found := _FOLDER.fullmatch(name)) and found["task"] == task_id:
                await self._remove(name)

    async def leftovers(self) -> list[Leftover]:
        """Whatever else is in the staging folder is not ours, and not listed."""
        staged = {name: attrs for name, attrs in (await self._staged()).items() if _is_ours(name)}
        now = await self._read_clock() if staged else 0.0
        return [
            Leftover(
                name,
                found["task"] if (found := _FOLDER.fullmatch(name)) else None,
                await self._idle_seconds(name, attrs.mtime or 0, now),
            )
            for name, attrs in staged.items()
        ]

    async def clear(self, leftover: Leftover) -> None:
        if leftover.task_id is None:
            await self._remote.remove_tree(self._path(leftover.name))
        else:
            await self._remove(leftover.name)

    async def _read_clock(self) -> float:
        """The server's, by the time of a folder that was just made; 0 where it does not tell."""
        name = PROBE + secrets.token_hex(8)
        await self._remote.make_folder(self._path(name))
        try:
            made = (await self._staged()).get(name)
            return float(made.mtime or 0) if made else 0.0
        finally:
            await self._remote.remove_tree(self._path(name))

    async def _idle_seconds(self, name: str, own_mtime: float, now: float) -> float:
        """Every file comes to its place by way of `parts`, so what is below `package` need not be looked through."""
        own = self._path(name)
        changed = [own_mtime]
        for folder in (own, posixpath.join(own, "parts")):
            with suppress(Missing):
                changed += [attrs.mtime or 0 for attrs in (await self._remote.entries(folder)).values()]
        return max(0.0, now - max(changed)) if max(changed) else 0.0

    async def _take(self, task_id: str, fence: int, older: int | None, staged: Iterable[str]) -> None:
        name = _name(task_id, fence)
        own = self._path(name)
        if older is not None:
            await self._remote.rename(self._path(_name(task_id, older)), own)
            await self._put_back_unpublished(own)
            return
        new = own + ".new"
        if f"{name}.new" in staged:
            await self._remote.remove_tree(new)
        await self._remote.make_folder(new)
        inner = (posixpath.join(new, each) for each in ("package", "previous", "parts"))
        await asyncio.gather(*(self._remote.make_folder(folder) for folder in inner))
        await self._remote.rename(new, own)
        self._fresh.add(name)

    async def _remove(self, name: str) -> None:
        """Take a staging folder away from whoever uses it, put back what it had set aside, and remove it."""
        gone = name.removesuffix(".gone") + ".gone"
        if gone != name:
            try:
                await self._rename_away(name, gone)
            except Missing:
                return
        await self._clear(self._path(gone))

    async def _rename_away(self, name: str, gone: str) -> None:
        try:
            await self._remote.rename(self._path(name), self._path(gone))
        except Failed:  # a removal before was broken off
            await self._clear(self._path(gone))
            await self._remote.rename(self._path(name), self._path(gone))

    async def _clear(self, gone: str) -> None:
        """`package` goes before `previous`: as long as it is there, a repeated call knows that nothing was published."""
        if await self._put_back_unpublished(gone):
            await self._remote.remove_tree(posixpath.join(gone, "package"))
        await self._remote.remove_tree(gone, ("parts", "previous"))

    async def _put_back_unpublished(self, staging: str) -> bool:
        """Put back what a publish set aside that did not go through; whether it did not."""
        unpublished = await self._remote.exists(posixpath.join(staging, "package"))
        if unpublished:
            await self._put_back(staging)
        return unpublished

    async def _put_back(self, staging: str) -> None:
        """Rename what `previous` holds to its final name where nothing has taken its place."""
        previous = posixpath.join(staging, "previous")
        try:
            names = await self._remote.entries(previous)
        except Missing:
            return
        for job_id in names:
            final = posixpath.join(self._base, job_id)
            if not await self._remote.exists(final):
                await self._remote.rename(posixpath.join(previous, job_id), final)

    async def _staged(self, make: bool = False) -> dict[str, asyncssh.SFTPAttrs]:
        staging = posixpath.join(self._base, STAGING)
        try:
            return await self._remote.entries(staging)
        except Missing:
            if make:
                await self._remote.make_folders(staging)
            return {}

    def _path(self, name: str) -> str:
        return posixpath.join(self._base, STAGING, name)

    # --- publishing ---------------------------------------------------------------------------------------------

    async def publish(self, task_id: str, fence: int, job_id: str, between: Callable[[], None]) -> None:
        check_relative(job_id, one_segment=True)
        own = self._path(_name(task_id, fence))
        final, aside = posixpath.join(self._base, job_id), posixpath.join(own, "previous", job_id)
        staged, replaces, blocked = await asyncio.gather(
            *(self._remote.exists(path) for path in (posixpath.join(own, "package"), final, aside))
        )
        if not staged and await self.is_published(task_id, fence):
            return
        if replaces:
            if blocked:
                await self._remote.remove_tree(aside)
            await self._remote.rename(final, aside)
            between()
        try:
            await self._remote.rename(posixpath.join(own, "package"), final)
        except (Missing, Failed, DestinationParked):
            await self._restore_quietly(own)
            raise

    async def _restore_quietly(self, own: str) -> None:
        """Put the previous delivery back after a failed publish; whatever hinders it, the publish's failure is the news."""
        try:
            await self._put_back(own)
        except (Unavailable, DestinationParked):
            return

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
        name = _name(task_id, fence)
        package = StagedPackage(self._channels, self._path(name), Links(self._remote, self._base, previous), on_bytes)
        fresh = name in self._fresh
        self._fresh.discard(name)
        try:
            async with self._full_disk_told():
                return await package.stage(files, fresh)
        except DestinationParked as failure:
            if failure.code == DISK_FULL:
                with suppress(Unavailable, DestinationParked):
                    await self._remove(name)
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
    return name.startswith(PROBE) or _FOLDER.fullmatch(name) is not None


def _fences(task_id: str, staged: Iterable[str]) -> list[int]:
    found = (_FOLDER.fullmatch(name) for name in staged)
    return [int(each["fence"]) for each in found if each and each["task"] == task_id and not each["state"]]


def _name(task_id: str, fence: int) -> str:
    return f"{task_id}-{fence}"
