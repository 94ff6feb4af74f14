"""The benchmarks as a tool: what they say follows from what they measured. (How fast things are is theirs to say.)"""

from __future__ import annotations

import json
import socket
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import httpx
import pytest

import charts
import datasets
import figures
import run
from servers import run_server

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_results_of_the_last_run_hold_every_figure_with_its_goal() -> None:
    """The results are written by what was measured; nothing in them comes from a list."""
    results = figures.read_results()
    assert {figure["name"]: figure["goal"] for figure in results["figures"]} == figures.GOALS
    assert set(results["machine"]["groups"]) == set(run.GROUPS)


def test_the_page_about_speed_shows_every_figure_of_the_last_run() -> None:
    """`charts.draw` writes the table into the page."""
    page = (BENCHMARKS.parent / "docs/performance.md").read_text()
    assert charts.table(figures.read_results()["figures"]).strip() in page


def test_a_figure_that_is_not_known_is_refused() -> None:
    with pytest.raises(AssertionError, match="new"):
        figures.compare("package.new", "rclone", [1.0], [2.0])


def test_a_figure_is_the_ratio_of_medians_and_meets_its_goal_from_below() -> None:
    figure = figures.compare("package.wall.rclone", "rclone", [1.0, 9.0, 1.2], [2.0, 2.0, 2.0])
    assert (figure.ours, figure.theirs, figure.ratio, figure.met, figure.runs) == (1.2, 2.0, 0.6, True, 3)
    assert figures.compare("package.wall.rclone", "rclone", [1.5], [2.0]).met is False


def test_a_rate_meets_its_goal_from_above() -> None:
    assert figures.compare("submit.rate", "bare", [600.0], [1000.0]).met is True
    assert figures.compare("submit.rate", "bare", [400.0], [1000.0]).met is False


def test_a_figure_without_a_goal_is_neither_met_nor_missed() -> None:
    figure = figures.compare("limit.package", "dd", [2.0], [1.0])
    assert (figure.goal, figure.met, figure.ratio) == (None, None, 2.0)


def test_one_group_measured_again_leaves_the_others_figures(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first = [
        figures.compare("package.wall.rclone", "rclone", [1.0], [2.0]),
        figures.compare("limit.package", "dd", [2.0], [1.0]),
    ]
    figures.merge_results(first, {"cores": 2}, "all", {"seconds": 1}, path)
    again = figures.compare("limit.package", "a peer", [3.0], [1.0])
    figures.merge_results([again], {"cores": 2}, "limit", {}, path)
    found = json.loads(path.read_text())
    assert [(figure["name"], figure["ratio"]) for figure in found["figures"]] == [
        ("package.wall.rclone", 0.5),
        ("limit.package", 3.0),
    ]
    assert set(found["figures"][0]) == {"name", "peer", "ours", "theirs", "ratio", "goal", "met", "runs", "spread"}
    assert set(found["machine"]) == {"cores", "groups"}


def test_every_figure_is_drawn_and_told_with_its_own_numbers() -> None:
    shown = [vars(figures.compare(name, "a <peer>", [2.0], [4.0])) for name in figures.GOALS]
    drawn = ElementTree.fromstring(charts.chart("all", shown))
    words = "".join(drawn.itertext())
    told = charts.table(shown)
    for name in figures.GOALS:
        assert f"{name}: × 0.50 of a <peer>" in words
        assert f"| `{name}` | 2 " in told
    assert told.count("**missed**") == sum(goal is not None and not _holds(name, goal) for name, goal in figures.GOALS.items())


def test_the_figures_of_the_readme_are_those_that_were_measured() -> None:
    assert (
        f"{charts.BEGIN}\n\n{charts.front(figures.read_results()['figures'])}\n\n{charts.END}" in charts.FRONT_PAGE.read_text()
    )


def _holds(name: str, goal: float) -> bool:
    return goal <= 0.5 if name in figures.AT_LEAST else goal >= 0.5


def test_the_data_sets_are_what_their_names_promise() -> None:
    found = {
        data.name: (len(data.files), round(data.bytes / 1e6)) for data in datasets.DATA_SETS if data is not datasets.CHANGED
    }
    assert (found["package"], found["many_small"], found["one_huge"]) == ((36, 268), (300, 15), (1, 1074))
    assert len(set(datasets.CHANGED.files) - set(datasets.PACKAGE.files)) == 1


def test_a_file_of_a_data_set_is_the_same_each_time_and_no_two_megabytes_of_it_are(tmp_path: Path) -> None:
    block = memoryview(bytes(datasets.BLOCK_BYTES))
    for name in ("one", "again"):
        datasets.write(tmp_path / name, "key", 20_000_001, block)
    content = (tmp_path / "one").read_bytes()
    assert len(content) == 20_000_001
    assert content == (tmp_path / "again").read_bytes()
    assert len({content[start : start + 64] for start in range(0, 20_000_001, datasets.BLOCK_BYTES // 2 + 64)}) == 3


def test_the_sink_reads_bodies_of_either_framing_to_their_end_and_answers_valid() -> None:
    with run_server([sys.executable, str(BENCHMARKS / "sink.py")], r"listening on (?P<found>\d+)") as port:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as client:
            for body in (b"x" * 3_000_000, (b"y" * 700_000 for _ in range(5)), b""):
                answer = client.post("/validate/SKU", content=body)
                assert answer.json() == {"data": [{"result": "Valid"}]}
        with socket.create_connection(("127.0.0.1", int(port)), timeout=20) as cut:
            cut.sendall(b"POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\nonly this")
            cut.shutdown(socket.SHUT_WR)
            assert cut.recv(1) == b"", "a body that was cut is no body"


@pytest.mark.parametrize("only", ["package", "wan.package", "wan"])
def test_a_group_is_chosen_by_its_name_or_the_beginning_of_it(only: str) -> None:
    assert run.chosen(only)
    assert all(name.startswith(only) for name in run.chosen(only))
    with pytest.raises(SystemExit, match="no group is called 'pack'"):
        run.chosen("pack")
