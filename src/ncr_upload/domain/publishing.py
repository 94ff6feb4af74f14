"""What became of a publish whose renames may have broken off, and which single files are to be moved to end it.

A server that has no rename of folders copies them file by file: it may stop at any file, go on after we stopped listening, and
delete the source after each file, at the end, or not at all. So nothing but listings and sizes is believed here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

Sizes = Mapping[str, int]
"""Bytes of each file below a folder, by relative path; empty also where there is no such folder."""

Expected = Mapping[str, int | None]
"""As `Sizes`; None where the size is unknown."""


class Place(StrEnum):
    """A folder that files are moved between."""

    PACKAGE = "package"
    """What is staged."""
    FINAL = "final"
    """What the partner sees."""
    ASIDE = "aside"
    """The previous delivery, set aside."""
    SPARE = "spare"
    """Copies that are in the way of another. Nothing that exists once only is moved there."""


@dataclass(frozen=True, slots=True)
class PublishRecord:
    """What a publish was about to do. `files` is the new package; `previous` is what had the final name before: empty when
    nothing had it, None when that is unknown."""

    job_id: str
    files: Expected
    previous: Sizes | None


@dataclass(frozen=True, slots=True)
class Listing:
    """What is where, at one moment."""

    package: Sizes
    final: Sizes
    aside: Sizes


@dataclass(frozen=True, slots=True)
class Move:
    """Rename one file; its path below the folder stays."""

    path: str
    old: Place
    new: Place


@dataclass(frozen=True, slots=True)
class Settlement:
    """`moves` in order end in a complete new package under the final name if `published`, else in the previous delivery there.
    `missing` names files of that delivery which are nowhere."""

    published: bool
    moves: tuple[Move, ...] = ()
    missing: tuple[str, ...] = ()


def is_decided(record: PublishRecord, seen: Listing) -> bool:
    """Return whether one listing shows a state between two complete renames, so that nobody need wait for a second listing."""
    if not seen.package:
        return _same(seen.final, record.files)
    if not _same(seen.package, record.files):
        return False
    if seen.aside:
        return not seen.final and (record.previous is None or _same(seen.aside, record.previous))
    if record.previous is None:  # by a release before; only a copy that leaves the source could have begun
        return not _looks_copied(record, seen.final)
    return not seen.final or _same(seen.final, record.previous)


def holds(found: Sizes, expected: Expected) -> bool:
    """Return whether every expected file is in the folder with its size."""
    return all(_fits(found.get(path), size) for path, size in expected.items())


def is_exactly(found: Sizes, expected: Expected) -> bool:
    """Return whether the folder holds these files and no other."""
    return bool(found) and _same(found, expected)


def plan_settlement(record: PublishRecord, seen: Listing, *, may_finish: bool) -> Settlement:
    """Decide from a listing that stands still what a publish came to, and how to end it.

    A publish that had begun to move the package is finished if the package is complete, in one place or in two; every other
    one is undone. Neither way overwrites a file or gives up one that exists once only. Without `may_finish` all are undone but
    for a package that is complete under its final name already.
    """
    state = _State(record, seen)
    if state.has_begun() and not state.missing_new() and (may_finish or state.is_complete()):
        return Settlement(True, state.finish() if may_finish else ())
    return Settlement(False, state.undo(), state.missing_old())


def find_strangers(record: PublishRecord, seen: Listing) -> Collection[str]:
    """Name the files under the final name that neither the package nor the previous delivery explains."""
    old = record.previous or {}
    return sorted(
        path
        for path, size in seen.final.items()
        if not any(path in known and _may_become(size, known[path]) for known in (record.files, old, seen.aside))
    )


class _State:
    """One listing, read file by file."""

    def __init__(self, record: PublishRecord, seen: Listing) -> None:
        self.package, self.final, self.aside = seen.package, seen.final, seen.aside
        self.record, self.new = record, record.files
        self.knows_previous = record.previous is not None
        self.recorded: Sizes = record.previous or {}
        self.old: Sizes = {**seen.aside, **self.recorded}
        """What was set aside belongs to the previous delivery, recorded or not."""

    def has_begun(self) -> bool:
        """Whether the package has begun to move, by its own folder or, where the server leaves the source, by the copies."""
        if any(not self._is_staged(path) for path in self.new):
            return True
        is_safe = self.knows_previous and all(self._is_aside(path) for path in self.old)
        return is_safe and _looks_copied(self.record, self.final)

    def missing_new(self) -> tuple[str, ...]:
        return tuple(path for path in self.new if not (self._is_staged(path) or self._is_published(path)))

    def missing_old(self) -> tuple[str, ...]:
        return tuple(path for path in self.recorded if not (self._is_aside(path) or self._is_old(path)))

    def is_complete(self) -> bool:
        """Whether the final name has every file of the package, and its folder has them no longer."""
        left = not self.package or any(not self._is_staged(path) for path in self.new)
        return left and all(self._is_published(path) for path in self.new)

    def finish(self) -> tuple[Move, ...]:
        away: list[Move] = []
        into: list[Move] = []
        for path in self.final:
            if path in self.new and not self._is_staged(path):
                continue
            away += self._clear_final(path)
        for path in self.new:
            if self._is_staged(path):
                into.append(Move(path, Place.PACKAGE, Place.FINAL))
        return (*away, *into)

    def undo(self) -> tuple[Move, ...]:
        away: list[Move] = []
        into: list[Move] = []
        for path in self.final:
            if path not in self.aside:
                away += self._take_back(path)
        for path in self.aside:
            if path not in self.final:
                into.append(Move(path, Place.ASIDE, Place.FINAL))
            elif not self._is_aside(path) and _fits(self.final[path], self.old[path]):
                away.append(Move(path, Place.ASIDE, Place.SPARE))
            else:
                away += self._take_back(path) or [Move(path, Place.FINAL, Place.SPARE)]
                into.append(Move(path, Place.ASIDE, Place.FINAL))
        return (*away, *into)

    def _take_back(self, path: str) -> list[Move]:
        """Move a file of the package, or a copy of one, from the final name; leave what may be the previous delivery's."""
        size = self.final[path]
        may_be_old = path in self.recorded and not self._is_aside(path)
        if path not in self.new or (may_be_old and _fits(size, self.recorded[path])):
            return []
        if self._is_staged(path):
            is_copy = self.knows_previous and not may_be_old and _may_become(size, self.new[path])
            return [Move(path, Place.FINAL, Place.SPARE)] if is_copy else []
        if not _fits(size, self.new[path]):
            return []
        half_copied = [Move(path, Place.PACKAGE, Place.SPARE)] if path in self.package else []
        return [*half_copied, Move(path, Place.FINAL, Place.PACKAGE)]

    def _clear_final(self, path: str) -> list[Move]:
        """Make the final name free of a file that is not the new package's."""
        if path in self.aside:
            if self._is_aside(path):
                return [Move(path, Place.FINAL, Place.SPARE)]
            return [Move(path, Place.ASIDE, Place.SPARE), Move(path, Place.FINAL, Place.ASIDE)]
        is_copy = self.knows_previous and self._is_staged(path) and path not in self.recorded
        return [Move(path, Place.FINAL, Place.SPARE if is_copy else Place.ASIDE)]

    def _is_staged(self, path: str) -> bool:
        return path in self.new and _fits(self.package.get(path), self.new[path])

    def _is_aside(self, path: str) -> bool:
        return _fits(self.aside.get(path), self.old.get(path))

    def _is_published(self, path: str) -> bool:
        """Whether the final name has the package's file and not the previous delivery's, where both have the same size."""
        if not _fits(self.final.get(path), self.new[path]):
            return False
        may_be_old = path in self.recorded and _fits(self.final[path], self.recorded[path]) and not self._is_aside(path)
        return not may_be_old or not self.package

    def _is_old(self, path: str) -> bool:
        return _fits(self.final.get(path), self.recorded[path])


def _looks_copied(record: PublishRecord, final: Sizes) -> bool:
    files = record.files
    return bool(final) and all(path in files and _may_become(size, files[path]) for path, size in final.items())


def _fits(found: int | None, expected: int | None) -> bool:
    return found is not None and expected in (None, found)


def _may_become(found: int, expected: int | None) -> bool:
    return expected is None or found <= expected


def _same(found: Sizes, expected: Expected) -> bool:
    return found.keys() == expected.keys() and holds(found, expected)
