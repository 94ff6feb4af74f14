#!/usr/bin/env python3
"""Write `env_sample` from the settings class: names, defaults and descriptions stand there, and only there.

    python scripts/env_sample.py           write it (`make docs` does)
    python scripts/env_sample.py --check   exit with 1 if it is not what the class says

The section for containers is written by hand, since no program reads those settings; it is kept as it is.
"""

from __future__ import annotations

import re
import sys
import textwrap
from enum import Enum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from ncr_upload.entrypoints.settings import Settings  # noqa: E402

SAMPLE = ROOT / "env_sample"
WIDTH = 128
HEAD = """\
# Every setting of the service. Copy to .env and fill in what has no value; the rest are the defaults.
# Variables of the environment win over this file. No secret has a default.
# Made from src/ncr_upload/entrypoints/settings.py by scripts/env_sample.py (`make docs`), all but the section for containers.
"""
SECTIONS = {
    "api_host": "API",
    "redis_host": "Redis",
    "database_url": "Database: the studio's, where the service keeps its own ncr_* tables too",
    "wasabi_endpoint": "Object storage: Wasabi or any S3",
    "validator_api_url": "Validator",
    "sftp_host": "Destination",
    "work_dir": "Jobs",
    "max_memory_usage_percent": "Memory and batches",
    "flower_host": "Flower",
    "log_level": "Logs",
}
"""By the first setting of each, in the order of the class."""

CONTAINERS = re.compile(r"^# --- Containers.*?(?=^# --- |\Z)", re.MULTILINE | re.DOTALL)


def render(current: str) -> str:
    """Return the file as it should be. `current` is the file as it is, for the section that is kept."""
    parts = [HEAD]
    for name, field in Settings.model_fields.items():
        if name in SECTIONS:
            parts.append(f"\n{_heading(SECTIONS[name])}\n")
        if field.description:
            parts += [f"# {line}\n" for line in textwrap.wrap(field.description, WIDTH - 2, break_on_hyphens=False)]
        parts.append(f"{name.upper()}={_value(field.default)}\n")
    kept = CONTAINERS.search(current)
    return "".join(parts) + (f"\n{kept.group().rstrip()}\n" if kept else "")


def _heading(title: str) -> str:
    return f"# --- {title} ".ljust(WIDTH, "-")


def _value(default: Any) -> str:
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float):
        return f"{default:g}"
    return str(default.value if isinstance(default, Enum) else default)


def main() -> int:
    current = SAMPLE.read_text()
    wanted = render(current)
    if "--check" in sys.argv[1:]:
        return int(wanted != current)
    SAMPLE.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
