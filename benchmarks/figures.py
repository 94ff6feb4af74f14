"""What a benchmark says: each figure beside its peer's, as a ratio of medians, and results.json.

    {"machine": {...}, "figures": [{"name", "peer", "ours", "theirs", "ratio", "goal", "met", "runs", "spread"}]}

`ours` and `theirs` are medians in the figure's unit (`unit_of`), `ratio` is ours / theirs, `goal` what it may be at most (at
least, for the names in AT_LEAST; null where nothing was promised), `runs` how often each side was measured, and `spread` how
far the ratios of the single pairs lie apart: the distance of their quartiles (of the outermost, of fewer than four) / median.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")

GOALS: dict[str, float | None] = {
    "package.wall.rclone": 0.7,
    "package.cpu.rclone": None,
    "package.wall.baseline": 0.15,
    "many_small.wall.rclone": 0.5,
    "many_small.cpu.rclone": None,
    "many_small.wall.baseline": 0.05,
    "one_huge.wall.rclone": 1.5,
    "one_huge.cpu.rclone": None,
    "one_huge.wall.baseline": 0.15,
    "wan.package.strict.rclone": 2.2,
    "wan.package.overlapped.rclone": 1.15,
    "wan.many_small.strict.rclone": 0.3,
    "wan.many_small.overlapped.rclone": 0.25,
    "wan.one_huge.strict.rclone": 0.8,
    "wan.one_huge.overlapped.rclone": 0.5,
    "upload.wan.openssh": 1.0,
    "upload.wan.rclone": 1.0,
    "upload.cpu.openssh": 1.3,
    "redelivery.bytes": 1.1,
    "redelivery.wall": 0.3,
    "memory.peak_mb": 1.0,
    "memory.growth": 1.1,
    "submit.rate": 0.5,
    "submit.p99": 3.0,
    "status.rate": 0.8,
    "overhead.noop": 0.4,
    "overhead.small_job": None,
    "growth.submit": 1.3,
    "growth.status": 1.3,
    "growth.active": 1.3,
    "growth.sweep": 1.3,
    "limit.package": None,
}
"""Every figure, in the order in which it is shown."""

AT_LEAST = frozenset({"submit.rate", "status.rate", "overhead.noop"})
RATES = AT_LEAST | {"overhead.small_job"}


def unit_of(name: str) -> str:
    match name.split("."):
        case ["memory", _]:
            return "MB"
        case ["redelivery", "bytes"]:
            return "MB"
        case ["submit", "p99"] | ["growth", _]:
            return "ms"
        case [_, "cpu", _]:
            return "CPU s"
        case _:
            return "/s" if name in RATES else "s"


@dataclass(frozen=True)
class Figure:
    name: str
    peer: str
    ours: float
    theirs: float
    ratio: float
    goal: float | None
    met: bool | None
    runs: int
    spread: float


def compare(name: str, peer: str, ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """Of pairs measured in turns: the n-th of ours beside the n-th of theirs."""
    assert name in GOALS, name
    assert len(ours) == len(theirs) > 0
    median_ours, median_theirs = statistics.median(ours), statistics.median(theirs)
    ratio, goal = median_ours / median_theirs, GOALS[name]
    pairs = [our / their for our, their in zip(ours, theirs, strict=True)]
    met = None if goal is None else bool(ratio >= goal if name in AT_LEAST else ratio <= goal)
    return Figure(
        name,
        peer,
        round(median_ours, 4),
        round(median_theirs, 4),
        round(ratio, 4),
        goal,
        met,
        len(ours),
        round(_spread(pairs), 3),
    )


def _spread(pairs: Sequence[float]) -> float:
    low, _, high = statistics.quantiles(pairs, n=4) if len(pairs) > 3 else (min(pairs), 0, max(pairs))
    return (high - low) / statistics.median(pairs)


def say(figure: Figure) -> str:
    """In one line, for people."""
    unit = unit_of(figure.name)
    sign = "≥" if figure.name in AT_LEAST else "≤"
    goal = "" if figure.goal is None else f"  goal {sign} {figure.goal:g} {'met' if figure.met else 'MISSED'}"
    return (
        f"{figure.name:34} {figure.ours:10.3f} {unit:5}  {figure.theirs:10.3f} {unit:5} ({figure.peer})"
        f"  × {figure.ratio:.3f}{goal}  [{figure.runs} runs, spread {figure.spread:.0%}]"
    )


def read_results(path: Path = RESULTS) -> dict[str, Any]:
    """Empty where nothing was measured yet."""
    if not path.exists():
        return {"machine": {}, "figures": []}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def merge_results(
    found: Iterable[Figure], machine: dict[str, Any], group: str, told: dict[str, Any], path: Path = RESULTS
) -> None:
    """Put a group's figures in place of its former ones; `told` is what is to be known of this group's run."""
    results = read_results(path)
    by_name = {figure["name"]: figure for figure in results["figures"]} | {figure.name: asdict(figure) for figure in found}
    groups = results["machine"].get("groups", {}) | {group: told}
    results = {
        "machine": machine | {"groups": groups},
        "figures": [by_name[name] for name in GOALS if name in by_name],
    }
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
