"""Benches and services for the validator's tests. The Khronos engine is a real part: `make setup` fetches it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from ncr_validator.bench import Bench
from ncr_validator.engine import engine_folder, is_fetched
from ncr_validator.judgement import judge_file, judge_package
from ncr_validator.limits import Limits
from ncr_validator.verdicts import Report
from parts import miss

KEY = "a-key-for-tests"


@pytest.fixture(scope="session")
def engine() -> Path:
    """The folder with the Khronos engine."""
    folder = engine_folder()
    if not is_fetched(folder):
        miss(f"the Khronos engine is not in {folder} (make setup, or python -m ncr_validator fetch-engine)")
    return folder


@pytest.fixture(scope="module")
def bench(engine: Path) -> Iterator[Bench]:
    bench = Bench(Limits())
    yield bench
    bench.close()


@pytest.fixture
def judge(bench: Bench, tmp_path: Path) -> Callable[..., Report]:
    """Judge a file, or a zip as the package of `sku`."""

    def judge(path: Path, sku: str = "SKU1", limits: Limits | None = None) -> Report:
        if path.suffix != ".zip":
            return judge_file(path, bench)
        folder = tmp_path / "unpacked"
        folder.mkdir()
        with path.open("rb") as archive:
            return judge_package(archive, sku, folder, limits or Limits(), bench)

    return judge


@dataclass(frozen=True)
class Service:
    url: str
    process: subprocess.Popen[str]

    def post(self, zip_file: Path, sku: str = "SKU1", key: str = KEY) -> httpx.Response:
        with zip_file.open("rb") as file:
            return httpx.post(f"{self.url}/{sku}", files={"zip_file": file}, headers={"X-API-Key": key}, timeout=60)


@pytest.fixture(scope="module")
def start_service(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Service]]:
    """Start the real program with the given VALIDATOR_* settings, ready to answer."""
    running: list[subprocess.Popen[str]] = []

    def start(**settings: object) -> Service:
        work = tmp_path_factory.mktemp("service")
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("VALIDATOR_")},
            "VALIDATOR_API_KEY": KEY,
            "VALIDATOR_WORK_DIR": str(work),
            **{f"VALIDATOR_{name.upper()}": str(value) for name, value in settings.items()},
        }
        with (work / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ncr_validator", "serve", "--port", "0"],
                env=environment, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        running.append(process)
        assert process.stdout is not None
        return Service(json.loads(process.stdout.readline())["url"], process)

    yield start
    for process in running:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Service]) -> Service:
    return start_service()
