"""Judging a package or a single file: unpack, look into each file, add up what was found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ncr_validator.archive import BadArchive, Unpacked, unpack
from ncr_validator.bench import Bench
from ncr_validator.layout import check_layout, extension
from ncr_validator.limits import Limits
from ncr_validator.verdicts import FileReport, Issue, Report


def judge_package(archive: Path, sku: str, folder: Path, limits: Limits, bench: Bench) -> Report:
    """Judge the zip `archive` as the package of `sku`, unpacking it into the empty `folder`.

    Raises `Undecided` when a part of the validator failed: that is no verdict.
    """
    bench.warm_up()
    try:
        files, damage = unpack(archive, folder, limits)
    except BadArchive as refusal:
        return Report(sku, (), refusal.issues, bench.engines(), bench.profile_name)
    names = [file.name for file in files] + [issue.file for issue in damage if issue.file]
    package_issues = (*damage, *check_layout(names, sku, limits.main_model))
    return Report(sku, _look_into(files, folder, bench), package_issues, bench.engines(), bench.profile_name)


def judge_file(path: Path, bench: Bench) -> Report:
    """Judge one file where it lies; what it refers to must be in its folder."""
    bench.warm_up()
    file = Unpacked(path.name, path, path.stat().st_size)
    return Report(None, _look_into([file], path.parent, bench), (), bench.engines(), bench.profile_name)


def _look_into(files: Iterable[Unpacked], root: Path, bench: Bench) -> tuple[FileReport, ...]:
    return tuple(_report(file, root, bench) for file in files)


def _report(file: Unpacked, root: Path, bench: Bench) -> FileReport:
    findings = bench.look(file, root, extension(file.name))
    issues = tuple(_named(issue, file.name) for issue in findings.issues)
    return FileReport(file.name, file.size, findings.checked, issues, findings.facts)


def _named(issue: Issue, name: str) -> Issue:
    return issue if issue.file else replace(issue, file=name)
