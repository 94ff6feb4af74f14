"""The bodies of images, by Pillow and, for KTX2, by its header. Runs in the inspector's child process only."""

from __future__ import annotations

import struct
import warnings
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from ncr_validator.formats import KTX2_MAGIC
from ncr_validator.verdicts import Issue, Severity

Facts = dict[str, Any]

_KTX2_HEADER = struct.Struct("<12s9L4L2Q")
_FORMATS_BY_EXTENSION = {
    "png": ("PNG",),
    "jpg": ("JPEG", "MPO"),
    "jpeg": ("JPEG", "MPO"),
    "webp": ("WEBP",),
    "tga": ("TGA",),
    "bmp": ("BMP", "DIB"),
    "gif": ("GIF",),
    "avif": ("AVIF",),
    "tif": ("TIFF",),
    "tiff": ("TIFF",),
    "psd": ("PSD",),
    "dds": ("DDS",),
}
_CERTAIN = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TGA")
"""Formats that Pillow reads whole: what it cannot read of these is damaged. Of the others it may be merely unusual."""

_WITH_MAGIC = tuple(sorted({one for formats in _FORMATS_BY_EXTENSION.values() for one in formats} - {"TGA", "DIB", "MPO"}))


def check_image(file: IO[bytes], extension: str, max_pixels: int) -> tuple[list[Issue], Facts]:
    """Hold the image against its name, its own checksums and its decoder. `extension` may be empty: any format will do.

    An image of over `max_pixels` is refused before it is decoded.
    """
    if file.read(len(KTX2_MAGIC)) == KTX2_MAGIC:
        issues, facts = _check_ktx2(file)
        return (issues + _check_name("KTX2", extension, ("KTX2",)) if extension != "ktx2" else issues), facts
    if extension == "ktx2":
        return [_error("IMAGE_UNREADABLE", "This is no KTX2 file.")], {}
    return _check_by_pillow(file, extension, max_pixels)


def _check_by_pillow(file: IO[bytes], extension: str, max_pixels: int) -> tuple[list[Issue], Facts]:
    named = _FORMATS_BY_EXTENSION.get(extension, ())
    # TGA has no magic number: only a file that says it is one may be taken for one
    formats = (*_WITH_MAGIC, "TGA") if extension == "tga" else _WITH_MAGIC
    facts: Facts = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.MAX_IMAGE_PIXELS = None  # judged here, so that the message names the numbers
            with _open(file, formats) as image:
                facts = {"width": image.width, "height": image.height, "format": image.format}
                if image.width * image.height > max_pixels:
                    text = f"The image has {image.width} x {image.height} pixels; the limit is {max_pixels} in all."
                    return [_error("IMAGE_TOO_LARGE", text)], facts
                image.verify()
            with _open(file, formats) as image:
                image.load()
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a decoder on hostile bytes raises anything
        return [_unreadable(error, facts.get("format"), named)], facts
    return _check_name(str(facts["format"]), extension, named), facts


def _open(file: IO[bytes], formats: tuple[str, ...]) -> Image.Image:
    file.seek(0)
    return Image.open(file, formats=formats)


def _unreadable(error: Exception, format_: str | None, named: tuple[str, ...]) -> Issue:
    certain = format_ in _CERTAIN if format_ else not named or named[0] in _CERTAIN
    what = (
        "This is no image of a known format"
        if isinstance(error, UnidentifiedImageError)
        else f"{type(error).__name__}: {error}"
    )
    text = f"The image cannot be read: {what}."
    return _error("IMAGE_CORRUPT" if format_ else "IMAGE_UNREADABLE", text) if certain else _warn("IMAGE_NOT_READ", text)


def _check_name(format_: str, extension: str, named: tuple[str, ...]) -> list[Issue]:
    if not extension or format_ in named:
        return []
    return [_warn("IMAGE_FORMAT_MISMATCH", f"The file is named .{extension} but holds {format_}.")]


def _check_ktx2(file: IO[bytes]) -> tuple[list[Issue], Facts]:
    """The header and the places it points to; the pixels are not decoded."""
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(_KTX2_HEADER.size)
    if len(head) < _KTX2_HEADER.size:
        return [_error("KTX2_TRUNCATED", "The KTX2 header is cut off.")], {}
    _, _, _, width, height, _, _, faces, levels, scheme, *places = _KTX2_HEADER.unpack(head)
    facts: Facts = {"width": width, "height": height, "format": "KTX2"}
    issues = []
    if width == 0 or faces not in (1, 6) or levels > 32 or (scheme > 3 and scheme < 0x10000):
        issues.append(_error("KTX2_HEADER", f"The KTX2 header is nonsense: width {width}, {faces} faces, {levels} levels."))
    dfd, dfd_length, kvd, kvd_length, sgd, sgd_length = places
    index = file.read(24 * min(max(levels, 1), 32))
    levels_at = [struct.unpack_from("<2Q", index, at) for at in range(0, len(index) - 23, 24)]
    for start, length in [(dfd, dfd_length), (kvd, kvd_length), (sgd, sgd_length), *levels_at]:
        if start + length > size:
            issues.append(_error("KTX2_TRUNCATED", f"The KTX2 file has {size} bytes but refers to byte {start + length}."))
            break
    if len(levels_at) < max(levels, 1) <= 32:
        issues.append(_error("KTX2_TRUNCATED", "The KTX2 level index is cut off."))
    return issues, facts


def _error(code: str, message: str) -> Issue:
    return Issue("image", code, Severity.ERROR, message)


def _warn(code: str, message: str) -> Issue:
    return Issue("image", code, Severity.WARNING, message)
