"""The inspector: looks into images, Draco payloads and USDZ files, in a child process of its own.

One JSON line in (`{"look": "image" | "gltf" | "usdz" | "hello", "path", …}`), one JSON line out (`{"issues", "facts"}`).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ncr_validator.child import Child
from ncr_validator.formats import IMAGE_EXTENSIONS
from ncr_validator.gltf_file import GltfFile, Unreadable, is_ktx2
from ncr_validator.layout import extension
from ncr_validator.limits import Limits
from ncr_validator.verdicts import Issue, Severity

Answer = dict[str, Any]


class Inspector:
    """The inspector as its parent sees it. One question at a time; each may raise `ChildDied`."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.child = Child(
            "inspector",
            [sys.executable, "-m", "ncr_validator.inspector", limits.model_dump_json()],
            memory_mb=limits.inspector_memory_mb,
            max_asks=limits.files_per_child,
            env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def look(self, what: str, path: Path, **more: object) -> tuple[list[Issue], dict[str, Any]]:
        """Issues and facts of the file at `path`."""
        answer = self.child.ask({"look": what, "path": str(path), **more}, self._limits.file_seconds)
        return [Issue(**{**one, "severity": Severity(one["severity"])}) for one in answer["issues"]], answer["facts"]


def find_versions(use_usd: bool) -> dict[str, str | None]:
    """The versions of what the inspector works with; None for what is not there or not used."""
    names = {"pillow": "pillow", "DracoPy": "DracoPy", "usd-core": "usd-core"}
    return {label: _version(name) if use_usd or name != "usd-core" else None for label, name in names.items()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# --- in the child -----------------------------------------------------------------------------------------------


def look_into_image(question: Answer, limits: Limits) -> tuple[list[Issue], Answer]:
    from ncr_validator.images import check_image  # noqa: PLC0415 - each look loads only what it needs

    with Path(question["path"]).open("rb") as file:
        return check_image(file, question["extension"], limits.max_image_pixels)


def look_into_gltf(question: Answer, limits: Limits) -> tuple[list[Issue], Answer]:
    try:
        gltf = GltfFile(Path(question["path"]), question["external"])
    except Unreadable as error:
        return [Issue("gltf", "GLTF_UNREADABLE", Severity.ERROR, f"The file cannot be taken apart: {error}.")], {}
    issues, images = _look_into_images(gltf, question, limits)
    if gltf.uses("KHR_draco_mesh_compression"):
        from ncr_validator.draco import check_draco  # noqa: PLC0415

        issues += check_draco(gltf)
    meshes = gltf.objects("meshes")
    facts = {
        "images": images,
        "basisu": gltf.uses("KHR_texture_basisu"),
        "nodes": len(gltf.objects("nodes")),
        "meshes": len(meshes),
        "primitives": sum(len(mesh["primitives"]) for mesh in meshes if isinstance(mesh.get("primitives"), list)),
    }
    return issues, facts


def _look_into_images(gltf: GltfFile, question: Answer, limits: Limits) -> tuple[list[Issue], dict[str, Answer]]:
    """The images inside the file and, unless they are looked into as files of the package, those beside it. What the
    engine could not find it has told of."""
    from ncr_validator.images import check_image  # noqa: PLC0415

    issues: list[Issue] = []
    facts: dict[str, Answer] = {}
    for at, image in enumerate(gltf.objects("images")):
        pointer = f"/images/{at}"
        beside = gltf.file_beside(image)
        if beside is not None and question["skip_image_files"] and extension(beside.name) in IMAGE_EXTENSIONS:
            with beside.open("rb") as file:
                facts[pointer] = {"format": "KTX2"} if is_ktx2(file) else {}
            continue
        try:
            opened = gltf.image(image)
        except Unreadable as error:
            if beside is not None or "uri" not in image or str(image["uri"]).startswith("data:"):
                text = f"The image cannot be read: {error}."
                issues.append(Issue("image", "IMAGE_UNREADABLE", Severity.ERROR, text, pointer=pointer))
            continue
        with opened as file:
            found, facts[pointer] = check_image(file, "", limits.max_image_pixels)
        issues += (Issue(one.source, one.code, one.severity, one.message, pointer=pointer) for one in found)
    return issues, facts


def look_into_usdz(question: Answer, limits: Limits) -> tuple[list[Issue], Answer]:
    from ncr_validator.usdz import check_usd, check_zip  # noqa: PLC0415

    path = Path(question["path"])
    issues = list(check_zip(path, limits))
    if limits.usd and find_spec("pxr") is not None:
        issues += check_usd(path)
        return issues, {"usd-core": True}
    return issues, {"usd-core": False}


def look_at_nothing(_question: Answer, _limits: Limits) -> tuple[list[Issue], Answer]:
    return [], {}


_LOOKS: dict[str, Callable[[Answer, Limits], tuple[list[Issue], Answer]]] = {
    "image": look_into_image,
    "gltf": look_into_gltf,
    "usdz": look_into_usdz,
    "hello": look_at_nothing,
}


def _questions() -> Iterator[Answer]:
    for line in sys.stdin.buffer:
        yield json.loads(line)


def main() -> None:
    """Answer until standard input ends. Running out of memory ends the process: its parent then knows why."""
    limits = Limits.model_validate_json(sys.argv[1])
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what a library prints must not look like an answer
        for question in _questions():
            try:
                issues, facts = _LOOKS[question["look"]](question, limits)
            except MemoryError:
                os.write(2, b"MemoryError\n")
                os._exit(70)
            answers.write(json.dumps({"issues": [asdict(issue) for issue in issues], "facts": facts}).encode() + b"\n")
            answers.flush()


if __name__ == "__main__":
    main()
