"""Bounds every text that came from outside, so that it fits each column, message and log line it may reach.

The limits grow from the inside out: what is quoted fits an error's message, that one a problem's, and that one a status. So our
own words around a text are never what is cut. The largest fits a TEXT column of MySQL (65,535 bytes) four times over.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

CUT = "…"
"""Follows a text wherever it was cut off."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LARGEST_JSON_INTEGER = 2**63 - 1
MAX_JSON_VALUES = 100_000
MAX_JSON_LEVELS = 64
JSON_LEVELS = 32
"""MySQL takes 100 levels of nesting."""

_UNKEEPABLE = re.compile("[\0\ud800-\udfff]")
"""PostgreSQL refuses NUL in a text, and lone surrogates have no UTF-8 form."""

_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SPACES = re.compile("[\\s\x85\u2028\u2029]+")


@dataclass(frozen=True, slots=True)
class Limit:
    """The longest a text may be. Databases count characters (VARCHAR) or bytes of UTF-8 (MySQL's TEXT)."""

    characters: int
    bytes: int


CODE = Limit(64, 64)
NAME = Limit(100, 200)
QUOTE = Limit(300, 600)
"""For a server's words inside a sentence of ours."""

REASON = Limit(400, 800)
REASONS = Limit(2_000, 4_000)
NEXT_STEP = Limit(1_500, 3_000)
MESSAGE = Limit(4_000, 8_000)
"""For an error's own message: two object keys of 1,024 bytes and the words around them."""

PROBLEM = Limit(5_000, 10_000)
STATUS = Limit(7_000, 14_000)
LOG_VALUE = Limit(10_000, 20_000)


def bound_text(text: str, limit: Limit, *, characters_in_all: int | None = None) -> str:
    """Return `text` within `limit`, without characters that a database refuses. Where it is cut, its end says how long it was.

    `characters_in_all` is that length, where `text` itself is only the beginning.
    """
    total = len(text) if characters_in_all is None else characters_in_all
    kept = clean(text[: limit.characters + 1])
    if total == len(kept) and _fits(kept, limit):
        return kept
    mark = f"{CUT} ({total:,} characters in all)"
    if 2 * len(mark) > min(limit.characters, limit.bytes):
        mark = CUT if limit.bytes >= len(CUT.encode()) else ""
    room = Limit(limit.characters - len(mark), limit.bytes - len(mark.encode()))
    return _first_bytes(kept[: max(0, room.characters)], room.bytes) + (mark if limit.characters > 0 else "")


def bound_line(text: str, limit: Limit, *, characters_in_all: int | None = None) -> str:
    """As `bound_text`, in one line: control characters go, and white space is single."""
    window = text[: 8 * (limit.characters + 1)]
    line = _SPACES.sub(" ", _CONTROLS.sub(REPLACEMENT, window)).strip()
    total = len(text) if characters_in_all is None else characters_in_all
    was_cut = total > len(window)
    return bound_text(line, limit, characters_in_all=total if was_cut else None)


def join_bounded(parts: Iterable[str], limit: Limit, separator: str = "; ") -> str:
    """Join as many parts as fit, and say how many more there are."""
    remaining = list(parts)
    kept: list[str] = []
    characters = size = 0
    for part in remaining:
        characters += len(part) + len(separator)
        size += len(part.encode("utf-8", "replace")) + len(separator)
        if kept and (characters > limit.characters or size > limit.bytes):
            break
        kept.append(bound_text(part, limit))
    left = len(remaining) - len(kept)
    return separator.join(kept) + (f"{separator}and {left:,} more" if left else "")


def clean(text: str) -> str:
    """Replace what no database takes: NUL and lone surrogates. The length stays."""
    return text if text.isascii() and "\0" not in text else _UNKEEPABLE.sub(REPLACEMENT, text)


def bound_json(value: Any, max_bytes: int) -> Any:
    """Return what `json.loads` gave in a form that every database's JSON takes, and that is written in at most `max_bytes`.

    Texts and lists are shortened, evenly, until it fits; an object then says so under ``ncr_shortened``.
    """
    for characters, items in ((20_000, 5_000), (2_000, 1_000), (400, 200), (100, 50), (40, 10), (10, 3)):
        pruning = _Pruning(characters, items)
        pruned = pruning.prune(value, JSON_LEVELS)
        if pruning.cut and isinstance(pruned, dict):
            pruned = {**pruned, "ncr_shortened": "texts and lists of this answer were shortened"}
        if len(json.dumps(pruned)) <= max_bytes:
            return pruned
    return {"ncr_shortened": f"the answer is too large to be kept in {max_bytes:,} bytes"}


def parse_json(content: bytes) -> Any:
    """Return what the JSON says. Raises `ValueError` for what is none, and for more values or levels than anybody can use: each
    takes some hundred bytes of memory, so they are counted before one is built."""
    values = content.count(b",") + content.count(b"[") + content.count(b"{")
    if values > MAX_JSON_VALUES or nesting_exceeds(content, MAX_JSON_LEVELS):
        raise ValueError("too many values, or nested too deep")
    return json.loads(content)


def nesting_exceeds(content: bytes, levels: int) -> bool:
    """Return whether JSON is nested deeper than that, without building it."""
    depth = 0
    for found in _BRACKETS.finditer(content):
        match found[0]:
            case b"[" | b"{":
                depth += 1
                if depth > levels:
                    return True
            case b"]" | b"}":
                depth -= 1
    return False


_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
"""A text that never ends is one all the same: else the search would begin anew at each quote in it."""


class _Pruning:
    def __init__(self, characters: int, items: int) -> None:
        self.cut = False
        self._text = Limit(characters, 3 * characters)
        self._items = items

    def prune(self, value: Any, levels: int) -> Any:
        match value:
            case str():
                return self._prune_text(value)
            case bool() | None:
                return value
            case int():
                return value if abs(value) <= LARGEST_JSON_INTEGER else self._prune_text(_digits(value))
            case float():
                return value if math.isfinite(value) else str(value)
            case list() | tuple():
                return self._prune_list(value, levels)
            case dict():
                kept = list(value.items())[: self._items]
                self.cut |= len(kept) < len(value)
                if levels == 0 and value:
                    return self._too_deep()
                return {self._prune_text(str(name)): self.prune(each, levels - 1) for name, each in kept}
            case _:
                return self._prune_text(str(value))

    def _prune_list(self, value: list[Any] | tuple[Any, ...], levels: int) -> Any:
        if levels == 0 and value:
            return self._too_deep()
        self.cut |= len(value) > self._items
        return [self.prune(each, levels - 1) for each in value[: self._items]]

    def _prune_text(self, text: str) -> str:
        bounded = bound_text(text, self._text)
        self.cut |= len(bounded) != len(text)
        return bounded

    def _too_deep(self) -> str:
        self.cut = True
        return CUT


def _digits(number: int) -> str:
    try:
        return str(number)
    except ValueError:  # Python writes no more than some thousand digits
        return f"a number of {number.bit_length():,} bits"


def _fits(text: str, limit: Limit) -> bool:
    if len(text) > limit.characters:
        return False
    return 4 * len(text) <= limit.bytes or len(text.encode()) <= limit.bytes


def _first_bytes(text: str, size: int) -> str:
    encoded = text.encode()
    return text if len(encoded) <= size else encoded[: max(0, size)].decode("utf-8", "ignore")
