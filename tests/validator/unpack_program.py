"""Unpack the zips that the command line names, each into a folder of its own; standard library and `src` only.

    python unpack_program.py WORK ZIP...

Prints a JSON object: for each zip the codes it is refused by, what was written inside, and what outside, of its folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from ncr_validator.archive import BadArchive, unpack

LIMITS = SimpleNamespace(max_entries=100, max_entry_mb=64, max_unpacked_mb=128, max_ratio=100, ratio_floor_mb=100)


def unpack_one(path: Path, work: Path) -> dict[str, object]:
    """Unpack one zip three folders deep, so that what climbs out of its folder is still found below `work`."""
    place = work / path.stem
    folder = place / "above" / "package"
    folder.mkdir(parents=True)
    codes: list[str] = []
    names: dict[str, str] = {}
    with path.open("rb") as file:
        try:
            files, issues = unpack(file, folder, LIMITS)  # type: ignore[arg-type]
            names = {one.name: one.path.relative_to(folder).as_posix() for one in files}
            codes = [issue.code for issue in issues]
        except BadArchive as refusal:
            codes = [issue.code for issue in refusal.issues]
    written = {path for path in place.rglob("*") if path.is_file() or path.is_symlink()}
    inside = {one.relative_to(folder).as_posix() for one in written if one.is_relative_to(folder)}
    return {"codes": sorted(set(codes)), "names": names, "inside": sorted(inside), "outside": len(written) - len(inside)}


if __name__ == "__main__":
    json.dump({path: unpack_one(Path(path), Path(sys.argv[1])) for path in sys.argv[2:]}, sys.stdout)
