"""Unpacking a hostile zip: what it must be like, and how it is written to disk in bounded memory."""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from ncr_validator.layout import extension
from ncr_validator.verdicts import Issue
from ncr_validator.zip_directory import BadArchive, Entry, fold, package_issue, read_directory, show

if TYPE_CHECKING:  # pydantic is the only thing here that is not of the standard library
    from ncr_validator.limits import Limits

__all__ = ["DAMAGE", "BadArchive", "CheckedZip", "NoRoom", "Unpacked", "check_archive", "unpack"]

_CHUNK = 1024 * 1024
_MB = 1024 * 1024
_SPARE_DISK_BYTES = 256 * _MB
_NAME_REFUSED = {errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.ELOOP}
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError)
"""What reading an entry raises when its content is not what the directory says."""


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


@dataclass(frozen=True, slots=True)
class CheckedZip:
    """A zip whose directory keeps every rule. Its entries can be read one at a time."""

    file: IO[bytes]
    entries: tuple[Entry, ...]

    def open(self, entry: Entry) -> IO[bytes]:
        """Open an entry for reading; a read raises one of `DAMAGE` when the content is not what the directory says."""
        info = zipfile.ZipInfo(entry.name)
        info.compress_type, info.flag_bits, info.CRC = entry.method, entry.flags, entry.crc
        info.compress_size, info.file_size = entry.packed, entry.size
        self.file.seek(entry.data_at)
        return cast("IO[bytes]", zipfile.ZipExtFile(self.file, "r", info))


def check_archive(archive: IO[bytes], limits: Limits) -> CheckedZip:
    """Return the zip once every rule about its directory holds; its content is not read. Raises `BadArchive`."""
    entries, issues = read_directory(archive, limits.max_entries)
    issues += _check_entries(entries, limits)
    if issues:
        raise BadArchive(issues)
    return CheckedZip(archive, tuple(entries))


def unpack(archive: IO[bytes], folder: Path, limits: Limits) -> tuple[list[Unpacked], list[Issue]]:
    """Write the zip's files below `folder`, in the zip's order, reading each to its end and holding it against its CRC.

    Answers the files that are whole, and an issue for each that is not. Memory is bounded by the chunk and the number
    of entries. Raises `BadArchive` when the zip breaks a rule, before anything is written, or when this disk cannot hold
    a name of it; raises `NoRoom` when the disk has no room for it.
    """
    zipped = check_archive(archive, limits)
    needed, free = sum(entry.size for entry in zipped.entries), shutil.disk_usage(folder).free
    if free < needed + _SPARE_DISK_BYTES:
        raise NoRoom(f"The package unpacks to {needed} bytes; {free} are free in the validator's work folder")
    return _write_files(zipped, Path(os.path.realpath(folder)))


def _check_entries(entries: list[Entry], limits: Limits) -> Iterator[Issue]:
    seen: dict[str, Entry] = {}
    for entry in entries:
        folded = fold("/".join(entry.segments))
        if folded in seen:
            text = f"{show(entry.name)} is in the zip {_compare(seen[folded], entry)}."
            yield package_issue("ZIP_DUPLICATE_NAME", text, entry.name)
        seen[folded] = entry
        yield from _check_size(entry, limits)
    yield from _check_parents(entries, limits)
    yield from _check_totals(entries, limits)


def _compare(first: Entry, second: Entry) -> str:
    if first.name == second.name:
        return "twice"
    if first.segments == second.segments:
        return "as a file and as a folder"
    return f"beside {show(first.name)}, which differs in case, Unicode form or dots and blanks at the end only"


def _check_size(entry: Entry, limits: Limits) -> Iterator[Issue]:
    text = f"{show(entry.name)} unpacks"
    if entry.size > limits.max_entry_mb * _MB:
        yield package_issue(
            "ZIP_TOO_LARGE", f"{text} to {entry.size} bytes; the limit is {limits.max_entry_mb} MB.", entry.name
        )
    elif _is_bomb(entry.size, entry.packed, limits):
        yield package_issue("ZIP_BOMB", f"{text} from {entry.packed} to {entry.size} bytes.", entry.name)


def _check_parents(entries: list[Entry], limits: Limits) -> Iterator[Issue]:
    """A file cannot also be a folder of another, and folders are bounded as entries are."""
    files = {fold(entry.name) for entry in entries if not entry.is_folder}
    folders: set[str] = set()
    for entry in entries:
        parts = fold("/".join(entry.segments)).split("/")
        parents = {"/".join(parts[:depth]) for depth in range(1, len(parts))}
        if parents & files:
            text = f"{show(entry.name)} lies below a name that is also a file."
            yield package_issue("ZIP_DUPLICATE_NAME", text, entry.name)
        folders |= parents
        if len(folders) > limits.max_entries:
            text = f"The zip has more than {limits.max_entries} folders; the limit is {limits.max_entries}."
            yield package_issue("ZIP_TOO_MANY_ENTRIES", text)
            return


def _check_totals(entries: list[Entry], limits: Limits) -> Iterator[Issue]:
    unpacked = sum(entry.size for entry in entries)
    packed = sum(entry.packed for entry in entries)
    if unpacked > limits.max_unpacked_mb * _MB:
        text = f"The zip unpacks to {unpacked} bytes; the limit is {limits.max_unpacked_mb} MB."
        yield package_issue("ZIP_TOO_LARGE", text)
    elif _is_bomb(unpacked, packed, limits):
        yield package_issue("ZIP_BOMB", f"The zip unpacks from {packed} to {unpacked} bytes.")
    if all(entry.is_folder for entry in entries):
        yield package_issue("ZIP_EMPTY", "The zip holds no file.")


def _is_bomb(unpacked: int, packed: int, limits: Limits) -> bool:
    return unpacked > limits.ratio_floor_mb * _MB and unpacked > limits.max_ratio * max(packed, 1)


def _write_files(zipped: CheckedZip, root: Path) -> tuple[list[Unpacked], list[Issue]]:
    files: list[Unpacked] = []
    issues: list[Issue] = []
    for entry in zipped.entries:
        if entry.is_folder:
            continue
        target = _target(root, entry)
        try:
            with _create(target, entry) as out:
                size = _copy(zipped, entry, out)
        except DAMAGE as error:
            target.unlink(missing_ok=True)
            text = f"{show(entry.name)} is damaged: {_shorten(error)}."
            issues.append(package_issue("ZIP_CORRUPT_ENTRY", text, entry.name))
            continue
        files.append(Unpacked(entry.name, target, size))
    return files, issues


def _target(root: Path, entry: Entry) -> Path:
    """Return where the entry goes below the real path `root`. Raises `BadArchive` when that is elsewhere.

    The names have been checked; this is the gate that holds when a check has a hole.
    """
    target = root.joinpath(*entry.segments)
    is_below = target.is_relative_to(root) and target.relative_to(root).parts == entry.segments
    if not is_below or Path(os.path.realpath(target)) != target:
        raise BadArchive([package_issue("ZIP_UNSAFE_NAME", f"{show(entry.name)}: it leads out of the package.", entry.name)])
    return target


def _create(target: Path, entry: Entry) -> IO[bytes]:
    """Create the file of an entry and the folders above it. Raises `BadArchive` when this disk cannot hold its name."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.open("xb")
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        code, text = "ZIP_DUPLICATE_NAME", "on this disk its name is also that of another entry"
        raise BadArchive([package_issue(code, f"{show(entry.name)}: {text}.", entry.name)]) from error
    except (OSError, UnicodeEncodeError) as error:
        if isinstance(error, OSError) and error.errno not in _NAME_REFUSED:
            raise
        text = f"{show(entry.name)}: the validator's disk cannot hold its name."
        raise BadArchive([package_issue("ZIP_UNSAFE_NAME", text, entry.name)]) from error


def _copy(zipped: CheckedZip, entry: Entry, out: IO[bytes]) -> int:
    written = 0
    with zipped.open(entry) as source:
        while chunk := source.read(_CHUNK):
            out.write(chunk)
            written += len(chunk)
    if written != entry.size:
        raise zipfile.BadZipFile(f"{written} bytes instead of {entry.size}")
    return written


def _shorten(error: Exception) -> str:
    return str(error)[:200] or type(error).__name__
