"""The other Python interpreters of this machine, on PATH and among pyenv's, for what must be the same on all of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

OTHERS = ("3.11", "3.12", "3.13", "3.14")


def find_interpreter(version: str) -> str | None:
    """Return the path of a Python of that version which starts; that of the suite itself where it is one."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" == version:
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python{version}")))]
    return next((path for path in candidates if path and _starts(path, version)), None)


def _starts(path: str, version: str) -> bool:
    """Whether it is that version: a shim on PATH may stand for one that is not chosen."""
    asked = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout.strip() == version
