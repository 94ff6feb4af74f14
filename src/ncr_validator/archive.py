"""Unpacking a hostile zip: what it must be like, and how it is written to disk in bounded memory."""

from __future__ import annotations

import shutil
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ncr_validator.layout import extension
from ncr_validator.limits import MB, Limits
from ncr_validator.verdicts import Issue, Severity

_CHUNK = 1024 * 1024
_SPARE_DISK_BYTES = 256 * MB
_EOCD = struct.Struct("<4s4H2LH")
_EOCD64_LOCATOR = struct.Struct("<4sLQL")
_EOCD64 = struct.Struct("<4sQ2H2L4Q")
_LOCAL = struct.Struct("<4s5H3L2H")
_DIRECTORY_BYTES_PER_ENTRY = 1024  # 46 and a name; ours are shorter by far
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_ENCRYPTED = 0x1 | 0x40
_UNREADABLE = (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, UnicodeDecodeError, ValueError)


class BadArchive(Exception):
    """The zip is refused as a whole; nothing in it is judged."""

    def __init__(self, issues: Iterable[Issue]) -> None:
        self.issues = tuple(issues)
        super().__init__("; ".join(issue.message for issue in self.issues))


class NoRoom(Exception):
    """The disk has no room for the package: that is no verdict."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A file of the package. `name` is its path in the zip, `path` where it now is."""

    name: str
    path: Path
    size: int

    @property
    def kind(self) -> str:
        """The extension, in lower case."""
        return extension(self.name)


@contextmanager
def check_archive(archive: IO[bytes], limits: Limits) -> Iterator[zipfile.ZipFile]:
    """The open zip, once every rule about its directory holds; its entries are not read. Raises `BadArchive`, also for
    what cannot be read of it inside the block."""
    try:
        directory_at = _find_directory(archive, limits)
        with zipfile.ZipFile(archive) as zipped:
            infos = zipped.infolist()
            if refusals := [*check_entries(infos, limits), *_check_places(archive, infos, directory_at)]:
                raise BadArchive(refusals)
            yield zipped
    except _UNREADABLE as error:
        raise BadArchive([_issue("ZIP_UNREADABLE", f"The zip cannot be read: {error}.")]) from error


def unpack(archive: IO[bytes], folder: Path, limits: Limits) -> tuple[list[Unpacked], list[Issue]]:
    """Write the zip's files below `folder`, in the zip's order, reading each to its end and holding it against its CRC.

    Answers the files that are whole, and an issue for each that is not. Memory is bounded by the chunk and the number
    of entries. Raises `BadArchive` when the zip breaks a rule, before anything is written, and `NoRoom` when the disk
    has no room for it.
    """
    with check_archive(archive, limits) as zipped:
        infos = zipped.infolist()
        needed, free = sum(info.file_size for info in infos), shutil.disk_usage(folder).free
        if free < needed + _SPARE_DISK_BYTES:
            raise NoRoom(f"The package unpacks to {needed} bytes; {free} are free in the validator's work folder")
        return _write_files(zipped, infos, folder)


def check_entries(infos: Iterable[zipfile.ZipInfo], limits: Limits) -> Iterator[Issue]:
    """What the central directory alone gives away: names, kinds, sizes, methods."""
    infos = list(infos)
    seen: dict[str, str] = {}
    for info in infos:
        problem = _name_problem(info)
        if problem:
            yield _issue("ZIP_UNSAFE_NAME", f"{info.orig_filename!r}: {problem}.", info.filename)
        folded = _fold(info.filename.rstrip("/"))
        if folded in seen:
            kind = (
                "twice"
                if seen[folded] == info.filename
                else f"beside {seen[folded]!r}, which differs in case or Unicode form only"
            )
            yield _issue("ZIP_DUPLICATE_NAME", f"{info.filename!r} is in the zip {kind}.", info.filename)
        seen[folded] = info.filename
        yield from _check_entry(info, limits)
    yield from _check_parents(infos)
    yield from _check_totals(infos, limits)


def _check_entry(info: zipfile.ZipInfo, limits: Limits) -> Iterator[Issue]:
    name = info.filename
    mode = info.external_attr >> 16 if info.create_system == 3 else 0
    kind = stat.S_IFMT(mode)
    if kind and not (stat.S_ISDIR(mode) if info.is_dir() else stat.S_ISREG(mode)):
        yield _issue("ZIP_SPECIAL_FILE", f"{name!r} is a link or a device, not a file.", name)
    if info.flag_bits & _ENCRYPTED:
        yield _issue("ZIP_ENCRYPTED", f"{name!r} is encrypted.", name)
    if info.compress_type not in _METHODS:
        yield _issue(
            "ZIP_METHOD", f"{name!r} is packed by method {info.compress_type}; only stored and deflate are read.", name
        )
    if info.is_dir() and info.file_size:
        yield _issue("ZIP_SPECIAL_FILE", f"{name!r} is a folder with content.", name)
    if info.file_size > limits.max_entry_mb * MB:
        yield _issue(
            "ZIP_TOO_LARGE", f"{name!r} unpacks to {info.file_size} bytes; the limit is {limits.max_entry_mb} MB.", name
        )
    elif _is_bomb(info.file_size, info.compress_size, limits):
        yield _issue("ZIP_BOMB", f"{name!r} unpacks from {info.compress_size} to {info.file_size} bytes.", name)


def _check_parents(infos: list[zipfile.ZipInfo]) -> Iterator[Issue]:
    """A file cannot also be a folder of another."""
    files = {_fold(info.filename) for info in infos if not info.is_dir()}
    for info in infos:
        parts = _fold(info.filename).rstrip("/").split("/")
        if any("/".join(parts[:depth]) in files for depth in range(1, len(parts))):
            yield _issue("ZIP_DUPLICATE_NAME", f"{info.filename!r} lies below a name that is also a file.", info.filename)


def _check_totals(infos: list[zipfile.ZipInfo], limits: Limits) -> Iterator[Issue]:
    unpacked = sum(info.file_size for info in infos)
    packed = sum(info.compress_size for info in infos)
    if unpacked > limits.max_unpacked_mb * MB:
        yield _issue("ZIP_TOO_LARGE", f"The zip unpacks to {unpacked} bytes; the limit is {limits.max_unpacked_mb} MB.")
    elif _is_bomb(unpacked, packed, limits):
        yield _issue("ZIP_BOMB", f"The zip unpacks from {packed} to {unpacked} bytes.")
    if not any(not info.is_dir() for info in infos):
        yield _issue("ZIP_EMPTY", "The zip holds no file.")


def _is_bomb(unpacked: int, packed: int, limits: Limits) -> bool:
    return unpacked > limits.ratio_floor_mb * MB and unpacked > limits.max_ratio * max(packed, 1)


def _fold(name: str) -> str:
    """Names that fold alike are one file on many disks."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def _name_problem(info: zipfile.ZipInfo) -> str | None:
    raw = info.orig_filename
    segments = raw.removesuffix("/").split("/")
    problems = {
        "an absolute path": raw.startswith("/"),
        "a backslash": "\\" in raw,
        "a control character": any(ord(char) < 32 or ord(char) == 127 for char in raw),
        "a drive": len(raw) > 1 and raw[1] == ":",
        "a '.' or '..' or empty segment": any(segment in {"", ".", ".."} for segment in segments),
        "a segment over 255 bytes": any(len(segment.encode("utf-8", "surrogatepass")) > 255 for segment in segments),
        "a path over 1024 characters": len(raw) > 1024,
        "characters that are no text": any(0xD800 <= ord(char) < 0xE000 for char in raw),
    }
    return next((f"its name has {problem}" for problem, there in problems.items() if there), None)


def _find_directory(file: IO[bytes], limits: Limits) -> int:
    """Where the central directory starts; refuses one too large to read into memory. Raises `BadArchive`."""
    size = file.seek(0, 2)
    if size < _EOCD.size:
        raise BadArchive([_issue("ZIP_UNREADABLE", f"This is no zip: it has {size} bytes.")])
    tail_at = max(0, size - _EOCD.size - 65535)
    file.seek(tail_at)
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _EOCD.size:
        raise BadArchive([_issue("ZIP_UNREADABLE", "This is no zip, or its end is missing.")])
    _, disk, _, _, entries, length, start, _ = _EOCD.unpack_from(tail, at)
    end = tail_at + at
    locator_at = end - _EOCD64_LOCATOR.size
    if locator_at >= 0 and (0xFFFF in (disk, entries) or 0xFFFFFFFF in (length, start)):
        file.seek(locator_at)
        mark, _, end64, _ = _EOCD64_LOCATOR.unpack(file.read(_EOCD64_LOCATOR.size))
        if mark == b"PK\x06\x07":
            file.seek(end64)
            _, _, _, _, _, _, _, entries, length, start = _EOCD64.unpack(file.read(_EOCD64.size))
            end = end64
    if entries > limits.max_entries or length > limits.max_entries * _DIRECTORY_BYTES_PER_ENTRY:
        text = f"The zip has {entries} entries in a directory of {length} bytes; the limit is {limits.max_entries} entries."
        raise BadArchive([_issue("ZIP_TOO_MANY_ENTRIES", text)])
    if start + length != end:
        raise BadArchive(
            [_issue("ZIP_UNREADABLE", "The zip's directory is not where its end says: bytes are missing or added.")]
        )
    return int(start)


def _check_places(file: IO[bytes], infos: list[zipfile.ZipInfo], directory_at: int) -> Iterator[Issue]:
    """Every entry has bytes of its own: overlapping entries are how small zips unpack to petabytes."""
    end = 0
    for info in sorted(infos, key=lambda one: one.header_offset):
        file.seek(info.header_offset)
        header = file.read(_LOCAL.size)
        if len(header) < _LOCAL.size or not header.startswith(b"PK\x03\x04"):
            yield _issue("ZIP_UNREADABLE", f"{info.filename!r} has no header where the directory says.", info.filename)
            return
        if info.header_offset < end:
            yield _issue("ZIP_OVERLAP", f"{info.filename!r} shares bytes with another entry.", info.filename)
            return
        *_, name_length, extra_length = _LOCAL.unpack(header)
        end = info.header_offset + _LOCAL.size + name_length + extra_length + info.compress_size
        if end > directory_at:
            yield _issue("ZIP_OVERLAP", f"{info.filename!r} runs into the directory of the zip.", info.filename)
            return


def _write_files(zipped: zipfile.ZipFile, infos: list[zipfile.ZipInfo], folder: Path) -> tuple[list[Unpacked], list[Issue]]:
    files: list[Unpacked] = []
    issues: list[Issue] = []
    for info in infos:
        if info.is_dir():
            continue
        target = folder.joinpath(*info.filename.split("/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            size = _write_file(zipped, info, target)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            target.unlink(missing_ok=True)
            issues.append(_issue("ZIP_CORRUPT_ENTRY", f"{info.filename!r} is damaged: {error}.", info.filename))
            continue
        files.append(Unpacked(info.filename, target, size))
    return files, issues


def _write_file(zipped: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> int:
    written = 0
    with zipped.open(info) as source, target.open("xb") as out:
        while chunk := source.read(_CHUNK):
            out.write(chunk)
            written += len(chunk)
    if written != info.file_size:
        raise zipfile.BadZipFile(f"{written} bytes instead of {info.file_size}")
    return written


def _issue(code: str, message: str, file: str | None = None) -> Issue:
    return Issue("package", code, Severity.ERROR, message, file)
