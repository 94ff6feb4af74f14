"""The rules of USDZ that the zip alone shows, its images, and what usd-core says. Runs in the inspector only.

Rules: https://openusd.org/release/spec_usdz.html - stored, not encrypted, each file's data at a multiple of 64 bytes, a
USD layer first, and only the file types listed there.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ncr_validator.archive import BadArchive, check_archive
from ncr_validator.formats import IMAGE_EXTENSIONS
from ncr_validator.images import check_image
from ncr_validator.layout import extension
from ncr_validator.limits import Limits
from ncr_validator.verdicts import Issue, Severity

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
        with path.open("rb") as file, check_archive(file, limits) as zipped:
            infos = [info for info in zipped.infolist() if not info.is_dir()]
            if extension(infos[0].filename) not in _LAYERS:
                yield _error("USDZ_NO_ROOT_LAYER", f"The first file is {infos[0].filename!r}; it must be a USD layer.")
            for info in infos:
                yield from _check_entry(file, zipped, info, limits)
    except BadArchive as refusal:
        yield from (_error(issue.code.replace("ZIP_", "USDZ_ZIP_"), issue.message) for issue in refusal.issues)


def _check_entry(file: IO[bytes], zipped: zipfile.ZipFile, info: zipfile.ZipInfo, limits: Limits) -> Iterator[Issue]:
    name = info.filename
    if info.compress_type != zipfile.ZIP_STORED:
        yield _error("USDZ_COMPRESSED", "A file in a USDZ must be stored, not compressed.", name)
    file.seek(info.header_offset + 26)
    name_length, extra_length = struct.unpack("<2H", file.read(4))
    data_at = info.header_offset + 30 + name_length + extra_length
    if data_at % _ALIGNMENT:
        yield _error("USDZ_MISALIGNED", f"Its data starts at byte {data_at}, which is no multiple of {_ALIGNMENT}.", name)
    kind = extension(name)
    if kind not in _ALLOWED:
        yield _error("USDZ_FILE_TYPE", f"A USDZ may not hold a .{kind} file.", name)
    try:
        with zipped.open(info) as entry:
            while entry.read(_CHUNK):
                pass
            if kind in _ALLOWED & IMAGE_EXTENSIONS:
                entry.seek(0)
                found, _ = check_image(entry, kind, limits.max_image_pixels)
                yield from (Issue("image", issue.code, issue.severity, issue.message, pointer=name) for issue in found)
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
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
