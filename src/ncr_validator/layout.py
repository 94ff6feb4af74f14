"""The layout a package must have: the targets of the delivery's layout rules, seen from the other side. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal

from ncr_validator.verdicts import Issue, Severity

MainModel = Literal["required", "any", "optional"]

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
_OTHER_MODELS = {"gltf", "usdz", "fbx", "obj", "blend"}


def check_layout(names: Iterable[str], sku: str, main_model: MainModel) -> list[Issue]:
    """Hold the paths of a package against the layout of product `sku`.

    `{sku}/{sku}.glb`, `{sku}/{folder}/{file}` and `{sku}/materials/sources/{file}` are all there may be.
    """
    names = list(names)
    return [*(issue for name in names for issue in _check_path(name, sku)), *_check_main_model(names, sku, main_model)]


def extension(name: str) -> str:
    """`glb` of `a/B.GLB`; empty when there is none."""
    last = name.rsplit("/", 1)[-1]
    return last.rsplit(".", 1)[-1].lower() if "." in last[1:] else ""


def _check_path(name: str, sku: str) -> Iterator[Issue]:
    first, *rest = name.split("/")
    if first != sku or not rest:
        yield _error("LAYOUT_WRONG_FOLDER", f"{name!r} is not in the folder {sku + '/'!r}.", name)
        return
    folders, file = rest[:-1], rest[-1]
    if not folders:
        if file != f"{sku}.glb":
            yield _error("LAYOUT_UNEXPECTED_FILE", f"Only {sku + '.glb'!r} may be directly in {sku + '/'!r}.", name)
        return
    if len(folders) > 1 and folders != ["materials", "sources"]:
        yield _error("LAYOUT_TOO_DEEP", f"{'/'.join(folders)!r} is a folder too deep.", name)
    if any(folder != folder.lower() for folder in folders):
        yield _error("LAYOUT_FOLDER_CASE", f"{'/'.join(folders)!r} is not in lower case.", name)
    kind = extension(file)
    if kind == "blend" and rest != ["sources", f"{sku}.blend"]:
        yield _error("LAYOUT_BLEND_PLACE", f"A .blend file belongs at '{sku}/sources/{sku}.blend'.", name)
    if kind == "glb" and folders == ["materials"] and not _UUID.fullmatch(file[: -len(".glb")]):
        text = f"A material GLB is named by its UUID: '{sku}/materials/{{uuid}}.glb'."
        yield Issue("package", "LAYOUT_MATERIAL_NAME", Severity.WARNING, text, name)


def _check_main_model(names: list[str], sku: str, main_model: MainModel) -> Iterator[Issue]:
    main = f"{sku}/{sku}.glb"
    if main in names:
        return
    others = any(extension(name) in _OTHER_MODELS for name in names)
    severity = Severity.INFO if main_model == "optional" or (main_model == "any" and others) else Severity.ERROR
    yield Issue("package", "LAYOUT_NO_MAIN_MODEL", severity, f"The main model {main!r} is not in the package.", main)


def _error(code: str, message: str, file: str) -> Issue:
    return Issue("package", code, Severity.ERROR, message, file)
