"""Files of the previous delivery that need not be sent again, because the server can give them a second name."""

from __future__ import annotations

import asyncio
import posixpath
from collections.abc import Container

import asyncssh
from asyncssh import FILEXFER_TYPE_SYMLINK

from ncr_upload.adapters.sftp_dropoff.remote import MAX_REQUESTS, Act, Denied, Missing, Remote, Seen, Tree, at_most
from ncr_upload.application.ports import Previous
from ncr_upload.domain.errors import DestinationParked, Unavailable
from ncr_upload.domain.packages import PackageFile

EXTENSION = "hardlink"


class Links:
    """A file is known by what was written down when it was staged: its hash, and the size and time that the server showed for
    it. It is linked only while the server still shows that size and time: whoever writes into a file changes its time."""

    def __init__(self, remote: Remote, base: str, previous: Previous | None) -> None:
        self._remote = remote
        self._known = previous.files if previous is not None and EXTENSION in remote.extensions() else ()
        self._folder = posixpath.join(base, previous.job_id) if previous is not None else ""
        self._sources: dict[tuple[str, int], tuple[str, int]] = {}
        self._first = asyncio.Lock()
        self._trusted: bool | None = None
        self._shown: dict[str, tuple[int, int]] = {}
        self._copies: set[str] = set()

    async def look(self) -> None:
        """See what is still there as it was delivered."""
        if not self._known:
            return
        folders = {posixpath.dirname(file.target) for file in self._known} - {""}
        try:
            there = (await self._remote.tree(self._folder, folders, skip_denied=True)).files
        except Denied:  # then nothing of it can be linked
            return
        for file in self._known:
            if there.get(file.target) == Seen(file.size, file.mtime):
                path = posixpath.join(self._folder, file.target)
                self._sources[file.sha256, file.size] = (path, file.mtime)
                self._shown[path] = (file.size, file.mtime)

    def find(self, file: PackageFile) -> tuple[str, int] | None:
        """Where the same content is, and since when."""
        if self._trusted is False:
            return None
        return self._sources.get((file.sha256, file.size))

    def has_size(self, size: int) -> bool:
        """Whether a file of so many bytes is there, so that another one may be the same."""
        return any(known == size for _, known in self._sources)

    async def link(self, source: str, to: str) -> bool:
        """Return whether the file has its second name, and that was seen. The first link goes alone: a server whose links are
        not there, though it says so, gets no more of them."""
        async with self._first:
            if self._trusted is None:
                linked = await self._link(source, to)
                self._trusted = self._trusted is None
                return linked
        return self._trusted and await self._link(source, to)

    def is_copy(self, to: str) -> bool:
        """Return whether the server copied the file instead: it has a time of its own, and nobody else writes into it."""
        return to in self._copies

    async def _link(self, source: str, to: str) -> bool:
        """False where links are forbidden, the file is gone or has all the names it may have, or its link is not as it is."""
        try:
            await self._remote.ask(Act.of("link", to), self._remote.channel.link(source, to))
            size, mtime = self._shown.get(source, (-1, 0))
            found = await see_link(self._remote, to, size)
            if found is not None and found.mtime == mtime:
                return True
            if found is not None and (await self._remote.stat(source)).mtime == mtime:
                self._copies.add(to)
                return True
            self._trusted = self._trusted if found is not None else False
            await self._remote.remove_files([to])
        except Unavailable as failure:
            if failure.code == "sftp_unreachable":
                raise
        except DestinationParked:
            pass
        return False


async def see_link(remote: Remote, path: str, size: int) -> asyncssh.SFTPAttrs | None:
    """Return what is there under the name that a server says it has linked; None unless it is a file of that size."""
    try:
        found = await remote.stat(path)
    except Missing:
        return None
    return found if found.size == size and found.type != FILEXFER_TYPE_SYMLINK else None


async def settle_times(remote: Remote, package: str, tree: Tree, linked: Container[str]) -> dict[str, int]:
    """The time of each file, for the next delivery to know it by. What is written into one after the publish must get another
    time: so the files of the last second are set back by one. Links are not touched: their time is older than the publish
    before. A file whose time cannot be told for certain is left out."""
    if EXTENSION not in remote.extensions():
        return {}
    times = {path: seen.mtime for path, seen in tree.files.items() if seen.mtime}
    newest = max(times.values(), default=0)

    async def set_back(path: str) -> None:
        try:
            await remote.set_time(posixpath.join(package, path), newest - 1)
            times[path] = newest - 1
        except (Unavailable, DestinationParked) as failure:
            if failure.code == "sftp_unreachable":
                raise
            del times[path]

    await at_most(MAX_REQUESTS, (set_back(path) for path, mtime in times.items() if mtime == newest and path not in linked))
    return times
