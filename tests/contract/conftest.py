"""What the contracts hold on: databases for the ledger and the catalogue, SFTP servers for the dropoff."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from databases import SERVERS, Databases
from dropoff_place import DropoffPlace, place_on
from ledgers import Ledger, memory_ledger, sql_ledger
from servers import SftpServer, start_asyncssh
from studio_rows import open_database


@pytest.fixture(scope="session")
def databases() -> Iterator[Databases]:
    running = Databases()
    yield running
    running.close()


@pytest.fixture(params=["sqlite", *SERVERS])
def engine(request: pytest.FixtureRequest, databases: Databases, tmp_path: Path) -> Iterator[Engine]:
    """An empty database with the service's tables and the studio's, on each kind of server."""
    engine = open_database(databases.create(request.param, tmp_path))
    yield engine
    engine.dispose()


@pytest.fixture(params=["sqlite", *SERVERS, "memory"])
def ledger(request: pytest.FixtureRequest, databases: Databases, tmp_path: Path) -> Iterator[Ledger]:
    if request.param == "memory":
        yield memory_ledger()
        return
    engine = open_database(databases.create(request.param, tmp_path))
    yield sql_ledger(engine)
    engine.dispose()


# --- destinations


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SftpServer]:
    """SFTP version 3 without any extension; it fails on request."""
    with start_asyncssh(tmp_path_factory.mktemp("plain"), extensions=False) as server:
        yield server


@pytest.fixture(scope="module")
def asyncssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SftpServer]:
    with start_asyncssh(tmp_path_factory.mktemp("asyncssh")) as server:
        yield server


BOTH_WAYS = ("test_dropoff", *(f"test_dropoff_{part}" for part in ("arrival", "growing", "resume", "wide")))
"""The suites of what passes through the transport; the others are of what lies above. `test_dropoff_wire` chooses its own."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run those suites with the fast transport, and through asyncssh's own SFTPClient."""
    with_server = {"place", "real", "server", "plain", "openssh"} & set(metafunc.fixturenames)
    if metafunc.module.__name__.rpartition(".")[2] in BOTH_WAYS and with_server:
        metafunc.parametrize("_transport", ["fast", "sftpclient"], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the second way where there is no transport, and where `plain`, the same program, has it already."""
    extra = [item for item in items if _is_once_enough(getattr(item, "callspec", None))]
    items[:] = [item for item in items if item not in extra]
    config.hook.pytest_deselected(items=extra)


def _is_once_enough(call: Any) -> bool:
    params = {} if call is None else call.params
    return params.get("_transport") == "sftpclient" and params.get("place", "plain") not in ("plain", "openssh")


@pytest.fixture(autouse=True)
def _transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if getattr(request, "param", "fast") == "sftpclient":
        monkeypatch.setattr("ncr_upload.adapters.sftp_dropoff.channels.quicken", lambda _connection: False)


@pytest.fixture(params=["plain", "openssh"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DropoffPlace]:
    with place_on(request.getfixturevalue(request.param), tmp_path.name) as place:
        yield place
