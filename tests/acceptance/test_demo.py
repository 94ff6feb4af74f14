"""`ncr demo`: it shows the main job, and it does not say that all is well when it is not."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ncr_upload.entrypoints.embedded.product import make_product
from ncr_upload.entrypoints.embedded.tour import Chapter, check_delivered, check_refused, list_delivered
from parts import require
from running_stack import NCR

ROOT = Path(__file__).parents[2]
TASK = "11111111-2222-3333-4444-555555555555"


@pytest.mark.real
@pytest.mark.timeout(240)
def test_one_command_delivers_a_product_shows_it_and_refuses_a_broken_one(tmp_path: Path) -> None:
    require("rclone")
    picture = tmp_path / "demo.svg"
    command = [*NCR, "demo", "--state-dir", str(tmp_path / "demo"), "--picture", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = done.stdout
    assert "\x1b" not in shown
    for part in ("POST http://127.0.0.1:", "VASE-2001.glb", "verdict: Valid", "IAPPROVED", "timeline", "ACCESSOR_INDEX_OOB"):
        assert part in shown, shown
    assert "All as promised" in shown
    check_picture(picture.read_text(), str(tmp_path))
    (delivery,) = (tmp_path / "demo/sftp").glob("demo-*")
    assert len([path for path in delivery.rglob("*") if path.is_file()]) == 22


def check_picture(drawn: str, folder: str) -> None:
    """The picture shows the delivery and the refusal, and nothing of this machine or of another host."""
    shown = " ".join("".join(ElementTree.fromstring(drawn).itertext()).split())
    for words in ("$ make demo", "VASE-2001.glb", "… and 7 more", "refused: validation_failed", "All as promised"):
        assert words in shown, shown
    assert folder not in drawn
    assert set(re.findall(r"https?://[^\s\"<]+", drawn)) == {"http://www.w3.org/2000/svg", "https://www.textualize.io"}


def test_a_picture_in_a_folder_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path) -> None:
    command = [*NCR, "demo", "--state-dir", str(tmp_path / "demo"), "--picture", str(tmp_path / "nowhere" / "demo.svg")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"{tmp_path / 'nowhere'} is not a folder" in done.stderr + done.stdout
    assert not (tmp_path / "demo").exists()


def test_the_committed_picture_is_one_that_the_demo_draws() -> None:
    check_picture((ROOT / "docs/pictures/demo.svg").read_text(), str(ROOT))


@pytest.fixture
def expected() -> dict[str, bytes]:
    return make_product("demo/x", "SKU", seed=1).delivered


@pytest.fixture
def root(tmp_path: Path, expected: dict[str, bytes]) -> Path:
    for target, data in expected.items():
        path = tmp_path / "job" / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path


def delivered_chapter(root: Path, **changes: Any) -> Chapter:
    details = {"id": 1, "is_uploaded": 0, "job_status": "IAPPROVED"}
    chapter = Chapter("job", "SKU", status={"status": "completed", "message": "", "task_id": TASK})
    chapter.rows_before = {"job_details": [details], "email": [], "history_log": []}
    chapter.rows_after = {"job_details": [details], "email": [{"id": 1}], "history_log": [{"id": 1}]}
    chapter.files = list_delivered(root, "job")
    for name, value in changes.items():
        setattr(chapter, name, value)
    return chapter


def test_a_delivery_as_promised_passes(root: Path, expected: dict[str, bytes]) -> None:
    chapter = delivered_chapter(root)
    check_delivered(chapter, expected, root)
    assert chapter.failures == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?"), "other bytes"),
        (lambda file: file.unlink(), "was not delivered"),
        (lambda file: file.with_name("stray.txt").write_text("x"), "no file of the product"),
    ],
)
def test_a_delivery_that_differs_in_one_file_is_told(root: Path, expected: dict[str, bytes], damage: Any, words: str) -> None:
    damage(root / "job/SKU/SKU.glb")
    chapter = delivered_chapter(root)
    check_delivered(chapter, expected, root)
    assert [words in failure for failure in chapter.failures] == [True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": {"status": "failed", "message": "no room", "task_id": TASK}}, "no room"),
        (
            {"rows_after": {"job_details": [{"is_uploaded": 1, "job_status": "UPLOADED"}], "email": [1], "history_log": [1]}},
            "not updated",
        ),
        (
            {
                "rows_after": {
                    "job_details": [{"is_uploaded": 0, "job_status": "IAPPROVED"}],
                    "email": [1, 2],
                    "history_log": [1],
                }
            },
            "2 rows were added to email",
        ),
    ],
)
def test_a_wrong_outcome_is_told(root: Path, expected: dict[str, bytes], changes: dict[str, Any], words: str) -> None:
    chapter = delivered_chapter(root, **changes)
    check_delivered(chapter, expected, root)
    assert len(chapter.failures) == 1
    assert words in chapter.failures[0]


def test_a_refused_package_of_which_something_was_delivered_is_told(root: Path) -> None:
    status = {"status": "validation_failed", "message": "", "task_id": TASK, "problem": {"message": "ACCESSOR_INDEX_OOB"}}
    chapter = Chapter("job", "SKU", status=status, rows_after={"email": []})
    check_refused(chapter, root)
    assert chapter.failures == ["job: something of a refused package was delivered"]
