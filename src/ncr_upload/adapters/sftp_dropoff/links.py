"""Files of the previous delivery that need not be sent again, because the server can give them a second name."""

from __future__ import annotations

import posixpath
from collections.abc import Container

from ncr_upload.adapters.sftp_dropoff.remote import MAX_REQUESTS, Remote, Seen, Tree, at_most
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

    async def look(self) -> None:
        """See what is still there as it was delivered."""
        if not self._known:
            return
        folders = {posixpath.dirname(file.target) for file in self._known} - {""}
        there = (await self._remote.tree(self._folder, folders)).files
        for file in self._known:
            if there.get(file.target) == Seen(file.size, file.mtime):
                path = posixpath.join(self._folder, file.target)
                self._sources[file.sha256, file.size] = (path, file.mtime)

    def find(self, file: PackageFile) -> tuple[str, int] | None:
        """Where the same content is, and since when."""
        return self._sources.get((file.sha256, file.size))

    def has_size(self, size: int) -> bool:
        """Whether a file of so many bytes is there, so that another one may be the same."""
        return any(known == size for _, known in self._sources)

    async def link(self, source: str, to: str) -> bool:
        """False where the server will not: links are forbidden there, the file is gone, or has as many names as it may."""
        try:
            await self._remote.ask(f"link {to}", self._remote.channel.link(source, to))
        except Unavailable as failure:
            if failure.code == "sftp_unreachable":
                raise
            return False
        except DestinationParked:
            return False
        return True


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
