"""Draws results.json: a chart per group with a plot of each figure, and the tables of docs/performance.md and README.md.

    python benchmarks/charts.py      draws what was measured last; `make bench` does it by itself

The charts are plain SVG, readable on light and on dark pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from figures import AT_LEAST, read_results, unit_of

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "performance.md"
CHARTS = DOCS / "charts"
FRONT_PAGE = DOCS.parent / "README.md"
BEGIN, END = "<!-- figures: drawn by benchmarks/charts.py, do not edit -->", "<!-- /figures -->"

TITLES = {
    "package": "36 files, 268 MB, over loopback",
    "many_small": "300 files, 15 MB, over loopback",
    "one_huge": "One file of 1 GiB, over loopback",
    "wan": "Over an emulated WAN: 40 ms, 20 MB/s a connection, 60 MB/s in all",
    "upload": "The upload alone: 36 files, 268 MB",
    "redelivery": "Delivered again with one file of 36 changed",
    "memory": "Peak memory of a worker's child, 15 MB to 5 GiB",
    "submit": "POST /process-job",
    "status": "GET /job-status",
    "overhead": "2,000 jobs through the queue",
    "growth": "With many jobs in the ledger",
    "limit": "A package beside this machine's own limit",
}
FRONT = {
    "wan.many_small.strict.rclone": "300 files, 15 MB",
    "wan.one_huge.strict.rclone": "one file of 1 GiB",
    "wan.package.strict.rclone": "36 files, 268 MB",
}
"""The figures of the README, the one that we lose included: a delivery over a long line, beside a bare copy."""
WIDTH, LEFT, BAR, ROW, HEAD = 760, 16, 14, 74, 34
RIGHT_ROOM = 96
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #6e7781 } .head { font-weight: 600; font-size: 14px }
.ours { fill: #2f81f7 } .theirs { fill: #9aa4af } .goal { stroke: #1f9d4d; stroke-width: 2 } .missed { fill: #d9480f }
"""
"""Each colour has contrast enough on white and on black."""

Shown = dict[str, Any]


def draw() -> None:
    """Everything, from results.json."""
    figures = read_results()["figures"]
    groups: dict[str, list[Shown]] = {}
    for figure in figures:
        groups.setdefault(figure["name"].partition(".")[0], []).append(figure)
    CHARTS.mkdir(exist_ok=True)
    for group, shown in groups.items():
        (CHARTS / f"{group}.svg").write_text(chart(TITLES[group], shown))
    images = "\n".join(f"![{TITLES[group]}](charts/{group}.svg)" for group in groups)
    _put(PAGE, f"{table(figures)}\n\n{images}")
    _put(FRONT_PAGE, front(figures))


def _put(page: Path, drawn: str) -> None:
    """Replace what stands between the two marks of the page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{drawn}\n\n{END}{after}")


def front(figures: list[Shown]) -> str:
    """Draw the README's table."""
    found = {figure["name"]: figure for figure in figures}
    peer = found[next(iter(FRONT))]["peer"]
    lines = [f"| Over an emulated WAN: 40 ms, 60 MB/s | NCR Upload API | {peer} |", "|---|---|---|"]
    for name, what in FRONT.items():
        times = (f"{_number(found[name][side])} {unit_of(name)}" for side in ("ours", "theirs"))
        lines.append(f"| {what} | {' | '.join(times)} |")
    return "\n".join(lines)


def chart(title: str, shown: list[Shown]) -> str:
    height = HEAD + ROW * len(shown)
    rows = "".join(_plot(figure, HEAD + ROW * number) for number, figure in enumerate(shown))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        f'<text class="head" x="{LEFT}" y="22">{escape(title)}</text>{rows}</svg>\n'
    )


def _plot(figure: Shown, top: int) -> str:
    """Two bars from zero, ours and the peer's, and where the goal is."""
    ours, theirs, goal, unit = figure["ours"], figure["theirs"], figure["goal"], unit_of(figure["name"])
    at_goal = None if goal is None else goal * theirs
    scale = (WIDTH - LEFT - RIGHT_ROOM) / max(ours, theirs, at_goal or 0)
    late = "" if figure["met"] in (True, None) else ' class="missed"'
    parts = [
        f'<text x="{LEFT}" y="{top + 12}">{escape(figure["name"])}: '
        f"<tspan{late}>× {figure['ratio']:.2f}</tspan> of {escape(figure['peer'])}</text>"
    ]
    for number, (kind, value) in enumerate((("ours", ours), ("theirs", theirs))):
        y, length = top + 19 + number * (BAR + 4), max(1.0, value * scale)
        parts.append(f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2"/>')
        parts.append(f'<text x="{LEFT + length + 6:.1f}" y="{y + 11}">{_number(value)} {unit}</text>')
    if at_goal is not None:
        x = LEFT + at_goal * scale
        parts.append(f'<path class="goal" d="M{x:.1f} {top + 17}v{2 * BAR + 8}"/>')
    return "".join(parts)


def table(figures: list[Shown]) -> str:
    lines = ["| Figure | Ours | Peer | Ratio | Goal | | Runs | Spread |", "|---|---|---|---|---|---|---|---|"]
    for figure in figures:
        unit, sign = unit_of(figure["name"]), "≥" if figure["name"] in AT_LEAST else "≤"
        goal = "–" if figure["goal"] is None else f"{sign} {figure['goal']:g}"
        met = {True: "met", False: "**missed**", None: ""}[figure["met"]]
        lines.append(
            f"| `{figure['name']}` | {_number(figure['ours'])} {unit} | {_number(figure['theirs'])} {unit}, {figure['peer']} "
            f"| {figure['ratio']:.2f} | {goal} | {met} | {figure['runs']} | {figure['spread']:.0%} |"
        )
    return "\n".join(lines)


def _number(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    draw()
