"""Where each file of a job goes inside its package (docs/contract.md, section 3).

The rules, first that fits wins; extensions and folder names match in any case, the SKU too:

    1  *.blend                                        {sku}/sources/{sku}.blend
    2  *.glb under GLB_files                          {sku}/{sku}.glb
    3  *.glb under Materials                          {sku}/materials/{material id}.glb
    4  *.glb directly in {sku}, or named {sku}.glb    {sku}/{sku}.glb, or as rule 3 when rule 2 gave the main model
    5  *.fbx *.obj *.gltf *.bin *.mtl *.usdz          {sku}/{parent, lower case}/{name}
    6  under material(s)/sources                      {sku}/materials/sources/{name}
    7  under material(s)                              {sku}/materials/{name}
    8  under sources                                  {sku}/sources/{name}
    9  the rest                                       {sku}/{parent, lower case}/{name}

A folder matches by its whole name: `old_GLB_files_backup` is no `GLB_files`. A file outside any folder fits neither 5 nor 9.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Literal

from ncr_upload.domain.errors import Rejected
from ncr_upload.domain.packages import PlannedFile, SourceFile
from ncr_upload.domain.paths import find_segment_problem, fold
from ncr_upload.domain.timestamps import parse_timestamp

Collisions = Literal["refuse", "newest"]

MODEL_EXTENSIONS = (".fbx", ".obj", ".gltf", ".bin", ".mtl", ".usdz")
TEXTURE_EXTENSIONS = (
    ".png", ".jpg", ".jpeg", ".webp", ".avif", ".tga", ".tif", ".tiff", ".bmp", ".exr", ".hdr", ".ktx", ".ktx2", ".dds", ".psd",
)  # fmt: skip

_UUID = re.compile(r"(?<![0-9a-f])[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}(?![0-9a-f])", re.IGNORECASE | re.ASCII)
_NO_SKU = frozenset({"none", "null"})


@dataclass(frozen=True, slots=True)
class Layout:
    """The plan: `files` sorted by target, every target once. `notes` are for the job's timeline."""

    files: tuple[PlannedFile, ...]
    notes: tuple[str, ...] = ()


def plan_layout(files: Sequence[SourceFile], sku: str, collisions: Collisions = "refuse") -> Layout:
    """Give every file its target. The order of `files` changes nothing, in the plan or in the refusal; a key listed twice
    is one file.

    Raises `Rejected`: `sku_invalid`, `no_files`, `hostile_key`, `unplaceable_key`, `case_collision` (targets that differ
    only in case or Unicode form), `layout_collision` (two sources for one target). With `collisions='newest'` the newest
    source by timestamp takes the target and a note names the others; equal or unreadable timestamps are still refused.
    """
    _check_sku(sku)
    if not files:
        raise Rejected("no_files", f"SKU {sku!r} has no file to lay out", "Check that the job has files in job_files.")
    sources = _read_sources(files)
    rules = _Rules(sku, sources)
    placed = [(rules.place(source), source) for source in sources]
    for target, source in placed:
        _check_target(target, source)
    winners, notes = _settle_collisions(placed, collisions)
    _check_folders(winners)
    notes += rules.notes() + _note_separated(winners)
    return Layout(tuple(PlannedFile(source.key, target) for target, source in sorted(winners.items())), tuple(notes))


# --- the rules --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Source:
    """A source file taken apart. `folders` are folded; `parent` is the last folder as it is spelled, if there is one."""

    key: str
    at: datetime | None
    path: tuple[str, ...]
    folders: tuple[str, ...]
    parent: str | None
    name: str

    def ends(self, *extensions: str) -> bool:
        return self.name.lower().endswith(extensions)

    def is_under(self, *folders: str) -> bool:
        return any(folder in self.folders for folder in folders)


class _Rules:
    """The table, for the files of one job."""

    def __init__(self, sku: str, sources: Sequence[_Source]) -> None:
        self._sku = sku
        self._sku_ids = _find_ids(sku).keys()
        self._main = f"{sku}/{sku}.glb"
        self._has_main = any(source.ends(".glb") and source.is_under("glb_files") for source in sources)
        self._texture_ids: dict[str, str] = {}
        for source in sources:
            if source.ends(*TEXTURE_EXTENSIONS):
                self._texture_ids |= self._find_material_ids(source.name)
        self._notes: list[str] = []

    def notes(self) -> list[str]:
        return self._notes

    def place(self, source: _Source) -> str:
        """The target of one source. Raises `Rejected('unplaceable_key')`."""
        sku, name = self._sku, source.name
        if source.ends(".blend"):
            return f"{sku}/sources/{sku}.blend"
        if source.ends(".glb") and (target := self._place_glb(source)):
            return target
        if source.ends(*MODEL_EXTENSIONS):
            return self._place_beside(source)
        if any(first in ("material", "materials") and then == "sources" for first, then in pairwise(source.folders)):
            return f"{sku}/materials/sources/{name}"
        if source.is_under("material", "materials"):
            return f"{sku}/materials/{name}"
        if source.is_under("sources"):
            return f"{sku}/sources/{name}"
        return self._place_beside(source)

    def _place_glb(self, source: _Source) -> str | None:
        if source.is_under("glb_files"):
            return self._main
        if source.is_under("materials"):
            return self._place_material(source)
        if source.folders[-1:] == (fold(self._sku),) or fold(source.name) == fold(f"{self._sku}.glb"):
            if not self._has_main:
                return self._main
            self._notes.append(f"{source.key!r} was placed as a material: the main model comes from GLB_files")
            return self._place_material(source)
        return None

    def _place_material(self, source: _Source) -> str:
        own = self._find_material_ids(source.name)
        ids = own or self._texture_ids
        if len(ids) != 1:
            found = "several UUIDs" if own else "no UUID of its own"
            textures = "" if own else f", and the job's texture names carry {len(ids) or 'none'}"
            raise Rejected(
                "unplaceable_key",
                f"the material GLB {source.key!r} has {found} in its file name{textures}, so it has no material id",
                "Put the material's one UUID (8-4-4-4-12 hex digits, not the SKU's) into the GLB's file name.",
            )
        (material_id,) = ids.values()
        if not own:
            self._notes.append(f"{source.key!r} took its material id {material_id} from the job's texture names")
        return f"{self._sku}/materials/{material_id}.glb"

    def _place_beside(self, source: _Source) -> str:
        if source.parent is None:
            raise Rejected(
                "unplaceable_key",
                f"{source.key!r} is in no folder, so no rule of the layout places it",
                "Move the file into a folder of the job (textures, sources, …) and upload it again.",
            )
        return f"{self._sku}/{source.parent.lower()}/{source.name}"

    def _find_material_ids(self, name: str) -> dict[str, str]:
        return {lower: spelled for lower, spelled in _find_ids(name).items() if lower not in self._sku_ids}


def _find_ids(text: str) -> dict[str, str]:
    """The UUIDs in `text`, by their lower case; the value is the UUID as it is spelled there."""
    return {found.lower(): found for found in _UUID.findall(text)}


# --- the refusals -----------------------------------------------------------------------------------------------


def _check_sku(sku: str) -> None:
    problem = find_segment_problem(sku) if isinstance(sku, str) else "is missing"
    if problem is None and (sku != sku.strip() or fold(sku) in _NO_SKU):
        problem = "is no name for a folder"
    if problem is not None:
        raise Rejected("sku_invalid", f"the SKU {sku!r} {problem}", "Correct sku_id in the job's job_details row.")


def _read_sources(files: Iterable[SourceFile]) -> list[_Source]:
    """Each key once, with its newest timestamp, in the order of the keys. Raises `Rejected('hostile_key')`."""
    newest: dict[str, datetime | None] = {}
    for file in files:
        at = parse_timestamp(file.timestamp)
        known = newest.setdefault(file.key, at)
        if at is not None and (known is None or at > known):
            newest[file.key] = at
    return [_read_source(key, at) for key, at in sorted(newest.items())]


def _read_source(key: str, at: datetime | None) -> _Source:
    if not key:
        raise _refuse_hostile(key, "it is empty")
    if key.startswith("/"):
        raise _refuse_hostile(key, "it is an absolute path")
    path = tuple(key.split("/"))
    for segment in path:
        if problem := find_segment_problem(segment):
            raise _refuse_hostile(key, f"its segment {segment!r} {problem}")
    *folders, name = path
    return _Source(key, at, path, tuple(fold(folder) for folder in folders), folders[-1] if folders else None, name)


def _check_target(target: str, source: _Source) -> None:
    """A target can be worse than its key: '{sku}.blend' is longer than the SKU, some lower-case letters than the upper-case."""
    for segment in target.split("/"):
        if problem := find_segment_problem(segment):
            raise _refuse_hostile(source.key, f"in its place in the package, {target!r}, the segment {segment!r} {problem}")


def _refuse_hostile(key: str, problem: str) -> Rejected:
    """Where a presigned URL stands in for a key, its query is a secret and is not told."""
    address, mark, _ = key.partition("?")
    if mark and "://" in address:
        key, problem = f"{address}?…", "it is a URL; a key is the path inside the bucket"
    return Rejected(
        "hostile_key", f"the object key {key!r} cannot be used: {problem}", "Rename the object and its file_path in job_files."
    )


def _settle_collisions(placed: Iterable[tuple[str, _Source]], collisions: Collisions) -> tuple[dict[str, _Source], list[str]]:
    rivals: defaultdict[str, list[tuple[str, _Source]]] = defaultdict(list)
    for target, source in placed:
        rivals[fold(target)].append((target, source))
    winners: dict[str, _Source] = {}
    notes: list[str] = []
    for group in rivals.values():
        target, winner = group[0]
        if len(group) > 1:
            winner = _settle(group, collisions)
            others = _name_keys(source.key for _, source in group if source is not winner)
            notes.append(f"{target!r} is taken from {winner.key!r}, the newest; left out: {others}")
        winners[target] = winner
    return winners, notes


def _settle(group: Sequence[tuple[str, _Source]], collisions: Collisions) -> _Source:
    """The one source that may have the target."""
    sources = [source for _, source in group]
    keys = _name_keys(source.key for source in sources)
    targets = sorted({target for target, _ in group})
    if len(targets) > 1:
        raise Rejected(
            "case_collision",
            f"{keys} would land at {' and '.join(repr(target) for target in targets)}, "
            "which differ only in case or Unicode form and are one file on many disks",
            "Rename one of them, or remove it from the job.",
        )
    clash = f"{keys} would all land at {targets[0]!r}"
    if collisions == "refuse":
        raise Rejected(
            "layout_collision", clash, "Remove or rename all but one, or set LAYOUT_COLLISIONS=newest to let the newest win."
        )
    dated = sorted((source.at, source.key, source) for source in sources if source.at is not None)
    if len(dated) < len(sources) or dated[-1][0] == dated[-2][0]:
        raise Rejected(
            "layout_collision", f"{clash} and no timestamp says which is the newest", "Remove or rename all but one."
        )
    return dated[-1][2]


def _check_folders(winners: dict[str, _Source]) -> None:
    """No target may be a folder of another. Raises `Rejected('layout_collision')`."""
    taken = {fold(target): source for target, source in winners.items()}
    for target, source in sorted(winners.items()):
        folded = fold(target)
        while "/" in folded:
            folded = folded.rpartition("/")[0]
            if folded in taken:
                raise Rejected(
                    "layout_collision",
                    f"{_name_keys([taken[folded].key, source.key])} cannot both be placed: the one is a file where the other, "
                    f"at {target!r}, needs a folder",
                    "Rename one of them, or remove it from the job.",
                )


def _name_keys(keys: Iterable[str]) -> str:
    """The keys in words, at most five of them."""
    names = sorted(keys)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in names[:5]) + more


# --- what the timeline should know ------------------------------------------------------------------------------


def _note_separated(winners: dict[str, _Source]) -> list[str]:
    """A .gltf names its .bin and textures by relative paths. Rules 5 to 9 keep those in its own folder beside it when that
    is no materials or sources folder, but move what is in folders below it. Only the .gltf says whether it names them: the
    validator, which reads it, refuses the package then; the note says why."""
    notes = []
    for target, gltf in sorted(winners.items()):
        if not gltf.ends(".gltf"):
            continue
        home, below = target.rpartition("/")[0], gltf.path[:-1]
        moved = [
            source.key
            for place, source in winners.items()
            if source.ends(".bin", *TEXTURE_EXTENSIONS)
            and source.path[: len(below)] == below
            and place != "/".join((home, *source.path[len(below) :]))
        ]
        if moved:
            notes.append(f"the layout moves {_name_keys(moved)} away from {gltf.key!r}: what it names of them it will not find")
    return notes
