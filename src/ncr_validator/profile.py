"""Industry limits in the rules JSON of the Khronos Asset Auditor: reading them, and holding a model against them. Pure.

-1 and false switch a rule off; what is left out is off.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ncr_validator.verdicts import Issue, Severity

Range = tuple[float | None, float | None]  # minimum, maximum
Size = tuple[int, int]

_RANGES = {
    "fileSizeInKb",
    "materials",
    "model.triangles",
    "model.objectCount.nodes",
    "model.objectCount.meshes",
    "model.objectCount.primitives",
    "textures.width",
    "textures.height",
}
_SWITCHES = {"textures.requireDimensionsBePowersOfTwo", "textures.requireDimensionsBeQuadratic"}
_CHECKED = {f"{rule}.{end}" for rule in _RANGES for end in ("minimum", "maximum")} | _SWITCHES
_UNCHECKED = {
    *(f"product.dimensions.{side}.{end}" for side in ("height", "length", "width") for end in ("minimum", "maximum")),
    *(f"product.dimensions.{side}.percentTolerance" for side in ("height", "length", "width")),
    *(f"model.{rule}" for rule in ("requireBeveledEdges", "requireCleanRootNodeTransform", "requireManifoldEdges")),
    *(f"textures.pbrColorRange.{end}" for end in ("minimum", "maximum")),
    *(f"uvs.gutterWidth.resolution{side}" for side in (256, 512, 1024, 2048, 4096)),
    *(f"uvs.pixelsPerMeter.{end}" for end in ("minimum", "maximum")),
    *(f"uvs.{rule}" for rule in ("requireNotInverted", "requireNotOverlapping", "requireRangeZeroToOne")),
}
"""Rules of the Auditor that need the geometry or the pixels; they are told, not checked."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a model measures. A count that is not known is None and breaks no rule."""

    file_bytes: int
    triangles: int | None = None
    materials: int | None = None
    nodes: int | None = None
    meshes: int | None = None
    primitives: int | None = None
    textures: tuple[tuple[str, Size], ...] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """`notes` tell of rules in the file that are unknown or not checked here."""

    name: str
    rules: Mapping[str, float | bool]
    severity: Severity
    notes: tuple[Issue, ...] = ()

    def check(self, model: Measured) -> Iterator[Issue]:
        """The rules the model breaks, at the profile's severity."""
        counts: dict[str, tuple[str, float | None]] = {
            "fileSizeInKb": ("The file size in KB", model.file_bytes / 1024),
            "materials": ("The number of materials", model.materials),
            "model.triangles": ("The number of triangles", model.triangles),
            "model.objectCount.nodes": ("The number of nodes", model.nodes),
            "model.objectCount.meshes": ("The number of meshes", model.meshes),
            "model.objectCount.primitives": ("The number of primitives", model.primitives),
        }
        for rule, (what, value) in counts.items():
            yield from self._check_range(rule, what, value)
        for pointer, size in model.textures:
            yield from self._check_texture(pointer, size)

    def _check_texture(self, pointer: str, size: Size) -> Iterator[Issue]:
        width, height = size
        yield from self._check_range("textures.width", "The texture's width", width, pointer)
        yield from self._check_range("textures.height", "The texture's height", height, pointer)
        if self.rules.get("textures.requireDimensionsBePowersOfTwo") and not all(map(_is_power_of_two, size)):
            text = f"The texture is {width} x {height}; its sides must be powers of two."
            yield self._issue("textures.requireDimensionsBePowersOfTwo", text, pointer)
        if self.rules.get("textures.requireDimensionsBeQuadratic") and width != height:
            text = f"The texture is {width} x {height}; it must be square."
            yield self._issue("textures.requireDimensionsBeQuadratic", text, pointer)

    def _check_range(self, rule: str, what: str, value: float | None, pointer: str | None = None) -> Iterator[Issue]:
        if value is None:
            return
        least, most = self.rules.get(f"{rule}.minimum"), self.rules.get(f"{rule}.maximum")
        if least is not None and value < least:
            yield self._issue(f"{rule}.minimum", f"{what} is {value:g}; at least {least:g} is asked for.", pointer)
        if most is not None and value > most:
            yield self._issue(f"{rule}.maximum", f"{what} is {value:.10g}; at most {most:g} is allowed.", pointer)

    def _issue(self, rule: str, message: str, pointer: str | None) -> Issue:
        return Issue("profile", rule, self.severity, message, pointer=pointer)


def parse_profile(text: str, name: str, severity: Severity) -> Profile:
    """Read a profile. Raises `ValueError`, naming the key, for what is no profile."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"The profile {name} is no JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("version"), str):
        raise ValueError(f"The profile {name} must be a JSON object with a 'version' in it")
    rules: dict[str, float | bool] = {}
    notes: list[Issue] = []
    for rule, value in _leaves({key: content[key] for key in content if key != "version"}):
        if rule not in _CHECKED and rule not in _UNCHECKED:
            notes.append(_note("PROFILE_UNKNOWN_KEY", f"The profile {name} has {rule!r}, which is no rule; it is ignored."))
            continue
        _check_value(rule, value, name)
        if value is False or value == -1:
            continue
        if rule in _CHECKED:
            rules[rule] = value
        elif not rule.endswith("percentTolerance"):
            notes.append(_note("PROFILE_NOT_CHECKED", f"The profile {name} asks for {rule!r}, which is not checked here."))
    return Profile(name, rules, severity, tuple(notes))


def _check_value(rule: str, value: Any, name: str) -> None:
    wants_switch = rule.rsplit(".", 1)[-1].startswith("require")
    if isinstance(value, bool) != wants_switch or not isinstance(value, bool | int | float):
        kind = "true or false" if wants_switch else "a number (-1 switches it off)"
        raise ValueError(f"The profile {name} has {rule} = {value!r}; it must be {kind}")


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _note(code: str, message: str) -> Issue:
    return Issue("profile", code, Severity.INFO, message)
