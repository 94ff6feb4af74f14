"""What is found in a package, and the verdict it comes to. Pure values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """Only errors and warnings count for the verdict; infos and hints are told."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    HINT = "hint"


class Result(StrEnum):
    """The verdict, in the words of the HTTP contract."""

    VALID = "Valid"
    WARNING = "Warning"
    INVALID = "Invalid"


_MAX_LISTED = 2000
_RANK = {severity: rank for rank, severity in enumerate(Severity)}


@dataclass(frozen=True, slots=True)
class Issue:
    """One finding. `file` is the path inside the package (None: the package as a whole); `pointer` is a JSON pointer,
    a prim path or a byte offset inside the file; `source` is who found it: package, gltf, image, draco, usd, profile."""

    source: str
    code: str
    severity: Severity
    message: str
    file: str | None = None
    pointer: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "code": self.code,
            "severity": self.severity.value,
            "pointer": self.pointer and _clip(self.pointer),
            "message": _clip(self.message),
            "source": self.source,
        }


def decide(issues: Iterable[Issue]) -> Result:
    """Any error is Invalid, else any warning is Warning, else Valid."""
    severities = {issue.severity for issue in issues}
    if Severity.ERROR in severities:
        return Result.INVALID
    return Result.WARNING if Severity.WARNING in severities else Result.VALID


def worst_first(issues: Iterable[Issue]) -> list[Issue]:
    """By severity; otherwise in the order found."""
    return sorted(issues, key=lambda issue: _RANK[issue.severity])


@dataclass(frozen=True, slots=True)
class FileReport:
    """One file of the package. `checked` says whether anything looked inside it; `facts` are counts for people."""

    file: str
    size: int
    checked: bool
    issues: tuple[Issue, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "file": self.file,
            "result": decide(self.issues).value,
            "bytes": self.size,
            "checked": self.checked,
        }
        return {**answer, "facts": self.facts} if self.facts else answer


@dataclass(frozen=True, slots=True)
class Report:
    """A judged package. `issues` holds every finding, those of the files included."""

    sku: str | None
    files: tuple[FileReport, ...]
    package_issues: tuple[Issue, ...]
    engines: dict[str, str | None]
    profile: str

    @property
    def issues(self) -> list[Issue]:
        found = [*self.package_issues, *(issue for file in self.files for issue in file.issues)]
        return worst_first(found)

    @property
    def result(self) -> Result:
        return decide(self.issues)

    def to_json(self) -> dict[str, Any]:
        """One entry of the contract's `data`. At most 2000 issues, worst first, and 2000 files are listed; `counts`,
        `issues_omitted` and `files_omitted` tell of all."""
        issues = self.issues
        counts = Counter(issue.severity for issue in issues)
        return {
            "result": decide(issues).value,
            "sku_id": self.sku,
            "counts": {f"{severity.value}s": counts[severity] for severity in Severity},
            "issues": [issue.to_json() for issue in issues[:_MAX_LISTED]],
            "issues_omitted": max(0, len(issues) - _MAX_LISTED),
            "files": [file.to_json() for file in self.files[:_MAX_LISTED]],
            "files_omitted": max(0, len(self.files) - _MAX_LISTED),
            "engines": self.engines,
            "profile": self.profile,
        }


def _clip(text: str, length: int = 500) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
