"""What may be a segment of a path, and which paths are the same to somebody else's disk."""

from __future__ import annotations

import unicodedata

MAX_SEGMENT_BYTES = 255
"""The longest name that ext4, XFS, APFS and NTFS all take."""

_UNSAFE_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Control characters, lone surrogates (they have no UTF-8 form), line and paragraph separators."""


def fold(path: str) -> str:
    """`path` such that two paths fold alike when they differ at most in case or Unicode form (Unicode 3.13, D145)."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())


def find_segment_problem(segment: str) -> str | None:
    """Why `segment` may not be one step of a path, in words that follow its name ('is empty'); None when it may."""
    if not segment:
        return "is empty"
    if segment == ".":
        return "is a single dot"
    if ".." in segment:
        return "contains '..'"
    if any(unicodedata.category(character) in _UNSAFE_CATEGORIES for character in segment):
        return "contains a control character"
    if "/" in segment or "\\" in segment:
        return "contains a slash or backslash"
    size_bytes = len(segment.encode())
    if size_bytes > MAX_SEGMENT_BYTES:
        return f"is {size_bytes} bytes long (at most {MAX_SEGMENT_BYTES})"
    return None
