"""Zips written byte by byte, so that every field can lie. Standard library only."""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

UTF8 = 0x800
UNIX = 3


@dataclass(frozen=True)
class Raw:
    """An entry. What is None in the local header, or in the sizes, is as in the directory, or as in the content."""

    name: bytes
    content: bytes = b"content"
    flags: int = 0
    extra: bytes = b""
    local_name: bytes | None = None
    local_flags: int | None = None
    local_extra: bytes = b""
    local_method: int | None = None
    method: int = 0
    mode: int = 0
    dos: int = 0
    system: int = UNIX
    size: int | None = None
    packed: int | None = None
    header_at: int | None = None
    disk: int = 0


def build(
    *entries: Raw, comment: bytes = b"", end64: bytes | None = None, count: int | None = None, disk: int = 0, added: bytes = b""
) -> bytes:
    """Write a zip; `end64` stands between its directory and its end, `added` behind the directory's last entry."""
    local, central = bytearray(), bytearray()
    for entry in entries:
        at = len(local) if entry.header_at is None else entry.header_at
        crc, length = zlib.crc32(entry.content), len(entry.content)
        name = entry.name if entry.local_name is None else entry.local_name
        flags = entry.flags if entry.local_flags is None else entry.local_flags
        method = entry.method if entry.local_method is None else entry.local_method
        local += struct.pack(
            "<4s5H3L2H", b"PK\3\4", 20, flags, method, 0, 33, crc, length, length, len(name), len(entry.local_extra)
        )
        local += name + entry.local_extra + entry.content
        size = length if entry.size is None else entry.size
        packed = length if entry.packed is None else entry.packed
        central += struct.pack(
            "<4s4B4H3L5H2L", b"PK\1\2", 20, entry.system, 20, 0, entry.flags, entry.method, 0, 33, crc, packed, size,
            len(entry.name), len(entry.extra), 0, entry.disk, 0, entry.mode << 16 | entry.dos, at,
        )  # fmt: skip
        central += entry.name + entry.extra
    central += added
    total = len(entries) if count is None else count
    end = struct.pack("<4s4H2LH", b"PK\5\6", disk, disk, total, total, len(central), len(local), len(comment))
    return bytes(local + central) + (end64 or b"") + end + comment


def field(tag: int, body: bytes, length: int | None = None) -> bytes:
    """An extra field; `length` is what it says of its own length."""
    return struct.pack("<2H", tag, len(body) if length is None else length) + body


def unicode_path(header_name: bytes, name: bytes, *, version: int = 1, crc: int | None = None) -> bytes:
    """Info-ZIP's Unicode Path field: another name for the entry whose header says `header_name`."""
    return field(0x7075, struct.pack("<BL", version, zlib.crc32(header_name) if crc is None else crc) + name)


def locator(end64_at: int) -> bytes:
    return struct.pack("<4sLQL", b"PK\6\7", 0, end64_at, 1)


def end64(count: int, length: int, start: int) -> bytes:
    return struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)


def _two_names(name: bytes, other: bytes) -> Raw:
    return Raw(name, extra=unicode_path(name, other))


def _with_second_end() -> bytes:
    """Two zips in one file: the comment of the first holds the end of a second."""
    inner = build(Raw(b"A/other"))
    whole = build(Raw(b"A/a"), comment=inner)
    at = len(whole) - len(inner)
    start = struct.unpack_from("<L", inner, len(inner) - 6)[0]
    return whole[:-6] + struct.pack("<L", at + start) + whole[-2:]


def _with_end64(count: int, says: bytes = b"") -> bytes:
    plain = build(Raw(b"A/a"))
    length, start = struct.unpack_from("<2L", plain, len(plain) - 10)
    extra = end64(count, length, start) + locator(start + length)
    return plain[:-22] + extra + (says or plain[-22:])


FINE = Raw(b"A/fine")
UNSAFE_NAMES = {
    "no name": b"",
    "a slash": b"/",
    "slashes": b"///",
    "absolute": b"/etc/passwd",
    "up": b"../a",
    "up, within": b"A/../../a",
    "up, at the end": b"A/..",
    "up, as a folder": b"A/../",
    "dot": b"A/./a",
    "only a dot": b".",
    "empty segment": b"A//a",
    "two slashes at the end": b"A/a//",
    "backslash": b"A\\a",
    "backslash up": b"..\\..\\a",
    "drive": b"C:/a",
    "drive, relative": b"C:a",
    "zero byte": b"A/a.glb\0.txt",
    "zero byte up": b"A/a\0/../../b",
    "zero byte first": b"\0A/a",
    "new line": b"A/a\nb",
    "escape": b"A/\x1b[2Ja",
    "delete": b"A/a\x7f",
    "long segment": b"A/" + b"n" * 256,
    "long path": b"A/" + b"/".join([b"n" * 200] * 6),
    "longest name": b"A/" + b"n" * 20_000,
    "deep": b"/".join([b"d"] * 40),
}
_UTF8_UNSAFE = {
    "not UTF-8": b"A/caf\xe9",
    "overlong slash": b"A/..\xc0\xafa",
    "lone surrogate": b"A/\xed\xa0\x80",
    "C1 control": "A/a\x9b2Jb".encode(),
    "long in bytes": ("A/" + "é" * 200).encode(),
    "long path in bytes": ("A/" + "/".join(["é" * 100] * 6)).encode(),
}

CASES: dict[str, tuple[str, bytes]] = {
    **{f"name: {what}": ("ZIP_UNSAFE_NAME", build(FINE, Raw(name))) for what, name in UNSAFE_NAMES.items()},
    **{f"UTF-8 name: {what}": ("ZIP_UNSAFE_NAME", build(FINE, Raw(name, flags=UTF8))) for what, name in _UTF8_UNSAFE.items()},
    **{
        f"Unicode Path: {what}": ("ZIP_UNSAFE_NAME", build(FINE, _two_names(b"A/x.txt", name)))
        for what, name in UNSAFE_NAMES.items()
    },
    **{
        f"header behind a Unicode Path: {what}": ("ZIP_UNSAFE_NAME", build(FINE, _two_names(name, b"A/x.txt")))
        for what, name in UNSAFE_NAMES.items()
    },
    "only an entry without a name": ("ZIP_UNSAFE_NAME", build(Raw(b""))),
    "a cp437 name that is too long on disk": ("ZIP_UNSAFE_NAME", build(FINE, Raw(b"A/" + b"\xb0" * 100))),
    "Unicode Path: another name in the second field": (
        "ZIP_NAME_MISMATCH",
        build(Raw(b"A/a", extra=unicode_path(b"A/a", b"A/b") + unicode_path(b"A/a", b"A/c"))),
    ),
    "Unicode Path: a folder for a file": ("ZIP_NAME_MISMATCH", build(FINE, _two_names(b"A/a", b"A/b/"))),
    "Unicode Path: of a name that is there": ("ZIP_DUPLICATE_NAME", build(FINE, _two_names(b"A/a", b"A/FINE"))),
    "Unicode Path: too short": ("ZIP_BAD_EXTRA_FIELD", build(FINE, Raw(b"A/a", extra=field(0x7075, b"\1abc")))),
    "Unicode Path: no text": ("ZIP_BAD_EXTRA_FIELD", build(FINE, _two_names(b"A/a", b"A/\xff"))),
    "Unicode Path: in the local header only": (
        "ZIP_NAME_MISMATCH",
        build(FINE, Raw(b"A/a", local_extra=unicode_path(b"A/a", b"../../a"))),
    ),
    "local name differs": ("ZIP_NAME_MISMATCH", build(FINE, Raw(b"A/a", local_name=b"../a"))),
    "local name in another code page": ("ZIP_NAME_MISMATCH", build(Raw("A/é".encode(), flags=UTF8, local_flags=0, system=0))),
    "local name empty": ("ZIP_NAME_MISMATCH", build(Raw(b"A/a", local_name=b""))),
    "local method differs": ("ZIP_HEADER_MISMATCH", build(Raw(b"A/a", local_method=8))),
    "local header encrypted": ("ZIP_HEADER_MISMATCH", build(Raw(b"A/a", local_flags=1))),
    "twice": ("ZIP_DUPLICATE_NAME", build(Raw(b"A/a"), Raw(b"A/a"))),
    "twice, by case": ("ZIP_DUPLICATE_NAME", build(Raw(b"A/a"), Raw(b"A/A"))),
    "twice, by Unicode form": (
        "ZIP_DUPLICATE_NAME",
        build(Raw("A/é".encode(), flags=UTF8), Raw("A/e\u0301".encode(), flags=UTF8)),
    ),
    "twice, by code page": ("ZIP_DUPLICATE_NAME", build(Raw("A/é".encode(), flags=UTF8), Raw(b"A/\x82"))),
    "twice, by a blank at the end": ("ZIP_DUPLICATE_NAME", build(Raw(b"A/a"), Raw(b"A/a "))),
    "a file and a folder": ("ZIP_DUPLICATE_NAME", build(Raw(b"A/a"), Raw(b"A/a/", content=b""))),
    "a file above a file": ("ZIP_DUPLICATE_NAME", build(Raw(b"A/a"), Raw(b"A/a/b"))),
    "a file above a file, the other way": ("ZIP_DUPLICATE_NAME", build(Raw(b"A/a/b"), Raw(b"A/a"))),
    "link": ("ZIP_SPECIAL_FILE", build(Raw(b"A/a", mode=stat.S_IFLNK | 0o777, content=b"/etc"), Raw(b"A/b"))),
    "link, made on a Mac": ("ZIP_SPECIAL_FILE", build(Raw(b"A/a", mode=stat.S_IFLNK | 0o777, system=19), Raw(b"A/b"))),
    "link, then a file through it": (
        "ZIP_SPECIAL_FILE",
        build(Raw(b"A/a", mode=stat.S_IFLNK | 0o777, content=b"../.."), Raw(b"A/a/b")),
    ),
    "a folder by its attributes": ("ZIP_SPECIAL_FILE", build(FINE, Raw(b"A/a", dos=0x10))),
    "a folder with content": ("ZIP_SPECIAL_FILE", build(FINE, Raw(b"A/a/"))),
    "extra field too long": ("ZIP_BAD_EXTRA_FIELD", build(Raw(b"A/a", extra=field(0xCAFE, b"12", 99)))),
    "Zip64 field missing": ("ZIP_BAD_EXTRA_FIELD", build(Raw(b"A/a", size=2**32 - 1))),
    "Zip64 field short": ("ZIP_BAD_EXTRA_FIELD", build(Raw(b"A/a", size=2**32 - 1, extra=field(1, bytes(4))))),
    "Zip64 field twice": (
        "ZIP_BAD_EXTRA_FIELD",
        build(Raw(b"A/a", size=2**32 - 1, extra=field(1, struct.pack("<Q", 7)) + field(1, struct.pack("<Q", 8)))),
    ),
    "Zip64 place far away": (
        "ZIP_UNREADABLE",
        build(Raw(b"A/a", header_at=2**32 - 1, extra=field(1, struct.pack("<Q", 2**64 - 1)))),
    ),
    "Zip64 size beyond every disk": (
        "ZIP_TOO_LARGE",
        build(Raw(b"A/a", size=2**32 - 1, extra=field(1, struct.pack("<Q", 2**64 - 1)))),
    ),
    "Zip64 end that differs": ("ZIP_UNREADABLE", _with_end64(2)),
    "Zip64 end nowhere": ("ZIP_UNREADABLE", build(Raw(b"A/a"), end64=locator(2**64 - 1))),
    "Zip64 end elsewhere": ("ZIP_UNREADABLE", build(Raw(b"A/a"), end64=locator(0))),
    "part of several": ("ZIP_UNREADABLE", build(Raw(b"A/a"), disk=1)),
    "entry on another disk": ("ZIP_UNREADABLE", build(Raw(b"A/a", disk=3))),
    "fewer entries than said": ("ZIP_UNREADABLE", build(Raw(b"A/a"), count=2)),
    "more entries than said": ("ZIP_UNREADABLE", build(Raw(b"A/a"), Raw(b"A/b"), count=1)),
    "no entry of many": ("ZIP_UNREADABLE", build(Raw(b"A/a"), count=0)),
    "bytes behind the directory": ("ZIP_UNREADABLE", build(Raw(b"A/a"), added=b"x" * 46)),
    "a second end in the comment": ("ZIP_UNREADABLE", _with_second_end()),
    "an end within the comment": ("ZIP_UNREADABLE", build(Raw(b"A/a"), comment=b"PK\5\6" + bytes(40))),
    "bytes behind the comment": ("ZIP_UNREADABLE", build(Raw(b"A/a"), comment=b"a") + b"b"),
    "overlap": ("ZIP_OVERLAP", build(Raw(b"A/a"), Raw(b"A/a", header_at=0))),
    "overlap, one within another": (
        "ZIP_OVERLAP",
        build(Raw(b"A/a", content=build(Raw(b"A/b"))), Raw(b"A/b", header_at=33, size=7, packed=7)),
    ),
    "runs into the directory": ("ZIP_OVERLAP", build(Raw(b"A/a", size=99, packed=99))),
    "folders without end": ("ZIP_TOO_MANY_ENTRIES", build(*(Raw(f"{n}/b/c/d/e/f/g/h".encode()) for n in range(60)))),
}
"""Every hostile zip, by what is wrong with it, with one of the codes it must be refused by. At most 100 entries."""

SOUND: dict[str, tuple[dict[str, bytes], bytes]] = {
    "plain": ({"A/a": b"content"}, build(Raw(b"A/a"))),
    "folders": ({"A/b/c": b"content"}, build(Raw(b"A/", content=b"", dos=0x10), Raw(b"A/b/", content=b""), Raw(b"A/b/c"))),
    "UTF-8": ({"A/é": b"content"}, build(Raw("A/é".encode(), flags=UTF8))),
    "UTF-8 without the flag, as zip on Unix writes it": ({"A/é": b"content"}, build(Raw("A/é".encode()))),
    "UTF-8 bytes without the flag, from Windows": ({"A/├⌐": b"content"}, build(Raw("A/é".encode(), system=0))),
    "cp437": ({"A/é": b"content"}, build(Raw(b"A/\x82"))),
    "Unicode Path, as Info-ZIP writes it": (
        {"A/七个房间.txt": b"content"},
        build(
            Raw(
                b"A/#U4e03.txt",
                extra=unicode_path(b"A/#U4e03.txt", "A/七个房间.txt".encode()),
                local_extra=unicode_path(b"A/#U4e03.txt", "A/七个房间.txt".encode()),
            )
        ),
    ),
    "Unicode Path, in the directory only": ({"A/é": b"content"}, build(_two_names(b"A/e", "A/é".encode()))),
    "Unicode Path of a former name": ({"A/a": b"content"}, build(Raw(b"A/a", extra=unicode_path(b"A/b", b"../x")))),
    "Unicode Path of another version": (
        {"A/a": b"content"},
        build(Raw(b"A/a", extra=unicode_path(b"A/a", b"../x", version=2))),
    ),
    "a comment": ({"A/a": b"content"}, build(Raw(b"A/a"), comment=b"made by hand")),
    "a zip in it": ({"A/a.zip": build(Raw(b"A/b"))}, build(Raw(b"A/a.zip", content=build(Raw(b"A/b"))))),
    "Zip64": (
        {"A/a": b"content"},
        build(Raw(b"A/a", size=2**32 - 1, packed=2**32 - 1, extra=field(1, struct.pack("<2Q", 7, 7)))),
    ),
    "Zip64 end": ({"A/a": b"content"}, _with_end64(1)),
    "Zip64 end that the plain end needs": (
        {"A/a": b"content"},
        _with_end64(1, struct.pack("<4s4H2LH", b"PK\5\6", *[65535] * 4, *[2**32 - 1] * 2, 0)),
    ),
    "three bytes of filling": ({"A/a": b"content"}, build(Raw(b"A/a", extra=bytes(3)))),
    "dots in names": ({"A/.a..b...c": b"content"}, build(Raw(b"A/.a..b...c"))),
}
"""Sound zips that look odd, with the files that are in them."""


def names_of(cases: Iterable[str]) -> dict[str, str]:
    """A file name for each case."""
    return {case: f"{number:03}.zip" for number, case in enumerate(cases)}
