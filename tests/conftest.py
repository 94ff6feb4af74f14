"""Servers that tests of several folders share; what a run says of itself: on which databases and interpreters it ran."""

from __future__ import annotations

import re
import sqlite3
import subprocess
from collections.abc import Iterator

import pytest

from databases import SERVERS
from interpreters import OTHERS
from parts import find
from servers import SftpServer, start_sshd
from valkey_server import ValkeyServer, start_valkey

_PROGRAMS = {"postgresql": "postgres", "mariadb": "mariadbd", "mysql": "ncr-mysqld"}


@pytest.fixture(scope="module")
def openssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SftpServer]:
    with start_sshd(tmp_path_factory.mktemp("openssh")) as server:
        yield server


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    with start_valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = [report.nodeid for report in terminalreporter.stats.get("passed", [])]
    told = []
    for engine in ("sqlite", *SERVERS):
        count = sum(engine in re.split(r"[\[\]-]", nodeid) for nodeid in passed)
        if count:
            told.append(f"{count} on {engine} {_version(engine)}")
    if find(_PROGRAMS["mysql"]) is None:
        told.append("none on mysql, which is not here (make servers fetches it on Debian)")
    if told:
        terminalreporter.write_line(f"databases: {', '.join(told)}")
    pythons = {version for nodeid in passed for version in re.findall(r"test_every_python_found\w+\[([\d.]+)\]", nodeid)}
    if pythons:
        terminalreporter.write_line(f"interpreters: {', '.join(sorted(pythons))} of {', '.join(OTHERS)}")


def _version(engine: str) -> str:
    if engine == "sqlite":
        return sqlite3.sqlite_version
    program = find(_PROGRAMS[engine])
    if program is None:
        return "(unknown version)"
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"\d+(\.\d+)+", said)
    return found[0] if found else "(unknown version)"
