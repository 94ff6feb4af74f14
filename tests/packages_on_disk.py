"""Package files on disk, as a finished download leaves them."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from ncr_upload.application.arrivals import Arrival
from ncr_upload.application.ports import LocalFile
from ncr_upload.domain.packages import PackageFile


def write_package(folder: Path, contents: dict[str, bytes]) -> list[LocalFile]:
    """One file per target, in the order given."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (target, content) in enumerate(contents.items()):
        path = folder / f"{number}"
        path.write_bytes(content)
        sha256, crc32 = hashlib.sha256(content).hexdigest(), zlib.crc32(content)
        files.append(LocalFile(PackageFile(f"key/{target}", target, len(content), sha256, crc32, ""), path))
    return files


async def arriving(files: Iterable[LocalFile]) -> AsyncIterator[Arrival]:
    """All of them at once and whole, as a stage takes them."""
    for local in files:
        yield Arrival.of(local)
