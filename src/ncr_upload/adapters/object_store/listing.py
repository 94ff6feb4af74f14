"""Read a page of ListObjectsV2 while it arrives, in constant memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.parsers import expat

MAX_TEXT = 8192
"""No key is longer than 1024 bytes."""


@dataclass(frozen=True, slots=True)
class Listed:
    key: str
    size: int
    etag: str


@dataclass(slots=True)
class ListPage:
    entries: list[Listed] = field(default_factory=list)
    next_token: str = ""


class ListParser:
    """Collects at most `max_entries` objects. Raises `ValueError` for what is not such a page."""

    def __init__(self, max_entries: int) -> None:
        self.page = ListPage()
        self._max_entries = max_entries
        self._path: list[str] = []
        self._text: list[str] = []
        self._text_length = 0
        self._fields: dict[str, str] = {}
        self._is_truncated = False
        self._token = ""
        self._expat = expat.ParserCreate(namespace_separator=" ")
        self._expat.StartElementHandler = self._start
        self._expat.EndElementHandler = self._end
        self._expat.CharacterDataHandler = self._characters
        self._expat.StartDoctypeDeclHandler = self._refuse_doctype

    def feed(self, chunk: bytes | memoryview, *, is_last: bool = False) -> None:
        try:
            self._expat.Parse(bytes(chunk), is_last)
        except expat.ExpatError as error:
            raise ValueError(f"not XML: {expat.errors.messages.get(error.code, '')}") from None

    def finish(self) -> ListPage:
        self.feed(b"", is_last=True)
        if self._is_truncated:
            self.page.next_token = self._token
        return self.page

    def _start(self, name: str, _attributes: object) -> None:
        self._path.append(name.rpartition(" ")[2])
        if self._path[0] != "ListBucketResult" or len(self._path) > 8:
            raise ValueError("not a list of objects")
        self._text.clear()
        self._text_length = 0
        if self._path[1:] == ["Contents"]:
            self._fields = {}

    def _characters(self, text: str) -> None:
        self._text_length += len(text)
        if self._text_length > MAX_TEXT:
            raise ValueError("a text in the list is too long")
        self._text.append(text)

    def _end(self, _name: str) -> None:
        text = "".join(self._text)
        match self._path[1:]:
            case ["Contents", ("Key" | "Size" | "ETag") as field_name]:
                self._fields[field_name] = text
            case ["Contents"]:
                self._add()
            case ["IsTruncated"]:
                self._is_truncated = text.strip() == "true"
            case ["NextContinuationToken"]:
                self._token = text
        self._path.pop()
        self._text.clear()
        self._text_length = 0

    def _add(self) -> None:
        size = self._fields.get("Size", "").strip()
        if "Key" not in self._fields or not (size.isascii() and size.isdecimal() and len(size) <= 19):
            raise ValueError("an object in the list has no key or no size")
        if len(self.page.entries) >= self._max_entries:
            raise ValueError("the list has more objects than were asked for")
        self.page.entries.append(Listed(self._fields["Key"], int(size), self._fields.get("ETag", "").strip()))

    def _refuse_doctype(self, *_: object) -> None:
        raise ValueError("a list has no DOCTYPE")
