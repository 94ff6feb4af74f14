"""The instruments one judgement uses at a time: the Khronos engine and the inspector, each in its child process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from ncr_validator.archive import Unpacked
from ncr_validator.child import ChildDied, Death
from ncr_validator.engine import Khronos, Look
from ncr_validator.formats import GLTF_EXTENSIONS, IMAGE_EXTENSIONS
from ncr_validator.inspector import Inspector, find_versions
from ncr_validator.limits import Limits
from ncr_validator.profile import Measured, Profile, parse_profile
from ncr_validator.signatures import HEAD_BYTES, check_start
from ncr_validator.verdicts import Issue, Severity

T = TypeVar("T")

_KTX2_FALSE_ALARMS = {"VALUE_NOT_IN_LIST", "IMAGE_UNRECOGNIZED_FORMAT"}


class Undecided(Exception):
    """A part of the validator failed, twice, on a file that is not proven to be the cause. There is no verdict."""


class _TooMuchMemory(Exception):
    """The file is the proven cause: a fresh child ran into its own memory bound."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What a look into one file gave. `checked` is False when nothing here can look into such a file."""

    issues: tuple[Issue, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    checked: bool = True


class Bench:
    """Looks into files, each with the instruments it needs. Raises `EngineMissing`, and ValueError for a bad profile."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.profile = load_profile(limits)
        self._khronos = Khronos(limits)
        self._inspector = Inspector(limits)
        self._versions: dict[str, str | None] = {"gltf-validator": None, **find_versions(limits.usd)}

    def warm_up(self) -> None:
        """Start the engine, the first time. Raises `Undecided`."""
        if self._versions["gltf-validator"] is None:
            self._versions["gltf-validator"] = self._persist(self._khronos.version, "the Khronos engine's start")

    def engines(self) -> dict[str, str | None]:
        """What judges, with versions; None for what is not there."""
        return dict(self._versions)

    def look_into_all(self, files: list[Unpacked], root: Path) -> list[Findings]:
        """Findings for each of `files`, in their order. glTF and the rest are looked into side by side.

        Raises `Undecided`.
        """
        is_gltf = [file.kind in GLTF_EXTENSIONS for file in files]
        with ThreadPoolExecutor(1) as beside:
            looks = beside.submit(
                lambda: [self._look_by_engine(file, root) for file, gltf in zip(files, is_gltf, strict=True) if gltf]
            )
            others = [None if gltf else self._look_into_other(file) for file, gltf in zip(files, is_gltf, strict=True)]
            seen = iter(looks.result())
        findings = []
        for file, other in zip(files, others, strict=True):
            findings.append(self._look_deeper(file, next(seen), len(files) > 1) if other is None else other)
        return findings

    def close(self) -> None:
        """End the children."""
        self._khronos.child.close()
        self._inspector.child.close()

    def _look_by_engine(self, file: Unpacked, root: Path) -> Look | Findings:
        try:
            return self._persist(lambda: self._khronos.look(file.path, root), file.name)
        except _TooMuchMemory as refusal:
            return _refuse(refusal)

    def _look_deeper(self, file: Unpacked, look: Look | Findings, in_package: bool) -> Findings:
        """What the engine does not see: image bodies, Draco payloads, KTX2; then the profile."""
        if isinstance(look, Findings):
            return look
        try:
            question = {"external": look.external, "skip_image_files": in_package}
            deeper, facts = self._persist(lambda: self._inspector.look("gltf", file.path, **question), file.name)
        except _TooMuchMemory as refusal:
            return replace(_refuse(refusal), issues=(*look.issues, *_refuse(refusal).issues))
        if any(issue.severity is Severity.ERROR for issue in look.issues):  # which is why it cannot be taken apart
            deeper = [issue for issue in deeper if issue.code != "GLTF_UNREADABLE"]
        issues = [*drop_ktx2_false_alarms(look.issues, facts), *deeper]
        model = measure(file.size, look.info, facts)
        return Findings((*issues, *self.profile.check(model)), _describe(model))

    def _look_into_other(self, file: Unpacked) -> Findings:
        with file.path.open("rb") as opened:
            issues = list(check_start(file.kind, opened.read(HEAD_BYTES)))
        if any(issue.severity is Severity.ERROR for issue in issues):
            return Findings(tuple(issues))
        try:
            if file.kind in IMAGE_EXTENSIONS:
                found, facts = self._persist(lambda: self._inspector.look("image", file.path, extension=file.kind), file.name)
                return Findings((*issues, *found), facts)
            if file.kind == "usdz":
                found, facts = self._persist(lambda: self._inspector.look("usdz", file.path), file.name)
                return Findings((*issues, *found, *self.profile.check(Measured(file.size))), facts)
        except _TooMuchMemory as refusal:
            return _refuse(refusal)
        return Findings(tuple(issues), checked=False)

    def _persist(self, question: Callable[[], T], name: str) -> T:
        """Ask again on a fresh child when the first died. Death by its own memory bound then proves the file too big."""
        try:
            return question()
        except ChildDied:
            try:
                return question()
            except ChildDied as second:
                if second.why is Death.MEMORY:
                    raise _TooMuchMemory(f"The file cannot be judged: {second}.") from second
                raise Undecided(f"{name!r} could not be judged: {second}") from second


def load_profile(limits: Limits) -> Profile:
    """The chosen profile or the one shipped. Raises ValueError for one that cannot be read or used."""
    severity = Severity(limits.profile_severity)
    if limits.profile is None:
        text = resources.files("ncr_validator").joinpath("profiles", "default.json").read_text()
        return parse_profile(text, "default", severity)
    try:
        text = limits.profile.read_text()
    except OSError as error:
        raise ValueError(f"The profile {limits.profile} cannot be read: {error.strerror}") from error
    return parse_profile(text, limits.profile.name, severity)


def drop_ktx2_false_alarms(issues: tuple[Issue, ...], facts: dict[str, Any]) -> list[Issue]:
    """The engine does not know KTX2: what it says of an image that really is KTX2, in a file that uses
    KHR_texture_basisu, is no defect."""
    really = {pointer for pointer, image in facts.get("images", {}).items() if image.get("format") == "KTX2"}
    if not facts.get("basisu"):
        return list(issues)
    return [
        issue
        for issue in issues
        if not (issue.code in _KTX2_FALSE_ALARMS and "/".join((issue.pointer or "").split("/")[:3]) in really)
    ]


def measure(size: int, info: dict[str, Any], facts: dict[str, Any]) -> Measured:
    """What the engine and the inspector know of a glTF file."""
    textures = {
        resource["pointer"]: (resource["image"]["width"], resource["image"]["height"])
        for resource in info.get("resources", ())
        if resource.get("image") and resource.get("pointer")
    }
    textures |= {
        pointer: (image["width"], image["height"]) for pointer, image in facts.get("images", {}).items() if "width" in image
    }
    return Measured(
        file_bytes=size,
        triangles=info.get("totalTriangleCount"),
        materials=info.get("materialCount"),
        nodes=facts.get("nodes"),
        meshes=facts.get("meshes"),
        primitives=facts.get("primitives"),
        textures=tuple(sorted(textures.items())),
    )


def _describe(model: Measured) -> dict[str, Any]:
    counts = {name: getattr(model, name) for name in ("triangles", "materials", "nodes", "meshes", "primitives")}
    return {**counts, "textures": [f"{width}x{height}" for _, (width, height) in model.textures]}


def _refuse(refusal: _TooMuchMemory) -> Findings:
    return Findings((Issue("package", "NEEDS_TOO_MUCH_MEMORY", Severity.ERROR, str(refusal)),))
