"""What stays hand-written (ADR 12) is where the table says, and what it leans on is bounded."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from ncr_upload.adapters.sftp_dropoff.wire import TESTED_VERSION

ROOT = Path(__file__).parents[2]
ADR = (ROOT / "docs/adr/0012-what-stays-hand-written.md").read_text()
PARTS = [line.split("|")[1].strip() for line in ADR.splitlines() if line.startswith("| ") and not line.startswith("| Part")]
REQUIREMENTS = {
    re.split(r"[\[>=<]", text)[0]: text
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
}
SOURCES = {path: path.read_text() for path in (ROOT / "src/ncr_upload").rglob("*.py")}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_the_table_is_in_the_code(part: str) -> None:
    names = re.findall(r"`([^`]+)`", part)
    assert names
    for name in names:
        module, _, rest = name.removesuffix(".py").partition(".")
        found = [text for path, text in SOURCES.items() if f"/{path.with_suffix('')}".endswith(f"/{module}")]
        assert found, f"no module {module}"
        assert not rest or any(re.search(rf"^(?:class|def|    def) {rest}\b", text, re.MULTILINE) for text in found), name


@pytest.mark.parametrize("name", ["asyncssh", "billiard", "celery", "kombu"])
def test_what_is_leant_on_inside_is_bounded_to_a_minor_version(name: str) -> None:
    low, high = re.search(r">=(\d+\.\d+)[.\d]*,<(\d+\.\d+)$", REQUIREMENTS[name]).groups()  # type: ignore[union-attr]
    major, minor = map(int, low.split("."))
    assert high == f"{major}.{minor + 1}"


def test_the_fast_transport_is_tested_with_the_version_that_is_allowed() -> None:
    assert REQUIREMENTS["asyncssh"].startswith(f"asyncssh[bcrypt]>={TESTED_VERSION[0]}.{TESTED_VERSION[1]}.")
