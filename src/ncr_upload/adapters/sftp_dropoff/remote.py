"""Asking an SFTP server: every request with a time-out, every failure in our own words."""

from __future__ import annotations

import asyncio
import math
import posixpath
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import asyncssh
from asyncssh import FILEXFER_TYPE_DIRECTORY

from ncr_upload.adapters.sftp_dropoff.wire import requests_of
from ncr_upload.domain.errors import DeliveryError, DestinationParked, Unavailable
from ncr_upload.domain.text import QUOTE, bound_line

MAX_REQUESTS = 128
MAX_READ_BYTES = 64 * 1024 * 1024
FIRST_BYTES = 16 * 1024
DISK_FULL = "disk_full"
FULL = re.compile(r"no space|disk full|disk quota|quota exceeded|not enough space", re.IGNORECASE)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Act:
    """What was asked of the server: its name in a message, the kind of operation, and the paths concerned."""

    told: str
    verb: str
    paths: tuple[str, ...] = ()

    @classmethod
    def of(cls, verb: str, path: str, to: str | None = None) -> Act:
        return cls(f"{verb} {path}" + (f" to {to}" if to is not None else ""), verb, (path,) if to is None else (path, to))

    def __str__(self) -> str:
        return escaped(self.told)


def escaped(text: str) -> str:
    """Return `text` as it may be stored and printed: bytes that are not UTF-8, and control characters, become escapes."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else _escape(each) for each in text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # one byte, as `surrogateescape` keeps it
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


class Missing(Unavailable):
    """A path is not there. Where that is expected it is caught; elsewhere the attempt is repeated."""


class Failed(Unavailable):
    """The server said no without saying why (SFTP version 3 has one code for most things)."""

    act: Act | None = None


class Denied(DestinationParked):
    """The server refused one operation. Whether that concerns the destination or one job, `scratch` finds out."""

    act: Act | None = None

    def saying(self, message: str) -> Denied:
        """Return the same failure in other words."""
        told = Denied(self.code, message, self.next_step)
        told.act = self.act
        return told


class Seen(NamedTuple):
    """What a server shows of a file. `mtime` is in seconds by its own clock; 0 where it does not tell."""

    size: int
    mtime: int


@dataclass(frozen=True, slots=True)
class Tree:
    """What is below a folder, by relative path: files, and folders from the top down."""

    files: dict[str, Seen]
    folders: list[str]


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes and number of files that still fit on a disk."""

    size: int
    files: int


class Remote:
    """One SFTP channel. Raises `Missing`, `Failed`, `DestinationParked`, or `Unavailable` when the connection is gone."""

    def __init__(self, channel: asyncssh.SFTPClient, address: str, timeout_seconds: float, *, fast: bool = True) -> None:
        self.channel = channel
        self.wire = requests_of(channel, timeout_seconds, fast=fast)
        self.address = address
        self.timeout_seconds = timeout_seconds
        self.round_trip_seconds = math.inf
        self._closing: set[asyncio.Task[Any]] = set()

    async def ask(self, doing: str | Act, request: Coroutine[Any, Any, T]) -> T:
        """The request must end at once when it is cancelled: one that closes a handle then would wait for a silent server."""

        async def within() -> T:
            async with asyncio.timeout(self.timeout_seconds):
                return await request

        return await self._answered(doing, within())

    async def _answered(self, doing: str | Act, request: Coroutine[Any, Any, T]) -> T:
        """What has a time-out already."""
        asked = time.monotonic()
        try:
            answer = await request
            self.round_trip_seconds = min(self.round_trip_seconds, time.monotonic() - asked)
            return answer
        except (asyncssh.Error, OSError) as error:
            raise self.class_of(error, doing) from None

    def class_of(self, error: BaseException, doing: str | Act) -> DeliveryError:
        """The one table from a server's answers to our errors."""
        failure = self._class_of(error, doing)
        if isinstance(failure, Failed | Denied):
            failure.act = doing if isinstance(doing, Act) else Act(doing, doing.partition(" ")[0])
        return failure

    def _class_of(self, error: BaseException, doing: str | Act) -> DeliveryError:
        said = bound_line(re.sub(r"[^ -~]+", " ", str(error)), QUOTE)
        doing = str(doing) if isinstance(doing, Act) else escaped(doing)
        what = f"{self.address} failed to {doing}"
        match error:
            case asyncssh.SFTPConnectionLost() | asyncssh.SFTPNoConnection():
                pass
            case asyncssh.SFTPNoSuchFile() | asyncssh.SFTPNoSuchPath():
                return Missing("sftp_missing", f"{what}: no such file or folder", "It is tried again.")
            case asyncssh.SFTPPermissionDenied() | asyncssh.SFTPWriteProtect():
                return Denied(
                    "permission_denied", f"{what}: permission denied", "Ask the partner to let the login write there."
                )
            case asyncssh.SFTPError() if isinstance(
                error, asyncssh.SFTPNoSpaceOnFilesystem | asyncssh.SFTPQuotaExceeded
            ) or FULL.search(said):
                return disk_full(what, said)
            case asyncssh.SFTPError():
                return Failed(
                    "sftp_failure",
                    f"{what}: {said or 'no reason was given'}",
                    "It is tried again; if it stays so, ask the partner.",
                )
        cause = f"no answer for {self.timeout_seconds:g} s" if isinstance(error, TimeoutError) else said or type(error).__name__
        return Unavailable(
            "sftp_unreachable",
            f"lost {self.address} while it was to {doing}: {cause}",
            "It is tried again; see whether the server is up.",
        )

    async def exists(self, path: str) -> bool:
        try:
            await self.size(path)
        except Missing:
            return False
        return True

    async def size(self, path: str) -> int:
        return (await self.stat(path)).size or 0

    async def stat(self, path: str) -> asyncssh.SFTPAttrs:
        """Return what the server shows of it; a link is not followed."""
        return await self.ask(Act.of("look at", path), self.channel.lstat(path))

    async def entries(self, path: str) -> dict[str, asyncssh.SFTPAttrs]:
        """Return what is in a folder, by name. Bytes that are not UTF-8 are kept by `surrogateescape`. A name that no path can
        lead to (it is empty, or holds '/' or NUL) is left out."""
        found = await self.ask(Act.of("list", path), self._read_folder(path))
        return {name: attrs for name, attrs in found if name not in ("", ".", "..") and not {"/", "\0"} & set(name)}

    async def _read_folder(self, path: str) -> list[tuple[str, asyncssh.SFTPAttrs]]:
        """As asyncssh reads it, but that nobody waits for the handle to be closed."""
        handler = self.channel._handler
        handle = await handler.opendir(self.channel.compose_path(path))
        found = []
        at_end = False
        try:
            while not at_end:
                names, at_end = await handler.readdir(handle)
                found += [(self._text(entry.filename), entry.attrs) for entry in names]
        except asyncssh.SFTPEOFError:
            pass
        finally:
            self._close_later(handler.close(handle))
        return found

    def _close_later(self, closing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(closing)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _text(self, name: bytes | str) -> str:
        return name if isinstance(name, str) else str(self.channel.decode(name))

    async def rename(self, old: str, new: str) -> None:
        """Fails when `new` exists: the plain rename of SFTP version 3, never the POSIX one."""
        compose = self.channel.compose_path
        await self._answered(Act.of("rename", old, new), self.wire.rename(compose(old), compose(new)))

    async def replace(self, old: str, new: str) -> None:
        """Rename a file over another that may be there: at once where the server has `posix-rename`."""
        if "posix-rename" in self.extensions():
            with suppress(Failed, Denied):  # some offer it, and refuse it all the same
                await self.ask(Act.of("rename", old, new), self.channel.posix_rename(old, new))
                return
        with suppress(Denied):  # it need not be there
            await self._remove(new)
        await self.rename(old, new)

    async def open(self, doing: str | Act, path: str, flags: int) -> bytes:
        """The handle."""
        return await self._answered(doing, self.wire.open(self.channel.compose_path(path), flags))

    async def close(self, doing: str | Act, handle: bytes) -> None:
        await self._answered(doing, self.wire.close(handle))

    async def read_at(self, doing: str | Act, handle: bytes, offset: int, count: int) -> bytes:
        """Nothing at the end of the file."""
        return await self.ask(doing, self.wire.read(handle, offset, count))

    async def read(self, path: str, most: int = MAX_READ_BYTES) -> bytes:
        """Return its content, or the first `most` bytes of it."""

        async def read() -> bytes:
            file = await self.channel.open(path, "rb")
            try:
                size = (await file.stat()).size or 0
                return await file.read(min(size, most))
            finally:
                self._close_later(file.close())

        return await self.ask(Act.of("read", path), read())

    async def write(self, path: str, content: bytes) -> None:
        async def write() -> None:
            file = await self.channel.open(path, "wb")
            await file.write(content[:FIRST_BYTES])  # alone: asyncssh leaves all but one of several failures unheard
            if len(content) > FIRST_BYTES:
                await file.write(content[FIRST_BYTES:])
            await file.close()  # on a failure the end of the session closes it

        await self.ask(Act.of("write", path), write())

    async def set_time(self, path: str, mtime: int) -> None:
        await self._answered(Act.of("set the time of", path), self.wire.set_time(self.channel.compose_path(path), mtime))

    async def make_folder(self, path: str) -> None:
        """Make it in its parent, which must be there; it may exist."""
        try:
            await self.ask(Act.of("make", path), self.channel.mkdir(path))
        except (Failed, DestinationParked):
            if not await self.exists(path):  # servers have no code of its own for what exists
                raise

    async def make_folders(self, path: str) -> None:
        """Make it with its parents."""
        if path not in ("", "/", ".") and not await self.exists(path):
            await self.make_folders(posixpath.dirname(path))
            await self.make_folder(path)

    async def tree(self, top: str, expected: Iterable[str] = (), *, skip_denied: bool = False) -> Tree:
        """Links count as files and are not followed. A missing folder is an empty one; with `skip_denied`, so is one
        below the top that may not be listed. Folders that are `expected` are listed at once with the top, not after their
        parents."""
        tree = Tree({}, [])
        waiting = {"", *expected}
        seen = set(waiting)
        while waiting:
            waiting = await self._look_into(top, waiting, tree, skip_denied) - seen
            seen |= waiting
        tree.folders.sort(key=lambda path: path.count("/"))
        return tree

    async def _look_into(self, top: str, folders: Iterable[str], tree: Tree, skip_denied: bool) -> set[str]:
        """Add what is in these folders to the tree; the folders that are in them."""
        found: set[str] = set()

        async def look(folder: str) -> None:
            with suppress(Missing, *((Denied,) if skip_denied and folder else ())):
                for name, attrs in (await self.entries(posixpath.join(top, folder) if folder else top)).items():
                    path = posixpath.join(folder, name)
                    if attrs.type == FILEXFER_TYPE_DIRECTORY:
                        found.add(path)
                    else:
                        tree.files[path] = Seen(attrs.size or 0, int(attrs.mtime or 0))

        await at_most(MAX_REQUESTS, (look(folder) for folder in folders))
        tree.folders.extend(found)
        return found

    async def remove_files(self, paths: Iterable[str]) -> None:
        """They may be missing."""
        await at_most(MAX_REQUESTS, (self._remove(path) for path in paths))

    async def put_away(self, paths: Iterable[str], own: str) -> None:
        """Remove files of a staging folder, `own`. Where nothing may be removed they get other names in its `spare`."""

        async def put(path: str) -> None:
            try:
                await self._remove(path)
            except Denied:
                spare = posixpath.join(own, "spare")
                await self.make_folder(spare)
                with suppress(Missing):
                    await self.rename(path, posixpath.join(spare, secrets.token_hex(8)))

        await at_most(MAX_REQUESTS, (put(path) for path in paths))

    async def remove_folders(self, paths: Iterable[str]) -> None:
        """Remove folders that are empty but for each other."""
        levels: defaultdict[int, list[str]] = defaultdict(list)
        for path in paths:
            levels[path.count("/")].append(path)
        for _, level in sorted(levels.items(), reverse=True):
            await at_most(MAX_REQUESTS, (self._remove_folder(path) for path in level))

    async def _remove_folder(self, path: str) -> None:
        with suppress(Missing):
            await self.ask(Act.of("remove", path), self.channel.rmdir(path))

    async def remove_tree(self, top: str, expected: Iterable[str] = ()) -> None:
        """Remove a folder and all below it; it may be missing. A file that was being made there meanwhile is found again."""
        for last in (False, False, True):
            tree = await self.tree(top, expected)
            await self.remove_files(posixpath.join(top, path) for path in tree.files)
            try:
                await self.remove_folders([top, *(posixpath.join(top, path) for path in tree.folders)])
            except Failed:
                if last:
                    raise
            else:
                return

    async def _remove(self, path: str) -> None:
        try:
            await self.ask(Act.of("remove", path), self.channel.remove(path))
        except Missing:
            return

    def extensions(self) -> tuple[str, ...]:
        """Those the server offers of what asyncssh knows."""
        handler = self.channel._handler  # asyncssh keeps them to itself
        known = ("posix_rename", "statvfs", "hardlink", "fsync", "limits", "copy_data")
        return tuple(name.replace("_", "-") for name in known if getattr(handler, f"_supports_{name}", False))

    async def free_room(self, path: str) -> Room | None:
        """What is free where `path` is; None when the server does not say."""
        try:
            room = await self.ask(Act.of("tell the free space of", path), self.channel.statvfs(path))
        except (Missing, Failed, DestinationParked):
            return None
        counted = bool(room.files)  # some file systems have no limit, and say 0 of 0
        return Room((room.bavail or 0) * (room.frsize or 0), room.favail or 0 if counted else 1)


def disk_full(what: str, said: str) -> DestinationParked:
    return DestinationParked(
        DISK_FULL, f"{what}: its disk or quota is full ({said})", "Ask the partner to make room; the jobs wait meanwhile."
    )


def start(group: asyncio.TaskGroup, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """The work as a task of the group. One that is being stopped takes no more, and raises `RuntimeError`: the work is closed
    then, or Python would warn of a coroutine that nobody awaited."""
    try:
        return group.create_task(work)
    except RuntimeError:
        work.close()
        raise


async def at_most(count: int, jobs: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run the jobs, `count` at a time, each made when its turn comes. The first failure stops the rest and is raised."""
    waiting = iter(jobs)

    async def work(job: Coroutine[Any, Any, None]) -> None:
        await job
        for following in waiting:
            await following

    try:
        async with asyncio.TaskGroup() as group:
            for job in islice(waiting, count):
                group.create_task(work(job))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
