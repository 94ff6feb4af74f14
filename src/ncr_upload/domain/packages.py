"""The files of a package on their way from object key to delivered path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file the studio lists for a job. `key` is its object key; `timestamp` is 'YYYY-MM-DD HH:MM:SS', studio time."""

    key: str
    timestamp: str


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """Where one object goes. `target` is relative to the delivery's folder and starts with the SKU: ``SKU1/SKU1.glb``."""

    key: str
    target: str


@dataclass(frozen=True, slots=True)
class PackageFile:
    """A downloaded file of the package. `size` in bytes; `sha256` lower-case hex; `crc32` as zip has it. `mtime` is when it was
    written at the destination, in seconds by its clock; None until it is staged, or where that cannot be told for certain."""

    key: str
    target: str
    size: int
    sha256: str
    crc32: int
    etag: str
    mtime: int | None = None


@dataclass(frozen=True, slots=True)
class DeliveredFile:
    """A file as it was delivered, and as the destination showed it then."""

    target: str
    size: int
    sha256: str
    mtime: int


@dataclass(frozen=True, slots=True)
class PackageSize:
    """How many files a package has, and how many bytes they are together."""

    files: int
    bytes: int


def measure(files: Sequence[PackageFile]) -> PackageSize:
    return PackageSize(len(files), sum(file.size for file in files))
