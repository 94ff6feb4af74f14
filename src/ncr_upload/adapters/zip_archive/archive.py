"""The zip the validator judges.

Reproducible: entries in the order given, the first date a zip can hold, fixed permissions, no extra fields. Only the packing of
deflated entries depends on the host's zlib. Entries of compressed types are stored, with size and CRC in front, so each waits
until its file is whole; the rest are deflated, with a data descriptor behind, while their files arrive. So are compressed ones
of LARGE_BYTES or more, in deflate's stored blocks.
Zip64 is used from the entry on that could need it, which sizes alone decide. The records are made in `records.py`.
"""

from __future__ import annotations

import stat
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from math import inf
from pathlib import PurePosixPath
from typing import Protocol

from isal import isal_zlib

from ncr_upload.adapters.zip_archive.records import DEFLATED, STORED, Record, StoredBlocks, directory
from ncr_upload.application.arrivals import Arrival
from ncr_upload.domain.errors import PackageChanged
from ncr_upload.domain.packages import PackageFile

CHUNK_BYTES = 1024 * 1024
GATHERED_BYTES = 256 * 1024
HELD_SECONDS = 0.05
"""What is smaller is not worth a way of its own to the validator, unless the next file is slow to come."""

LARGE_BYTES = 32 * 1024 * 1024
DEFLATE_LEVEL = 1  # a higher one is slower than the wire on one core
ZIP32_MAX_BYTES = 0xFFFF_FFFF - 64 * 1024 * 1024  # room for headers and the directory
ZIP32_MAX_ENTRIES = 0xFFFF
MODE = stat.S_IFREG | 0o644
COMPRESSED_TYPES = frozenset(
    {".avif", ".exr", ".glb", ".gif", ".heic", ".jpeg", ".jpg", ".ktx2", ".png", ".usdz", ".webp"}
    | {".7z", ".br", ".bz2", ".drc", ".gz", ".mp4", ".webm", ".xz", ".zip", ".zst"}
)


class Deflate(Protocol):
    """Makes deflated data (RFC 1951) of chunks."""

    def compress(self, chunk: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


class ZipArchiver:
    """Holds a few chunks of CHUNK_BYTES in memory."""

    def stream(self, files: Sequence[Arrival]) -> Zip:
        return Zip(files)


class _Changed(Exception):
    """A file has other bytes than it had when it arrived."""


class ZipStopped(Exception):
    """End an iteration over a zip after `Zip.stop`."""


class Zip:
    """One zip, read and compressed in the thread that iterates over it."""

    def __init__(self, files: Sequence[Arrival]) -> None:
        self._files = files
        self._offset = 0
        self._newest: Arrival | None = None
        self._stopped = False

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from gathered(self._pieces())
        except _Changed as changed:
            raise PackageChanged(
                "package_changed",
                f"{changed} on the worker's disk is not what was downloaded",
                "The job is tried again; if it stays so, check the worker's disk.",
            ) from None

    def stop(self) -> None:
        self._stopped = True
        if self._newest is not None:
            self._newest.wake()

    def _pieces(self) -> Iterator[bytes]:
        """The whole zip. An empty piece: more must be waited for."""
        largest_end, records = 0, list[Record]()
        for file in self._files:
            self._newest = file
            largest_end += file.size + file.size // 1000 + 2 * len(file.target.encode()) + 200
            is_zip64 = largest_end > ZIP32_MAX_BYTES or len(records) >= ZIP32_MAX_ENTRIES
            record = Record(file.target.encode(), DEFLATED, MODE, is_zip64, self._offset)
            is_compressed = PurePosixPath(file.target).suffix.lower() in COMPRESSED_TYPES
            if is_compressed and file.size < LARGE_BYTES:
                record = yield from self._store(file, record)
            else:
                record = yield from self._deflate(file, record, StoredBlocks() if is_compressed else _compressor())
            records.append(record)
        yield from directory(records, self._offset)

    def _store(self, file: Arrival, record: Record) -> Generator[bytes, None, Record]:
        whole = yield from self._whole(file)
        record = replace(record, method=STORED, crc32=whole.crc32, size=whole.size, packed_size=whole.size)
        yield self._counted(record.header())
        for chunk in self._read(file):
            yield self._counted(chunk)
        return record

    def _deflate(self, file: Arrival, record: Record, deflate: Deflate) -> Generator[bytes, None, Record]:
        yield self._counted(record.header())
        begin = self._offset
        for chunk in self._read(file):
            yield self._counted(deflate.compress(chunk))
        yield self._counted(deflate.flush())
        crc32 = (yield from self._whole(file)).crc32
        record = replace(record, crc32=crc32, size=file.size, packed_size=self._offset - begin)
        yield self._counted(record.descriptor())
        return record

    def _counted(self, piece: bytes) -> bytes:
        self._offset += len(piece)
        return piece

    def _read(self, file: Arrival) -> Iterator[bytes]:
        """Raises `_Changed` unless the bytes have the CRC with which they arrived."""
        offset, crc32 = 0, 0
        if file.size:
            yield from self._until(file, 1)
            with file.open() as source:
                while offset < file.size:
                    size = min(CHUNK_BYTES, file.size - offset)  # whenever it came: how it is cut shows in what deflate makes
                    yield from self._until(file, offset + size)
                    chunk = source.read(size)
                    if len(chunk) < size:
                        raise _Changed(file.target)
                    crc32, offset = isal_zlib.crc32(chunk, crc32), offset + len(chunk)
                    yield chunk
        if (yield from self._whole(file)).crc32 != crc32:
            raise _Changed(file.target)

    def _whole(self, file: Arrival) -> Generator[bytes, None, PackageFile]:
        yield from self._until(file, inf)
        assert file.local is not None
        return file.local.file

    def _until(self, file: Arrival, size: float) -> Iterator[bytes]:
        """Wait until so many bytes of its beginning are there, or it is whole, which may be less than was said."""

        def is_enough() -> bool:
            return self._stopped or file.reached >= size or file.local is not None

        if not is_enough() and not file.wait(is_enough, HELD_SECONDS):
            yield b""
            file.wait(is_enough)
        if self._stopped:
            raise ZipStopped("the zip was stopped before its last byte")


def _compressor() -> Deflate:
    return zlib.compressobj(DEFLATE_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)


def gathered(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in fewer, larger pieces, none of them empty; large ones are not copied. An empty piece lets go of what is
    held."""
    held, size = list[bytes](), 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= GATHERED_BYTES or (size and not piece):
            yield held[0] if len(held) == 1 else b"".join(held)
            held, size = [], 0
    if size:
        yield b"".join(held)
