"""Staging a package beside the deliveries and publishing it by one rename.

    {base}/.ncr-staging/{task_id}-{fence}/package/{sku}/…    becomes {base}/{job_id}
                                          previous/{job_id}  the delivery it replaces, once renamed aside
                                          parts/             files while they arrive, by the SHA-256 they will have
                                          manifest.json      target → SHA-256 of what was staged as `package`

The folder's name is the fence. A newer attempt renames the folder to its own name, and from then on no path that the
older attempt holds exists. A folder is made complete under `….new` and removed as `….gone`, each by a rename, so that
one that has its plain name always has its three subfolders, but for `package` once that is published.
"""

from __future__ import annotations

import asyncio
import json
import posixpath
import re
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import asyncssh

from ncr_upload.adapters.sftp_dropoff.login import SftpLogin, connected
from ncr_upload.adapters.sftp_dropoff.remote import DISK_FULL, Failed, Missing, Remote, at_most, disk_full
from ncr_upload.adapters.sftp_dropoff.upload import upload_file
from ncr_upload.application.ports import Leftover, LocalFile, OnBytes, Staged
from ncr_upload.domain.errors import DeliveryError, DestinationParked, LeaseLost, Rejected, Unavailable

STAGING = ".ncr-staging"
FILES_PER_CHANNEL = 2
ROOM_FOR_MORE_BYTES = 1024 * 1024
PROBE = "probe."
PROBE_BYTES = 256 * 1024
_FOLDER = re.compile(r"(?P<task>.+)-(?P<fence>\d+)(?P<state>\.new|\.gone)?")


@dataclass(frozen=True, slots=True)
class _Part:
    """A file on its way, and how many bytes of it an earlier attempt has left there; None if it left nothing."""

    local: LocalFile
    name: str
    bytes: int | None


class SftpDropoff:
    """`channels` files or more are uploaded at once over one connection; `timeout_seconds` bounds each wait for an answer."""

    def __init__(self, login: SftpLogin, base_dir: str = "/", channels: int = 4, timeout_seconds: float = 30) -> None:
        self._login = login
        self._base = posixpath.normpath(base_dir) if base_dir else "."
        self._channels = channels
        self._timeout_seconds = timeout_seconds

    @property
    def destination(self) -> str:
        return f"{self._login.username}@{self._login.address}:{self._base}"[:255]

    @asynccontextmanager
    async def session(self) -> AsyncIterator[SftpSession]:
        async with connected(self._login, self._timeout_seconds) as connection:
            first = await _open_channel(connection, self._login.address, self._timeout_seconds)
            yield SftpSession(connection, first, self._base, self._channels)

    async def probe(self) -> tuple[str, ...]:
        """Probe as a session does; the extensions the server offers."""
        async with self.session() as session:
            await session.probe()
            return session.extensions()


class SftpSession:
    """A logged-in connection. Nothing outside STAGING is ever removed."""

    def __init__(self, connection: asyncssh.SSHClientConnection, first: Remote, base: str, channels: int) -> None:
        self._connection = connection
        self._remote = first
        self._base = base
        self._channels = channels

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
                await self._remote.ask(f"write {file}", self._write(file, bytes(PROBE_BYTES)))
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
        await self._remote.make_folders(posixpath.join(self._base, STAGING))
        # The second look is for an attempt that came in between: whichever of two made its folder last sees the other's.
        for _ in range(2):
            fences = await self._fences(task_id)
            if any(other > fence for other in fences):
                if fence in fences:
                    await self._remove(_name(task_id, fence))
                raise LeaseLost(task_id, fence)
            if fence not in fences:
                await self._take(task_id, fence, max(fences, default=None))
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

    async def _take(self, task_id: str, fence: int, older: int | None) -> None:
        own = self._path(_name(task_id, fence))
        if older is not None:
            await self._remote.rename(self._path(_name(task_id, older)), own)
            await self._put_back_unpublished(own)
            return
        new = own + ".new"
        await self._remote.remove_tree(new)
        for folder in (new, *(posixpath.join(new, name) for name in ("package", "previous", "parts"))):
            await self._remote.make_folder(folder)
        await self._remote.rename(new, own)

    async def _remove(self, name: str) -> None:
        """Take a staging folder away from whoever uses it, put back what it had set aside, and remove it."""
        gone = name.removesuffix(".gone") + ".gone"
        await self._clear(self._path(gone))
        if gone != name:
            try:
                await self._remote.rename(self._path(name), self._path(gone))
            except Missing:
                return
            await self._clear(self._path(gone))

    async def _clear(self, gone: str) -> None:
        """`package` goes before `previous`: as long as it is there, a repeated call knows that nothing was published."""
        if await self._put_back_unpublished(gone):
            await self._remote.remove_tree(posixpath.join(gone, "package"))
        await self._remote.remove_tree(gone)

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

    async def _staged(self) -> dict[str, asyncssh.SFTPAttrs]:
        try:
            return await self._remote.entries(posixpath.join(self._base, STAGING))
        except Missing:
            return {}

    async def _fences(self, task_id: str) -> list[int]:
        found = (_FOLDER.fullmatch(name) for name in await self._staged())
        return [int(each["fence"]) for each in found if each and each["task"] == task_id and not each["state"]]

    def _path(self, name: str) -> str:
        return posixpath.join(self._base, STAGING, name)

    # --- publishing ---------------------------------------------------------------------------------------------

    async def publish(self, task_id: str, fence: int, job_id: str, between: Callable[[], None]) -> None:
        _check_relative(job_id, one_segment=True)
        own = self._path(_name(task_id, fence))
        final, aside = posixpath.join(self._base, job_id), posixpath.join(own, "previous", job_id)
        if await self.is_published(task_id, fence):
            return
        if await self._remote.exists(final):
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

    async def stage(self, task_id: str, fence: int, files: Sequence[LocalFile], on_bytes: OnBytes) -> Staged:
        """On a full disk nothing stays staged: of several jobs that wait for room, one at least shall find it."""
        for local in files:
            _check_relative(local.file.target)
        try:
            async with self._full_disk_told():
                return await self._stage(self._path(_name(task_id, fence)), files, on_bytes)
        except DestinationParked as failure:
            if failure.code == DISK_FULL:
                with suppress(Unavailable, DestinationParked):
                    await self._remove(_name(task_id, fence))
            raise

    async def _stage(self, own: str, files: Sequence[LocalFile], on_bytes: OnBytes) -> Staged:
        package = posixpath.join(own, "package")
        missing = await self._keep_whole(own, files, on_bytes)
        parts = await self._keep_parts(own, missing)
        for folder in _folders(local.file.target for local in files):
            # Never with its parents: a stale attempt must not bring its taken folder back to life.
            await self._remote.make_folder(posixpath.join(package, folder))
        continued_bytes = await self._upload(own, parts, on_bytes)
        await self._verify(package, files)
        whole_bytes = sum(local.file.size for local in files) - sum(local.file.size for local in missing)
        return Staged(len(files) - len(missing), whole_bytes + continued_bytes)

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

    async def _keep_whole(self, own: str, files: Sequence[LocalFile], on_bytes: OnBytes) -> list[LocalFile]:
        """Remove from the staged package what does not belong there; the files that are still to be uploaded."""
        package = posixpath.join(own, "package")
        wanted = {local.file.target: local.file for local in files}
        tree = await self._remote.tree(package)
        staged = await self._read_manifest(own)
        whole = {
            target
            for target, size in tree.files.items()
            if target in wanted and wanted[target].size == size and staged.get(target) == wanted[target].sha256
        }
        await self._remote.remove_files(posixpath.join(package, target) for target in tree.files if target not in whole)
        needed = set(_folders(wanted))
        await self._remote.remove_folders(posixpath.join(package, path) for path in tree.folders if path not in needed)
        await self._write_manifest(own, {target: file.sha256 for target, file in wanted.items()}, staged)
        for target in whole:
            on_bytes(wanted[target].size)
        return [local for local in files if local.file.target not in whole]

    async def _keep_parts(self, own: str, missing: Sequence[LocalFile]) -> list[_Part]:
        """The part of each missing file, with what has arrived of it; any other part goes. Which of several files with the
        same content takes which of their parts makes no difference."""
        folder, copies = posixpath.join(own, "parts"), Counter[str]()
        there = {name: attrs.size or 0 for name, attrs in (await self._remote.entries(folder)).items()}
        parts = []
        for local in missing:
            sha256 = local.file.sha256
            name = f"{sha256}-{copies[sha256]}" if copies[sha256] else sha256
            copies[sha256] += 1
            parts.append(_Part(local, name, there.pop(name, None)))
        await self._remote.remove_files(posixpath.join(folder, name) for name in there)
        return parts

    async def _upload(self, own: str, parts: Sequence[_Part], on_bytes: OnBytes) -> int:
        """Largest first, so that no channel is left alone with a large one at the end. Returns how many bytes of parts were
        not sent again."""
        free = await self._open_channels(len(parts)) * FILES_PER_CHANNEL
        continued_bytes = 0

        async def upload(part: _Part) -> None:
            nonlocal continued_bytes
            remote = free.pop()
            try:
                kept_bytes = await upload_file(remote, own, part.name, part.bytes, part.local, on_bytes)
                continued_bytes += kept_bytes
            finally:
                free.append(remote)

        await at_most(len(free), (upload(part) for part in sorted(parts, key=lambda part: -part.local.file.size)))
        return continued_bytes

    async def _open_channels(self, files: int) -> list[Remote]:
        """At most as many as there are files; a server that refuses some is used with the rest."""
        wanted = min(self._channels, files) - 1
        opened = await asyncio.gather(
            *(_open_channel(self._connection, self._remote.address, self._remote.timeout_seconds) for _ in range(wanted)),
            return_exceptions=True,
        )
        return [self._remote, *(each for each in opened if isinstance(each, Remote))]

    async def _verify(self, package: str, files: Sequence[LocalFile]) -> None:
        tree = await self._remote.tree(package)
        wanted = {local.file.target: local.file.size for local in files}
        differing = sorted(path for path in wanted.keys() | tree.files.keys() if wanted.get(path) != tree.files.get(path))
        if differing:
            raise Unavailable(
                "staged_differs",
                f"{self._remote.address}: {differing[0]} (of {len(differing)} such) was staged with "
                f"{tree.files.get(differing[0])} bytes, not {wanted.get(differing[0])}",
                "It is uploaded again.",
            )

    async def _read_manifest(self, own: str) -> dict[str, str]:
        """Empty where there is none, or one that cannot be read: then nothing staged is kept."""
        try:
            text = await self._remote.ask("read the staging manifest", self._read(posixpath.join(own, "manifest.json")))
            staged = json.loads(text)
        except (Missing, ValueError):
            return {}
        return staged if isinstance(staged, dict) else {}

    async def _write_manifest(self, own: str, wanted: dict[str, str], staged: dict[str, str]) -> None:
        """Written after what differs from it was removed and before anything new arrives."""
        if wanted == staged:
            return
        path, part = posixpath.join(own, "manifest.json"), posixpath.join(own, "parts", "manifest")
        await self._remote.remove_files([path])
        await self._remote.ask("write the staging manifest", self._write(part, json.dumps(wanted).encode()))
        await self._remote.rename(part, path)

    async def _read(self, path: str) -> bytes:
        async with self._remote.channel.open(path, "rb") as file:
            return await file.read()

    async def _write(self, path: str, content: bytes) -> None:
        async with self._remote.channel.open(path, "wb") as file:
            await file.write(content)


async def _open_channel(connection: asyncssh.SSHClientConnection, address: str, timeout_seconds: float) -> Remote:
    try:
        channel = await asyncio.wait_for(connection.start_sftp_client(), timeout_seconds)
    except (asyncssh.Error, OSError) as error:
        raise Unavailable(
            "sftp_unreachable",
            f"{address} let the login in but offered no SFTP ({type(error).__name__})",
            "It is tried again; ask the partner whether SFTP is allowed for this login.",
        ) from None
    return Remote(channel, address, timeout_seconds)


def _is_ours(name: str) -> bool:
    return name.startswith(PROBE) or _FOLDER.fullmatch(name) is not None


def _name(task_id: str, fence: int) -> str:
    return f"{task_id}-{fence}"


def _folders(targets: Iterable[str]) -> list[str]:
    """Every folder the targets are in, from the top down."""
    folders: set[str] = set()
    for target in targets:
        while target := posixpath.dirname(target):
            folders.add(target)
    return sorted(folders, key=lambda path: (path.count("/"), path))


def _check_relative(path: str, one_segment: bool = False) -> None:
    """The domain has refused such paths already; this is the last gate before the partner's disk."""
    segments = path.split("/")
    if any(segment in ("", ".", "..", STAGING) for segment in segments) or "\0" in path or (one_segment and len(segments) > 1):
        raise Rejected(
            "path_refused", f"{path!r} is no place for a delivery", "Correct the job's files or id, then submit again."
        )
