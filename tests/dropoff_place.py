"""A destination on a real SFTP server, seen from both sides and counted in bytes; and files that come to it as they arrive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

from fault_proxy import FaultProxy, fault_proxy
from ncr_upload.adapters.sftp_dropoff import SftpDropoff
from ncr_upload.adapters.sftp_dropoff.dropoff import SftpSession
from ncr_upload.application.arrivals import Arrival
from ncr_upload.application.ports import LocalFile, Previous, Staged
from ncr_upload.domain.packages import DeliveredFile, PackageFile
from packages_on_disk import arriving
from servers import SftpServer

STAGING = ".ncr-staging"


@dataclass
class DropoffPlace:
    """A base folder of its own on a server, behind a counting proxy; and what the ledger would have of the last delivery."""

    server: SftpServer
    proxy: FaultProxy
    folder: Path
    base: str
    previous: Previous | None = None

    def dropoff(self, **settings: Any) -> SftpDropoff:
        usual = {"timeout_seconds": 20, "connections": 3, "channels": 2}
        return SftpDropoff(self.server.with_login(port=self.proxy.port), self.base, **usual | settings)

    async def deliver(
        self, files: list[LocalFile] | AsyncIterator[Arrival], fence: int = 1, task: str = "task", **settings: Any
    ) -> tuple[Staged, int]:
        """An attempt that publishes; also the bytes it sent."""
        before, told = self.sent(), list[int]()
        coming = arriving(files) if isinstance(files, list) else files
        async with self.dropoff(**settings).session() as session:
            await session.adopt(task, fence)
            staged = await session.stage(task, fence, coming, told.append, self.previous)
            await session.publish(task, fence, "job-1", lambda: None)
            await session.discard(task)
        if isinstance(files, list):
            self.remember(files, staged)
        assert sum(told) == sum(len(content) for content in self.delivered().values())
        return staged, self.sent() - before

    def begin(self, session: SftpSession, files: AsyncIterator[Arrival], fence: int = 1) -> asyncio.Task[Staged]:
        """Stage them beside what the test does meanwhile."""
        return asyncio.create_task(session.stage("task", fence, files, lambda _: None, self.previous))

    def remember(self, files: list[LocalFile], staged: Staged) -> None:
        times = staged.mtimes
        known = [local.file for local in files if local.file.target in times]
        self.previous = Previous(
            "job-1", [DeliveredFile(each.target, each.size, each.sha256, times[each.target]) for each in known]
        )

    def sent(self) -> int:
        return self.proxy.count()["up"]

    async def until_sent(self, count: int) -> None:
        """Until so many bytes have gone out in all."""
        async with asyncio.timeout(30):
            while self.sent() < count:  # noqa: ASYNC110 - it is the wire that is watched
                await asyncio.sleep(0.01)

    async def at_rest(self) -> None:
        """The server may still write what it had received when the connection was cut."""
        sizes: list[int] = []
        deadline = time.monotonic() + 20
        while len(sizes) < 3 or len(set(sizes[-3:])) > 1:
            assert time.monotonic() < deadline
            sizes.append(sum(part.stat().st_size for part in self.parts()))
            await asyncio.sleep(0.2)

    def parts(self) -> list[Path]:
        """Of files; a manifest may have been cut off there too."""
        return sorted(path for path in self.folder.glob(f"{STAGING}/task-*/parts/*") if not path.name.startswith("manifest-"))

    def staged(self, fence: int) -> dict[str, bytes]:
        return read_tree(self.folder / STAGING / f"task-{fence}" / "package")

    def delivered(self) -> dict[str, bytes]:
        return read_tree(self.folder / "job-1")


def read_tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def place_on(server: SftpServer, name: str) -> Iterator[DropoffPlace]:
    """The server is well again afterwards."""
    assert server.login.host is not None
    folder = server.folder / name
    folder.mkdir()
    try:
        with fault_proxy((server.login.host, server.login.port)) as proxy:
            yield DropoffPlace(server, proxy, folder, f"{server.base_dir.rstrip('/')}/{name}")
    finally:
        if server.control:
            server.fault("")


class Download:
    """A file that comes as the test lets it. `content` is what it will have; `size` is what is said of it before."""

    def __init__(self, folder: Path, target: str, content: bytes, size: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._begun = 0
        self.content = content
        self.arrival = Arrival(target, len(content) if size is None else size, folder / "whole")
        self.begin()

    def begin(self) -> None:
        """From nothing, in a file of its own."""
        self._begun += 1
        self.path = self._folder / f".{self._begun}.part"
        self.path.touch()
        self.arrival.begin(self.path)

    def grow(self, size: int) -> None:
        """So much of its beginning is here."""
        with self.path.open("r+b") as file:
            file.seek(self.arrival.reached)
            file.write(self.content[self.arrival.reached : size])
        self.arrival.reach(size)

    def damage(self, offset: int) -> None:
        """Other bytes come over those that are here."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(b"damaged")

    def finish(self, content: bytes | None = None) -> LocalFile:
        """It is whole; `content`, if given, is what it has then."""
        if content is None:
            self.grow(len(self.content))
        else:
            self.content = content
            self.path.write_bytes(content)
        self.path.replace(self.arrival.place)
        target, found = self.arrival.target, self.content
        file = PackageFile(f"key/{target}", target, len(found), sha256(found).hexdigest(), crc32(found), "")
        local = LocalFile(file, self.arrival.place)
        self.arrival.become(local)
        return local


async def coming(*downloads: Download) -> AsyncIterator[Arrival]:
    """At once; ends when all are whole."""
    for download in downloads:
        yield download.arrival
    for download in downloads:
        await download.arrival.whole()
