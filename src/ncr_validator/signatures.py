"""Files that nothing here can open are at least what their name says, as far as their first bytes tell. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from ncr_validator.verdicts import Issue, Severity

HEAD_BYTES = 1024

_STARTS = {
    "blend": (b"BLENDER", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"),
    "fbx": (b"Kaydara FBX Binary", b";"),
    "psd": (b"8BPS",),
    "exr": (b"v/1\x01",),
    "hdr": (b"#?",),
    "usdc": (b"PXR-USDC",),
    "usda": (b"#usda",),
    "zip": (b"PK",),
}
_TEXT = {"obj", "mtl", "usda", "txt", "md", "json", "csv", "xml", "svg", "html", "htm", "dae", "mtlx", "xmp", "x3d"}
_MARKUP = {"xml", "svg", "html", "htm", "dae", "mtlx", "xmp", "x3d", "txt", "md"}
_ERROR_PAGES = (b"<?xml", b"<!doctype html", b"<html", b"<error")


def check_start(kind: str, head: bytes) -> Iterator[Issue]:
    """Hold the first bytes of a file against its extension.

    A page of markup in place of a model (what a store answers instead of a missing object) is an error; a start that
    only looks wrong is a warning.
    """
    if not head:
        yield Issue("package", "EMPTY_FILE", Severity.WARNING, "The file is empty.")
    elif kind not in _MARKUP and head.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith(_ERROR_PAGES):
        text = f"The file is named .{kind} but holds markup, as in the error page of a store or a web server."
        yield Issue("package", "ERROR_PAGE", Severity.ERROR, text)
    elif kind in _STARTS and not head.startswith(_STARTS[kind]):
        yield Issue("package", "FILE_TYPE_MISMATCH", Severity.WARNING, f"The file does not start as a .{kind} file does.")
    elif kind in _TEXT and b"\0" in head:
        yield Issue("package", "FILE_TYPE_MISMATCH", Severity.WARNING, f"A .{kind} file is text; this one is not.")
