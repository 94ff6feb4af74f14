"""The program: `python -m ncr_validator`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ncr_validator
from ncr_validator.engine import EngineMissing, fetch_engine, is_fetched
from validator import samples


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VALIDATOR_")}
    return subprocess.run(
        [sys.executable, "-m", "ncr_validator", *arguments],
        env=clean | environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("command", [[], ["serve"], ["check"], ["fetch-engine"]])
def test_help_tells_what_each_command_does(command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


@pytest.mark.parametrize("environment", [{}, {"VALIDATOR_API_KEY": ""}])
def test_serve_does_not_start_without_a_key(environment: dict[str, str]) -> None:
    done = run("serve", "--port", "0", **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert "VALIDATOR_API_KEY" in done.stderr


def test_serve_does_not_start_without_the_engine_and_says_how_to_get_it(tmp_path: Path) -> None:
    done = run("serve", "--port", "0", VALIDATOR_API_KEY="k", NCR_VALIDATOR_ENGINE_DIR=str(tmp_path / "none"))
    assert done.returncode == 2
    assert "fetch-engine" in done.stderr


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"VALIDATOR_CONCURRENCY": "0"}, "VALIDATOR_CONCURRENCY"), ({"VALIDATOR_PROFILE": "gone.json"}, "gone.json")],
)
def test_serve_does_not_start_on_a_wrong_setting_and_names_it(engine: Path, settings: dict[str, str], named: str) -> None:
    done = run("serve", "--port", "0", VALIDATOR_API_KEY="k", **settings)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_check_ends_with_0_for_valid_and_warning_and_1_for_invalid(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "good.glb").write_bytes(samples.glb())
    (tmp_path / "warn.glb").write_bytes(samples.glb_with(samples.picture(side=60)))
    (tmp_path / "bad.glb").write_bytes(b"")
    for name, code, word in (("good", 0, "Valid"), ("warn", 0, "Warning"), ("bad", 1, "Invalid")):
        done = run("check", str(tmp_path / f"{name}.glb"))
        assert (done.returncode, done.stdout.splitlines()[0]) == (code, f"{name}.glb: {word}")


def test_check_judges_a_package_and_prints_the_whole_report(engine: Path, tmp_path: Path) -> None:
    path = samples.package(tmp_path / "a.zip")
    done = run("check", str(path), "--sku", "SKU2", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["result"], report["sku_id"]) == (1, "Invalid", "SKU2")
    assert {issue["code"] for issue in report["issues"]} >= {"LAYOUT_WRONG_FOLDER"}


def test_check_of_a_zip_without_its_product_is_a_usage_error(engine: Path, tmp_path: Path) -> None:
    done = run("check", str(samples.package(tmp_path / "a.zip")))
    assert done.returncode == 2
    assert "--sku" in done.stderr


def test_check_takes_a_profile_and_its_severity(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "m.glb").write_bytes(samples.glb())
    (tmp_path / "rules.json").write_text('{"version": "1", "model": {"triangles": {"maximum": 0}}}')
    profile = ("--profile", str(tmp_path / "rules.json"))
    assert run("check", str(tmp_path / "m.glb"), *profile).returncode == 0
    assert run("check", str(tmp_path / "m.glb"), *profile, "--profile-severity", "error").returncode == 1
    assert run("check", str(tmp_path / "m.glb"), *profile, "--profile-severity", "fatal").returncode == 2


def test_fetch_engine_is_done_once(engine: Path) -> None:
    done = run("fetch-engine")
    assert done.returncode == 0
    assert "was already" in done.stdout


def test_fetch_engine_leaves_what_else_is_in_the_folder_and_mends_a_broken_engine(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "package-lock.json").write_text("{}")
    (tmp_path / "mine.txt").write_text("keep")
    done = run("fetch-engine", NCR_VALIDATOR_ENGINE_DIR=str(tmp_path))
    if done.returncode != 0 and not os.environ.get("CI"):
        pytest.skip(f"npm cannot fetch the engine here: {done.stderr}")
    assert (done.returncode, is_fetched(tmp_path), (tmp_path / "mine.txt").read_text()) == (0, True, "keep")


def test_an_engine_that_does_not_match_its_hash_is_not_installed(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "khronos"
    shutil.copytree(Path(ncr_validator.__file__).parent / "khronos", shipped)
    lock = json.loads((shipped / "package-lock.json").read_text())
    lock["packages"]["node_modules/gltf-validator"]["integrity"] = "sha512-" + "A" * 86 + "=="
    (shipped / "package-lock.json").write_text(json.dumps(lock))
    monkeypatch.setattr("ncr_validator.engine.resources.files", lambda _: tmp_path)
    with pytest.raises(EngineMissing, match="npm"):
        fetch_engine(tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_the_lock_file_pins_the_engine_by_hash_and_names_no_host() -> None:
    folder = Path(__file__).parents[2] / "src" / "ncr_validator" / "khronos"
    lock = json.loads((folder / "package-lock.json").read_text())
    engine = lock["packages"]["node_modules/gltf-validator"]
    assert (engine["version"], engine["integrity"][:7]) == ("2.0.0-dev.3.10", "sha512-")
    assert "resolved" not in engine
    assert "://" not in (folder / "package-lock.json").read_text()
