"""The instruments one judgement uses at a time: the Khronos engine and the inspector, each in its child process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ncr_validator.archive import Unpacked
from ncr_validator.child import ChildDied, Death
from ncr_validator.engine import Khronos
from ncr_validator.limits import Limits
from ncr_validator.verdicts import Issue, Severity

T = TypeVar("T")


class Undecided(Exception):
    """A part of the validator failed, twice, on a file that is not proven to be the cause. There is no verdict."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What a look into one file gave. `checked` is False when nothing here can look into such a file."""

    issues: tuple[Issue, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    checked: bool = True


class Bench:
    """Looks into files, one at a time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._khronos = Khronos(limits)
        self._engine_version: str | None = None
        self.profile_name = "none"

    def warm_up(self) -> None:
        """Start the engine. Raises `Undecided`."""
        self._engine_version = self._persist(self._khronos.version, "the engine's start")

    def engines(self) -> dict[str, str | None]:
        """What judged, with versions."""
        return {"gltf-validator": self._engine_version}

    def look(self, file: Unpacked, root: Path, kind: str) -> Findings:
        """Look into `file`, whose lower-case extension is `kind`. Raises `Undecided`."""
        try:
            if kind in {"glb", "gltf"}:
                return self._look_into_gltf(file, root)
        except _TooMuchMemory as refusal:
            return Findings((Issue("package", "NEEDS_TOO_MUCH_MEMORY", Severity.ERROR, str(refusal), file.name),))
        return Findings(checked=False)

    def close(self) -> None:
        """End the children."""
        self._khronos.child.close()

    def _look_into_gltf(self, file: Unpacked, root: Path) -> Findings:
        look = self._persist(lambda: self._khronos.look(file.path, root), file.name)
        return Findings(look.issues)

    def _persist(self, question: Callable[[], T], name: str) -> T:
        """Ask again on a fresh child when the first died. Two deaths by its own memory bound prove the file too big."""
        try:
            return question()
        except ChildDied:
            try:
                return question()
            except ChildDied as second:
                if second.why is Death.MEMORY:
                    raise _TooMuchMemory(f"{name!r} cannot be judged: {second}.") from second
                raise Undecided(f"{name!r} could not be judged: {second}") from second


class _TooMuchMemory(Exception):
    """The file is the proven cause: a fresh child ran into its own memory bound."""
