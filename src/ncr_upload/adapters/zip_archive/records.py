"""The records of a zip around its entries' data (PKWARE's APPNOTE 6.3): no compression, no reading, only bytes from figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from struct import pack

STORED, DEFLATED = 0, 8
UTF8_FLAG, DESCRIPTOR_FLAG = 0x0800, 0x0008
VERSION, ZIP64_VERSION = 20, 45
UNIX = 3
FIRST_DATE = pack("<HH", 0, 1 << 5 | 1)  # 1980-01-01 00:00:00, the first that a zip can hold
ELSEWHERE = 0xFFFF_FFFF  # in zip64, in place of a size or an offset that the extra field holds
ZIP64_EXTRA = 1
BLOCK_BYTES = 0xFFFF


@dataclass(frozen=True, slots=True)
class Record:
    """An entry as the directory at the end lists it. `size` and `packed_size` in bytes, `offset` from the zip's beginning;
    `mode` is the file's Unix mode. Known only after the data where it is DEFLATED: until then CRC and sizes are 0."""

    name: bytes
    method: int
    mode: int
    is_zip64: bool
    offset: int
    crc32: int = 0
    size: int = 0
    packed_size: int = 0

    @property
    def _flags(self) -> int:
        return UTF8_FLAG | (DESCRIPTOR_FLAG if self.method == DEFLATED else 0)

    @property
    def _version(self) -> int:
        return ZIP64_VERSION if self.is_zip64 else VERSION

    def header(self) -> bytes:
        """What stands before the data."""
        packed_size, size, extra = self.packed_size, self.size, b""
        if self.is_zip64:
            extra = pack("<HHQQ", ZIP64_EXTRA, 16, size, packed_size)
            packed_size = size = ELSEWHERE
        rest = pack("<III", self.crc32, packed_size, size) + pack("<HH", len(self.name), len(extra))
        return b"PK\x03\x04" + pack("<HHH", self._version, self._flags, self.method) + FIRST_DATE + rest + self.name + extra

    def descriptor(self) -> bytes:
        """What stands behind the data of a DEFLATED entry."""
        return b"PK\x07\x08" + pack("<IQQ" if self.is_zip64 else "<III", self.crc32, self.packed_size, self.size)

    def listing(self) -> bytes:
        """Its part of the directory."""
        packed_size, size, offset, extra = self.packed_size, self.size, self.offset, b""
        if self.is_zip64:
            extra = pack("<HHQQQ", ZIP64_EXTRA, 24, size, packed_size, offset)
            packed_size = size = offset = ELSEWHERE
        return (
            b"PK\x01\x02"
            + pack("<BBHHH", self._version, UNIX, self._version, self._flags, self.method)
            + FIRST_DATE
            + pack("<III", self.crc32, packed_size, size)
            + pack("<HHHHHII", len(self.name), len(extra), 0, 0, 0, self.mode << 16, offset)
            + self.name
            + extra
        )


class StoredBlocks:
    """Makes deflate's stored blocks (RFC 1951, 3.2.4), as zlib's level 0 does at ten times the cost."""

    def compress(self, chunk: bytes) -> bytes:
        view, pieces = memoryview(chunk), list[bytes | memoryview]()
        for start in range(0, len(chunk), BLOCK_BYTES):
            block = view[start : start + BLOCK_BYTES]
            pieces += (_block_header(len(block)), block)
        return b"".join(pieces)

    def flush(self) -> bytes:
        return _block_header(0, last=True)


def _block_header(size: int, *, last: bool = False) -> bytes:
    return pack("<BHH", last, size, size ^ 0xFFFF)


def directory(records: list[Record], offset: int) -> Iterator[bytes]:
    """The end of the zip; `offset` is where it begins."""
    size = 0
    for record in records:
        listing = record.listing()
        size += len(listing)
        yield listing
    count = len(records)
    if any(record.is_zip64 for record in records):
        yield b"PK\x06\x06" + pack("<QHHIIQQQQ", 44, ZIP64_VERSION, ZIP64_VERSION, 0, 0, count, count, size, offset)
        yield b"PK\x06\x07" + pack("<IQI", 0, offset + size, 1)
        yield b"PK\x05\x06" + pack("<HHHHIIH", 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, ELSEWHERE, ELSEWHERE, 0)
    else:
        yield b"PK\x05\x06" + pack("<HHHHIIH", 0, 0, count, count, size, offset, 0)
