"""The rules of USDZ that the zip alone shows, its images, and what usd-core says. Runs in the inspector only.

Rules: https://openusd.org/release/spec_usdz.html - stored, not encrypted, each file's data at a multiple of 64 bytes, a
USD layer first, and only the file types listed there.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ncr_validator.archive import DAMAGE, BadArchive, CheckedZip, check_archive
from ncr_validator.formats import IMAGE_EXTENSIONS
from ncr_validator.images import check_image
from ncr_validator.layout import extension
from ncr_validator.limits import Limits
from ncr_validator.verdicts import Issue, Severity
from ncr_validator.zip_directory import Entry

_LAYERS = {"usd", "usda", "usdc"}
_ALLOWED = _LAYERS | {"png", "jpg", "jpeg", "exr", "avif", "m4a", "mp3", "wav"}
_ALIGNMENT = 64
_CHUNK = 1024 * 1024
_FATAL = {
    "UsdzPackageValidator",
    "PackageEncapsulationValidator",
    "RootPackageValidator",
    "MissingReferenceValidator",
    "CompositionErrorTest",
    "FileExtensionValidator",
}
"""Validators of usd-core whose findings are errors; those of all others are warnings, as ordinary published files have them."""


def check_zip(path: Path, limits: Limits) -> Iterator[Issue]:
    """What the zip alone shows, the CRC of every entry and the bodies of the images included."""
    try:
        with path.open("rb") as file:
            zipped = check_archive(file, limits)
            files = [entry for entry in zipped.entries if not entry.is_folder]
            if extension(files[0].name) not in _LAYERS:
                yield _error("USDZ_NO_ROOT_LAYER", f"The first file is {files[0].name!r}; it must be a USD layer.")
            for entry in files:
                yield from _check_entry(zipped, entry, limits)
    except BadArchive as refusal:
        yield from (_error(issue.code.replace("ZIP_", "USDZ_ZIP_"), issue.message) for issue in refusal.issues)


def _check_entry(zipped: CheckedZip, entry: Entry, limits: Limits) -> Iterator[Issue]:
    name = entry.name
    if entry.method != zipfile.ZIP_STORED:
        yield _error("USDZ_COMPRESSED", "A file in a USDZ must be stored, not compressed.", name)
    if entry.data_at % _ALIGNMENT:
        text = f"Its data starts at byte {entry.data_at}, which is no multiple of {_ALIGNMENT}."
        yield _error("USDZ_MISALIGNED", text, name)
    kind = extension(name)
    if kind not in _ALLOWED:
        yield _error("USDZ_FILE_TYPE", f"A USDZ may not hold a .{kind} file.", name)
    try:
        with zipped.open(entry) as content:
            while content.read(_CHUNK):
                pass
            if kind in _ALLOWED & IMAGE_EXTENSIONS:
                content.seek(0)
                found, _ = check_image(content, kind, limits.max_image_pixels)
                yield from (Issue("image", issue.code, issue.severity, issue.message, pointer=name) for issue in found)
    except (*DAMAGE, OSError, ValueError) as error:
        yield _error("USDZ_CORRUPT_ENTRY", f"It is damaged: {error}.", name)


def check_usd(path: Path) -> Iterator[Issue]:
    """What usd-core's validators say. Raises ImportError when it is not installed."""
    from pxr import Tf, Usd, UsdValidation  # noqa: PLC0415 - an extra, and slow to load

    try:
        stage = Usd.Stage.Open(str(path))
        validators = UsdValidation.ValidationRegistry().GetOrLoadAllValidators()
        found = UsdValidation.ValidationContext(validators).Validate(stage)
    except Tf.ErrorException:
        yield Issue("usd", "USD_UNREADABLE", Severity.ERROR, "usd-core cannot open the stage of this USDZ.")
        return
    for finding in found:
        yield _read_finding(finding, path)


def _read_finding(finding: Any, path: Path) -> Issue:
    validator = finding.GetValidator().GetMetadata().name.rsplit(":", 1)[-1]
    severity = Severity.ERROR if validator in _FATAL else Severity.WARNING
    sites = [
        site.GetProperty().GetPath() if site.IsProperty() else site.GetPrim().GetPath() if site.IsPrim() else None
        for site in finding.GetSites()
    ]
    pointer = next((str(site) for site in sites if site), None)
    message = finding.GetMessage().replace(str(path), path.name)
    return Issue("usd", f"{validator}.{finding.GetName()}", severity, message, pointer=pointer)


def _error(code: str, message: str, name: str | None = None) -> Issue:
    return Issue("usdz", code, Severity.ERROR, message, pointer=name)
