"""Which of the studio's files for a job go into its package (docs/contract.md, section 1)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from ncr_upload.domain.errors import Rejected
from ncr_upload.domain.packages import SourceFile
from ncr_upload.domain.paths import fold
from ncr_upload.domain.timestamps import parse_timestamp

FileSelection = Literal["latest_date", "latest_per_path", "all"]

_REFERENCE_PICTURE = re.compile(r"source_.*\.(jpg|jpeg|png|webp|avif)", re.IGNORECASE | re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Selection:
    """The files kept, sorted by key, each key once; how many older ones and reference pictures were left out; `summary`
    says so in the job's timeline."""

    files: tuple[SourceFile, ...]
    older: int
    reference_pictures: int
    summary: str


def select_files(files: Sequence[SourceFile], rule: FileSelection, *, job_id: str) -> Selection:
    """Choose by `rule`; the order of `files` changes nothing. The same key listed twice is one file, the newer row counts.

    Reference pictures are left out first: they are no part of the package, so one added a day later neither is delivered
    nor makes the model's own files "older". Then

    - `latest_date` keeps the files of the newest calendar date (the studio's rule),
    - `latest_per_path` keeps the newest of the keys that differ only in case or Unicode form (a tie keeps both),
    - `all` keeps all.

    Raises `Rejected`: `no_files`; `timestamp_invalid` where a rule needs a time that a row does not have, since leaving
    the file out, or taking it in, would be a guess.
    """
    listed = _newest_rows(files)
    candidates = [file for file in listed if not is_reference_picture(file.key)]
    if not candidates:
        found = f"only {len(listed)} reference picture(s)" if listed else "no rows with file_type='base'"
        raise Rejected("no_files", f"job {job_id!r} has {found} in job_files", "Upload the job's files, then submit it again.")
    if rule == "latest_date":
        kept, scope = _keep_latest_date(candidates)
    elif rule == "latest_per_path":
        kept, scope = _keep_latest_per_path(candidates), "the newest of each path"
    else:
        kept, scope = candidates, "all files"
    older, pictures = len(candidates) - len(kept), len(listed) - len(candidates)
    summary = f"{len(kept)} file(s) selected ({scope}), left out: {older} older, {pictures} reference picture(s)"
    return Selection(tuple(kept), older, pictures, summary)


def is_reference_picture(key: str) -> bool:
    """Whether the *file* (not a folder) is named `source_….jpg|jpeg|png|webp|avif`, in any case."""
    return _REFERENCE_PICTURE.fullmatch(key.rpartition("/")[2]) is not None


def _newest_rows(files: Iterable[SourceFile]) -> list[SourceFile]:
    """Each key once, sorted; among its rows the newest, where a row without a readable time counts as the oldest."""
    rows: dict[str, SourceFile] = {}
    for file in files:
        known = rows.get(file.key)
        if known is None or _rank(file) > _rank(known):
            rows[file.key] = file
    return [rows[key] for key in sorted(rows)]


def _rank(file: SourceFile) -> tuple[str, str]:
    at = parse_timestamp(file.timestamp)
    return at.isoformat() if at else "", file.timestamp


def _keep_latest_date(files: Sequence[SourceFile]) -> tuple[list[SourceFile], str]:
    newest = max(_read_time(file) for file in files).date()
    return [file for file in files if _read_time(file).date() == newest], f"those of {newest.isoformat()}, the newest date"


def _keep_latest_per_path(files: Sequence[SourceFile]) -> list[SourceFile]:
    same_path: defaultdict[str, list[SourceFile]] = defaultdict(list)
    for file in files:
        same_path[fold(file.key)].append(file)
    kept: list[SourceFile] = []
    for group in same_path.values():
        newest = max(_read_time(file) for file in group) if len(group) > 1 else None
        kept += [file for file in group if newest is None or _read_time(file) == newest]
    return sorted(kept, key=lambda file: file.key)


def _read_time(file: SourceFile) -> datetime:
    at = parse_timestamp(file.timestamp)
    if at is None:
        raise Rejected(
            "timestamp_invalid",
            f"the job_files row of {file.key!r} has the timestamp {file.timestamp!r}, so it cannot be told old from new",
            "Correct its timestamp in job_files, or set FILE_SELECTION=all.",
        )
    return at
