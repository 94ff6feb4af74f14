"""Children that die: no verdict, never a wrong one, and the next file is judged."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from ncr_validator.bench import Bench, Undecided
from ncr_validator.child import Child, ChildDied, Death
from ncr_validator.engine import Khronos
from ncr_validator.inspector import Inspector
from ncr_validator.judgement import judge_file
from ncr_validator.limits import Limits
from ncr_validator.verdicts import Result
from validator import samples

ECHO = """
import json, os, sys, time
for line in sys.stdin:
    question = json.loads(line)
    match question.get("do"):
        case "sleep": time.sleep(60)
        case "exit": os._exit(3)
        case "half": sys.stdout.write('{"half'); sys.stdout.flush(); os._exit(0)
        case "noise": print("this is no JSON", flush=True); continue
        case "grow": bytearray(600 * 1024 * 1024)
        case "write": open(question["path"], "wb").write(bytes(3_000_000))
    secret = os.environ.get("VALIDATOR_API_KEY")
    print(json.dumps({"pid": os.getpid(), "secret": secret, "number": question.get("number")}), flush=True)
"""


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child("echo", [sys.executable, "-c", ECHO], memory_mb=300, max_asks=5, env={})
    yield child
    child.close()


def test_one_child_answers_many_questions(child: Child) -> None:
    assert child.ask({}, 10)["pid"] == child.ask({}, 10)["pid"]


def test_a_child_is_replaced_after_so_many_questions(child: Child) -> None:
    pids = [child.ask({}, 10)["pid"] for _ in range(11)]
    assert [len(set(pids[:5])), len(set(pids[5:10])), len(set(pids))] == [1, 1, 3]


def test_two_threads_that_ask_one_child_both_get_their_own_answer(child: Child) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: (number, child.ask({"number": number}, 20)["number"]), range(4)))
    assert all(asked == answered for asked, answered in answers)


def test_a_closed_child_ends_at_once_and_is_not_started_again(child: Child) -> None:
    pid = child.ask({}, 10)["pid"]
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(child.ask, {"do": "sleep"}, 60)
        time.sleep(0.2)
        child.close()
        assert isinstance(asking.exception(20), ChildDied)
    assert not psutil.pid_exists(pid)
    with pytest.raises(ChildDied):
        child.ask({}, 10)


def test_a_child_does_not_see_the_api_key(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VALIDATOR_API_KEY", "secret")
    assert child.ask({}, 10)["secret"] is None


@pytest.mark.parametrize(
    ("do", "seconds", "why"),
    [("sleep", 0.3, Death.TIMEOUT), ("exit", 10, Death.CRASH), ("half", 10, Death.CRASH), ("noise", 10, Death.CRASH)],
)
def test_a_child_without_an_answer_is_ended_and_the_next_question_is_answered(
    child: Child, do: str, seconds: float, why: Death
) -> None:
    before = child.ask({}, 10)["pid"]
    with pytest.raises(ChildDied) as death:
        child.ask({"do": do}, seconds)
    assert (death.value.why, psutil.pid_exists(before)) == (why, False)
    assert child.ask({}, 10)["pid"] != before


def test_a_killed_child_is_a_crash_not_a_memory_death(child: Child) -> None:
    pid = child.ask({}, 10)["pid"]
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(ChildDied) as death:
        child.ask({"do": "sleep"}, 20)
    assert death.value.why is Death.CRASH


@pytest.mark.skipif(sys.platform != "linux", reason="the memory bound of a child is Linux's RLIMIT_DATA")
def test_a_child_cannot_outgrow_its_memory(child: Child) -> None:
    with pytest.raises(ChildDied) as death:
        child.ask({"do": "grow"}, 20)
    assert death.value.why is Death.MEMORY


@pytest.mark.skipif(sys.platform != "linux", reason="the file bound of a child is Linux's prlimit")
def test_a_child_cannot_fill_the_disk(child: Child, tmp_path: Path) -> None:
    with pytest.raises(ChildDied):
        child.ask({"do": "write", "path": str(tmp_path / "big")}, 20)
    assert (tmp_path / "big").stat().st_size <= 1024 * 1024


# --- the engine and the inspector -------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.glb"
    path.write_bytes(samples.glb_with(samples.picture()))
    return path


@pytest.fixture
def make_bench(engine: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**limits: float) -> Bench:
        made.append(Bench(Limits.model_validate(limits)))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


def children() -> list[int]:
    return [child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


def test_a_bench_whose_children_were_killed_judges_the_next_file(make_bench: Callable[..., Bench], model: Path) -> None:
    bench = make_bench()
    before = set(children())
    assert judge_file(model, bench).result is Result.VALID
    victims = set(children()) - before
    assert len(victims) == 2
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    assert judge_file(model, bench).result is Result.VALID


@pytest.mark.parametrize("part", [Khronos, Inspector])
def test_a_file_on_which_a_part_crashes_twice_has_no_verdict(
    make_bench: Callable[..., Bench], model: Path, part: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def crash(self: object, *args: object, **more: object) -> None:
        asked.append("look")
        raise ChildDied("part", Death.CRASH, "exit status -11")

    bench = make_bench()
    monkeypatch.setattr(part, "look", crash)
    with pytest.raises(Undecided, match=r"m\.glb"):
        judge_file(model, bench)
    assert len(asked) == 2


def test_a_file_that_takes_too_long_has_no_verdict(
    make_bench: Callable[..., Bench], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench()
    bench.warm_up()
    monkeypatch.setattr(bench._limits, "file_seconds", 0.0001)  # the children share these limits
    with pytest.raises(Undecided, match="no answer in"):
        judge_file(model, bench)


@pytest.mark.skipif(sys.platform != "linux", reason="the memory bound of a child is Linux's RLIMIT_DATA")
def test_a_model_that_needs_more_memory_than_the_engine_may_use_is_invalid(
    make_bench: Callable[..., Bench], tmp_path: Path
) -> None:
    path = tmp_path / "large.glb"
    size = 500 * 1024 * 1024
    content = samples.document(buffers=[{"byteLength": size}])
    path.write_bytes(samples.glb(content, samples.triangle()))
    with path.open("r+b") as file:
        file.truncate(size)
    report = judge_file(path, make_bench(engine_memory_mb=768))
    assert [issue.code for issue in report.issues] == ["NEEDS_TOO_MUCH_MEMORY"]
    assert report.result is Result.INVALID


@pytest.mark.skipif(sys.platform != "linux", reason="the memory bound of a child is Linux's RLIMIT_DATA")
def test_an_image_that_needs_more_memory_than_the_inspector_may_use_is_invalid(
    make_bench: Callable[..., Bench], tmp_path: Path
) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(samples.png_of(11_000, 11_000))
    report = judge_file(path, make_bench(inspector_memory_mb=128))
    assert [issue.code for issue in report.issues] == ["NEEDS_TOO_MUCH_MEMORY"]


def test_children_end_with_a_service_that_is_killed(engine: Path, start_service: Callable[..., object], tmp_path: Path) -> None:
    service = start_service()
    assert service.post(samples.package(tmp_path / "a.zip")).json()["data"][0]["result"] == "Valid"
    parent = psutil.Process(service.process.pid)
    orphans = parent.children()
    assert len(orphans) >= 2
    parent.kill()
    deadline = time.monotonic() + 20
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in orphans):
        assert time.monotonic() < deadline, "a child outlived the service"
        time.sleep(0.05)
