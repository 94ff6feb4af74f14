"""The databases that the contract of the ledger and the catalogue holds on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from databases import SERVERS, Databases
from ledgers import Ledger, memory_ledger, sql_ledger
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
