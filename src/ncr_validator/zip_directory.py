"""Read what a hostile zip says about itself: its end, its directory and its local headers.

`zipfile` is not asked: it names an entry differently from one Python release to the next (Unicode Path fields, zero
bytes), and takes another end of the zip than other programs do. Uses the standard library only.
"""

from __future__ import annotations

import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from ncr_validator.verdicts import Issue, Severity

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s4B4H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_END_MARK, _END64_LOCATOR_MARK, _END64_MARK = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
_DIRECTORY_BYTES_PER_ENTRY = 1024  # 46 and a name; ours are shorter by far
_SHORT_MAX, _LONG_MAX = 0xFFFF, 0xFFFFFFFF
_UTF8_NAME = 0x800
_ENCRYPTED = 0x1 | 0x40
_DOS_FOLDER = 0x10
_UNIXES = {3, 19}  # 19: macOS
_ZIP64_FIELD, _UNICODE_PATH_FIELD = 0x0001, 0x7075
_MAX_SEGMENTS = 32
_MAX_PATH_BYTES = 1024  # as an S3 key
_MAX_SHOWN = 160
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}


class BadArchive(Exception):
    """The zip is refused as a whole; nothing in it is judged."""

    def __init__(self, issues: Iterable[Issue]) -> None:
        self.issues = tuple(issues)
        super().__init__("; ".join(issue.message for issue in self.issues))


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the zip. `segments` is its only name: what is checked, what is reported and where it is written."""

    segments: tuple[str, ...]
    is_folder: bool
    method: int
    flags: int
    crc: int
    packed: int
    size: int
    mode: int
    attributes: int
    header_at: int
    data_at: int = 0

    @property
    def name(self) -> str:
        """The path in the zip; that of a folder ends in a slash."""
        return "/".join(self.segments) + "/" * self.is_folder


def read_directory(file: IO[bytes], max_entries: int) -> tuple[list[Entry], list[Issue]]:
    """Return the entries in the order of the directory, and an issue for each rule that an entry breaks.

    Reads the directory and the local headers, no content. Raises `BadArchive` when there is no directory to read.
    """
    count, length, start = _find_directory(file, max_entries)
    data = _read(file, start, length)
    entries: list[Entry] = []
    issues: list[Issue] = []
    at = 0
    for number in range(count):
        if len(data) - at < _CENTRAL.size or not data.startswith(b"PK\x01\x02", at):
            raise _unreadable(f"Its directory says {count} entries and holds {number}.")
        header = _Central(data, at)
        at = header.end
        if at > len(data):
            raise _unreadable(f"Its directory ends within the name of entry {number + 1}.")
        entry, found = _read_entry(file, start, header)
        entries.append(entry)
        issues += found
    if at != length:
        raise _unreadable(f"Its directory holds {length - at} bytes beyond the {count} entries that it says.")
    issues += _check_places(entries, start)
    return entries, issues


def show(name: str) -> str:
    """Quote a name for people: escaped, and cut to a bounded length."""
    quoted = repr(name[:_MAX_SHOWN])
    return quoted if len(name) <= _MAX_SHOWN >= len(quoted) else f"{quoted[: _MAX_SHOWN - 1]}…'"


def package_issue(code: str, message: str, name: str | None = None) -> Issue:
    """Build an error about the package, or about the entry `name` in it."""
    if name is not None and (_holds_control(name) or len(name) > _MAX_PATH_BYTES):
        name = show(name)[1:-1]
    return Issue("package", code, Severity.ERROR, message, name)


def fold(name: str) -> str:
    """Return what names have in common that are one file on some disk: case, Unicode form, dots and blanks at the end."""
    folded = unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
    return "/".join(segment.rstrip(" .") for segment in folded.split("/"))


class _Central:
    """A header of the directory, as it stands there."""

    def __init__(self, data: bytes, at: int) -> None:
        _, _, self.system, _, _, *found = _CENTRAL.unpack_from(data, at)
        self.flags, self.method, _, _, self.crc, self.packed, self.size, *found_lengths = found[:10]
        name_length, extra_length, comment_length = found_lengths
        self.disk, _, self.attributes, self.header_at = found[10:]
        at += _CENTRAL.size
        self.raw_name = data[at : at + name_length]
        self.extra = data[at + name_length : at + name_length + extra_length]
        self.end = at + name_length + extra_length + comment_length


def _read_entry(file: IO[bytes], directory_at: int, header: _Central) -> tuple[Entry, list[Issue]]:
    fields, problem = _read_fields(header.extra)
    name, problems = _read_name(header.raw_name, header.flags, header.system, fields)
    if problem:
        problems.append(("ZIP_BAD_EXTRA_FIELD", problem))
    sizes = _read_sizes(header, fields)
    if sizes is None:
        problems.append(("ZIP_BAD_EXTRA_FIELD", "its Zip64 field is there twice, or too short for the sizes it must hold"))
    size, packed, header_at = sizes or (header.size, header.packed, header.header_at)
    if header.disk not in {0, _SHORT_MAX}:
        problems.append(("ZIP_UNREADABLE", f"it is on disk {header.disk} of a zip in parts"))
    data_at, found = _check_local(file, directory_at, header, header_at, name)
    segments, is_folder = _split(name)
    entry = Entry(
        segments=segments,
        is_folder=is_folder,
        method=header.method,
        flags=header.flags,
        crc=header.crc,
        packed=packed,
        size=size,
        mode=header.attributes >> 16,
        attributes=header.attributes & _SHORT_MAX,
        header_at=header_at,
        data_at=data_at,
    )
    problems += [*found, *_check_name(name, segments), *_check_kind(entry)]
    return entry, [package_issue(code, f"{show(name)}: {text}.", name) for code, text in problems]


_Problem = tuple[str, str]
_Fields = list[tuple[int, bytes]]


def _read_fields(extra: bytes) -> tuple[_Fields, str | None]:
    """Split an extra field. Up to three bytes at its end are filling."""
    fields: _Fields = []
    at = 0
    while len(extra) - at >= 4:
        tag, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if at + length > len(extra):
            return fields, f"its extra field {tag:#06x} is longer than what is left of it"
        fields.append((tag, extra[at : at + length]))
        at += length
    return fields, None


def _read_name(raw: bytes, flags: int, system: int, fields: _Fields) -> tuple[str, list[_Problem]]:
    """Return the entry's one name: that of its Unicode Path field, where it has one, else that of its header."""
    problems: list[_Problem] = []
    try:
        header_name = _decode(raw, flags, system)
    except UnicodeDecodeError:
        header_name = raw.decode("utf-8", "backslashreplace")
        problems.append(("ZIP_UNSAFE_NAME", "its name is said to be UTF-8 and is not"))
    names, found = _read_unicode_paths(raw, fields)
    problems += found
    if len(names) > 1:
        problems.append(("ZIP_NAME_MISMATCH", f"its Unicode Path fields give it {len(names)} names"))
    if not names or problems:
        return header_name, problems
    name = names.pop()
    if name != header_name:
        problems += _check_name(header_name, _split(header_name)[0])
        if header_name.endswith("/") != name.endswith("/"):
            problems.append(("ZIP_NAME_MISMATCH", "only one of its header and its Unicode Path field calls it a folder"))
    return name, problems


def _decode(raw: bytes, flags: int, system: int) -> str:
    """Decode a header's name. Programs on Unix write UTF-8 and often leave the flag out; `unzip` reads it so."""
    if flags & _UTF8_NAME:
        return raw.decode()
    if system in _UNIXES:
        with suppress(UnicodeDecodeError):
            return raw.decode()
    return raw.decode("cp437")


def _read_unicode_paths(raw: bytes, fields: _Fields) -> tuple[set[str], list[_Problem]]:
    """Return the names that Unicode Path fields give to an entry whose header says `raw`."""
    names: set[str] = set()
    problems: list[_Problem] = []
    for tag, body in fields:
        if tag != _UNICODE_PATH_FIELD:
            continue
        if len(body) < 5:
            problems.append(("ZIP_BAD_EXTRA_FIELD", "its Unicode Path field is too short"))
        elif struct.unpack_from("<BL", body) == (1, zlib.crc32(raw)):  # else it is of another version, or of a former name
            try:
                names.add(body[5:].decode())
            except UnicodeDecodeError:
                problems.append(("ZIP_BAD_EXTRA_FIELD", "its Unicode Path field is not UTF-8"))
    return names, problems


def _read_sizes(header: _Central, fields: _Fields) -> tuple[int, int, int] | None:
    """Return size, packed size and place, from the Zip64 field where the header says so; None when that cannot be."""
    values = [header.size, header.packed, header.header_at]
    if _LONG_MAX not in values:
        return header.size, header.packed, header.header_at
    found = [body for tag, body in fields if tag == _ZIP64_FIELD]
    missing = [index for index, value in enumerate(values) if value == _LONG_MAX]
    if len(found) != 1 or len(found[0]) < 8 * len(missing):
        return None
    for index, value in zip(missing, struct.unpack_from(f"<{len(missing)}Q", found[0]), strict=True):
        values[index] = value
    return values[0], values[1], values[2]


def _check_local(file: IO[bytes], directory_at: int, header: _Central, header_at: int, name: str) -> tuple[int, list[_Problem]]:
    """Hold the local header, which some programs read alone, against the directory; return where the content starts."""
    nowhere: list[_Problem] = [("ZIP_UNREADABLE", "it has no header where the directory says")]
    if header_at >= directory_at:
        return 0, nowhere
    file.seek(header_at)
    head = file.read(_LOCAL.size)
    if len(head) < _LOCAL.size or not head.startswith(b"PK\x03\x04"):
        return 0, nowhere
    _, _, flags, method, *_, name_length, extra_length = _LOCAL.unpack(head)
    raw = file.read(name_length)
    fields, _ = _read_fields(file.read(extra_length))
    problems: list[_Problem] = []
    header_name, _ = _read_name(header.raw_name, header.flags, header.system, [])
    local_name, _ = _read_name(raw, flags, header.system, [])
    unicode_name, _ = _read_name(raw, flags, header.system, fields)
    if local_name != header_name or unicode_name not in {header_name, name}:
        other = local_name if local_name != header_name else unicode_name
        problems.append(("ZIP_NAME_MISMATCH", f"the directory calls it so, its local header {show(other)}"))
    if method != header.method or (flags ^ header.flags) & _ENCRYPTED:
        problems.append(("ZIP_HEADER_MISMATCH", "its local header gives it another method or encryption than the directory"))
    return header_at + _LOCAL.size + name_length + extra_length, problems


def _split(name: str) -> tuple[tuple[str, ...], bool]:
    """Return the segments of a name and whether it is a folder's. The one place where a name becomes a path."""
    return tuple(name.removesuffix("/").split("/")), name.endswith("/")


def _check_name(name: str, segments: tuple[str, ...]) -> Iterator[_Problem]:
    problems = {
        "no name": not name,
        "an absolute path as its name": name.startswith("/"),
        "a backslash in its name": "\\" in name,
        "a control character in its name": _holds_control(name),
        "a drive in its name": name[1:2] == ":",
        "a '.' or '..' or empty segment in its name": any(segment in {"", ".", ".."} for segment in segments),
        "a segment over 255 bytes in its name": any(_length(segment) > 255 for segment in segments),
        f"a path over {_MAX_PATH_BYTES} bytes as its name": _length(name) > _MAX_PATH_BYTES,
        f"a path of more than {_MAX_SEGMENTS} segments as its name": len(segments) > _MAX_SEGMENTS,
    }
    for problem, there in problems.items():
        if there:
            yield "ZIP_UNSAFE_NAME", f"it has {problem}"
            return


def _check_kind(entry: Entry) -> Iterator[_Problem]:
    kind = stat.S_IFMT(entry.mode)
    if kind and not (stat.S_ISDIR(entry.mode) if entry.is_folder else stat.S_ISREG(entry.mode)):
        yield "ZIP_SPECIAL_FILE", "it is a link or a device, not a file"
    elif entry.attributes & _DOS_FOLDER and not entry.is_folder:
        yield "ZIP_SPECIAL_FILE", "its attributes call it a folder, its name a file"
    if entry.is_folder and entry.size:
        yield "ZIP_SPECIAL_FILE", "it is a folder with content"
    if entry.flags & _ENCRYPTED:
        yield "ZIP_ENCRYPTED", "it is encrypted"
    if entry.method not in _METHODS:
        yield "ZIP_METHOD", f"it is packed by method {entry.method}; only stored and deflate are read"


def _holds_control(name: str) -> bool:
    return any(unicodedata.category(char) in {"Cc", "Cs"} for char in name)


def _length(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _find_directory(file: IO[bytes], max_entries: int) -> tuple[int, int, int]:
    """Return count, length and start of the directory; refuse one too large to read into memory."""
    size = file.seek(0, 2)
    if size < _END.size:
        raise BadArchive([package_issue("ZIP_UNREADABLE", f"This is no zip: it has {size} bytes.")])
    tail_at = max(0, size - _END.size - _SHORT_MAX)
    tail = _read(file, tail_at, size - tail_at)
    ends = [at for at in _find_all(tail, _END_MARK) if len(tail) - at >= _END.size and _ends_at_the_end(tail, at)]
    if not ends:
        raise BadArchive([package_issue("ZIP_UNREADABLE", "This is no zip, or its end is missing.")])
    if len(ends) > 1 or tail.rfind(_END_MARK) != ends[0]:
        raise _unreadable("It has two ends, so that programs differ about what is in it.")
    _, disk, directory_disk, _, count, length, start, _ = _END.unpack_from(tail, ends[0])
    end = tail_at + ends[0]
    if end >= _END64_LOCATOR.size:
        mark, _, end64_at, _ = _END64_LOCATOR.unpack(_read(file, end - _END64_LOCATOR.size, _END64_LOCATOR.size))
        if mark == _END64_LOCATOR_MARK:
            count, length, start = _read_end64(file, end - _END64_LOCATOR.size, end64_at, (count, length, start))
            end = end64_at
    if {disk, directory_disk} - {0, _SHORT_MAX}:
        raise _unreadable("It is one part of a zip in several.")
    if count > max_entries or length > max_entries * _DIRECTORY_BYTES_PER_ENTRY:
        text = f"The zip has {count} entries in a directory of {length} bytes; the limit is {max_entries} entries."
        raise BadArchive([package_issue("ZIP_TOO_MANY_ENTRIES", text)])
    if start + length != end:
        raise _unreadable("Its directory is not where its end says: bytes are missing or added.")
    return count, length, start


def _read_end64(file: IO[bytes], locator_at: int, at: int, said: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return count, length and start of the Zip64 end; `said` is what the plain end says of them."""
    if at > locator_at - _END64.size:
        raise _unreadable("Its Zip64 end is not where its locator says.")
    mark, size, _, _, _, _, _, *found = _END64.unpack(_read(file, at, _END64.size))
    if mark != _END64_MARK or at + 12 + size != locator_at:
        raise _unreadable("Its Zip64 end is not where its locator says.")
    count, length, start = found
    fits = zip(said, found, (_SHORT_MAX, _LONG_MAX, _LONG_MAX), strict=True)
    if any(plain not in {long, unknown} for plain, long, unknown in fits):
        raise _unreadable("Its two ends differ about its directory.")
    return count, length, start


def _ends_at_the_end(tail: bytes, at: int) -> bool:
    comment: int = _END.unpack_from(tail, at)[-1]
    return at + _END.size + comment == len(tail)


def _find_all(data: bytes, mark: bytes) -> Iterator[int]:
    at = data.find(mark)
    while at >= 0:
        yield at
        at = data.find(mark, at + 1)


def _check_places(entries: list[Entry], directory_at: int) -> Iterator[Issue]:
    """Every entry has bytes of its own: overlapping entries are how small zips unpack to petabytes."""
    end = 0
    for entry in sorted(entries, key=lambda one: one.header_at):
        if not entry.data_at:
            return
        if entry.header_at < end:
            yield package_issue("ZIP_OVERLAP", f"{show(entry.name)} shares bytes with another entry.", entry.name)
            return
        end = entry.data_at + entry.packed
        if end > directory_at:
            yield package_issue("ZIP_OVERLAP", f"{show(entry.name)} runs into the directory of the zip.", entry.name)
            return


def _read(file: IO[bytes], at: int, length: int) -> bytes:
    file.seek(at)
    data = file.read(length)
    if len(data) != length:
        raise _unreadable("It ends early.")
    return data


def _unreadable(text: str) -> BadArchive:
    return BadArchive([package_issue("ZIP_UNREADABLE", f"The zip cannot be read: {text}")])
