"""Judging a package or a single file: unpack, look into each file, add up what was found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import IO

from ncr_validator.archive import BadArchive, Unpacked, unpack
from ncr_validator.bench import Bench
from ncr_validator.layout import check_layout
from ncr_validator.limits import Limits
from ncr_validator.verdicts import FileReport, Issue, Report


def judge_package(archive: IO[bytes], sku: str, folder: Path, limits: Limits, bench: Bench) -> Report:
    """Judge the zip `archive` as the package of `sku`, unpacking it into the empty `folder`.

    Raises `Undecided` when a part of the validator failed and `NoRoom` when the disk is full: that is no verdict.
    """
    bench.warm_up()
    try:
        files, damage = unpack(archive, folder, limits)
    except BadArchive as refusal:
        return _report(sku, (), refusal.issues, bench)
    names = [file.name for file in files] + [issue.file for issue in damage if issue.file]
    about_package = (*damage, *check_layout(names, sku, limits.main_model))
    return _report(sku, _look_into(files, folder, bench), about_package, bench)


def judge_file(path: Path, bench: Bench) -> Report:
    """Judge one file where it lies; what it refers to must be in its folder. Raises `Undecided`."""
    bench.warm_up()
    file = Unpacked(path.name, path, path.stat().st_size)
    return _report(None, _look_into([file], path.parent, bench), (), bench)


def _report(sku: str | None, files: tuple[FileReport, ...], about_package: tuple[Issue, ...], bench: Bench) -> Report:
    return Report(sku, files, (*about_package, *bench.profile.notes), bench.engines(), bench.profile.name)


def _look_into(files: list[Unpacked], root: Path, bench: Bench) -> tuple[FileReport, ...]:
    return tuple(
        FileReport(
            file.name,
            file.size,
            findings.checked,
            tuple(replace(issue, file=file.name) for issue in findings.issues),
            findings.facts,
        )
        for file, findings in zip(files, bench.look_into_all(files, root), strict=True)
    )
