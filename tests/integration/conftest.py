"""A worker's whole surroundings on real servers, shared by the session's tests; each test uses job ids of its own."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, text

from api_server import SETTINGS, Site, make_ports, serve
from fault_proxy import FaultProxy, fault_proxy
from ledger_twin import MemoryHost, MemoryJobQueue, MemoryLedger, MemoryStatusBoard
from ncr_upload.adapters.sql.claims import SqlClaims
from ncr_upload.adapters.sql.submissions import SqlSubmissions
from ncr_upload.domain.errors import Unavailable
from ncr_upload.entrypoints.api.app import create_app
from ncr_upload.entrypoints.bundled_validator import BundledValidator
from ncr_upload.entrypoints.embedded.product import Product, break_model, make_product
from ncr_upload.entrypoints.settings import Settings
from servers import S3Server, SftpServer, free_port, start_asyncssh, start_s3
from studio_rows import open_database
from workplace import Workplace

READY_SECONDS = 30


@pytest.fixture(scope="session")
def product() -> Product:
    return make_product("studio/SKU1", "SKU1")


@pytest.fixture(scope="session")
def small(product: Product) -> Product:
    """Of the product, what makes a package: main model, material and a render; for tests that deliver often."""
    keys = [key for key, target in product.targets.items() if target.endswith((".glb", "_front.jpg"))]
    files, targets = ({key: each[key] for key in keys} for each in (product.files, product.targets))
    return replace(product, files=files, targets=targets)


@pytest.fixture(scope="session")
def broken_product() -> Product:
    return break_model(make_product("studio/BROKEN", "BROKEN"))


@pytest.fixture(scope="session")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[S3Server, SftpServer, dict[str, str]]]:
    with ExitStack() as servers:
        s3 = servers.enter_context(start_s3(tmp_path_factory.mktemp("s3")))
        sftp = servers.enter_context(start_asyncssh(tmp_path_factory.mktemp("sftp") / "server"))
        validator = BundledValidator().start()
        _wait_for(validator["VALIDATOR_API_URL"].replace("/validate", "/healthz"))
        yield s3, sftp, validator


@pytest.fixture
def job_id() -> str:
    """Used by no other test."""
    return f"job-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def workplace(
    outside: tuple[S3Server, SftpServer, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Workplace]:
    s3, sftp, validator = outside
    for name in [name for name in os.environ if name.lower() in Settings.model_fields]:
        monkeypatch.delenv(name)
    settings = Settings(
        _env_file=None,
        database_url=SecretStr(f"sqlite:///{tmp_path / 'ncr.db'}"),
        redis_port=free_port(),
        wasabi_endpoint=s3.endpoint,
        wasabi_access_key=SecretStr(s3.access_key),
        wasabi_secret_key=SecretStr(s3.secret_key),
        bucket_name=s3.bucket,
        validator_api_url=validator["VALIDATOR_API_URL"],
        validator_api_key=SecretStr(validator["VALIDATOR_API_KEY"]),
        sftp_host=sftp.login.host,
        sftp_port=sftp.login.port,
        sftp_username=sftp.login.username,
        sftp_password=SecretStr(sftp.login.password or ""),
        sftp_host_key=sftp.login.host_key,
        sftp_base_dir=sftp.base_dir,
        sftp_timeout_seconds=5,
        validator_timeout_seconds=30,
        work_dir=tmp_path / "work",
        max_attempts=3,
        retry_base_seconds=0.01,
        retry_max_seconds=0.02,
        park_hours=1e-9,
    )
    engine = open_database(tmp_path / "ncr.db")
    yield Workplace(s3, sftp, engine, settings)
    engine.dispose()


@pytest.fixture
def storage(workplace: Workplace) -> Iterator[FaultProxy]:
    """What the worker takes for the bucket: a proxy that counts."""
    real = urlsplit(workplace.settings.wasabi_endpoint or "")
    with fault_proxy((str(real.hostname), int(real.port or 0))) as proxy:
        workplace.change(wasabi_endpoint=f"http://127.0.0.1:{proxy.port}", download_concurrency=2)
        yield proxy


# --- the API, on the ledger's twin and on SQLite


@dataclass
class Backing:
    """Where the records are kept."""

    ledger: Any
    claims: Any
    check: Callable[[], None]


@pytest.fixture(params=["memory", "sql"])
def backing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backing]:
    if request.param == "memory":
        ledger = MemoryLedger(max_attempts=5)
        yield Backing(ledger, ledger, lambda: None)
        return
    engine: Engine = open_database(tmp_path / "api.db")

    def check() -> None:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))

    yield Backing(SqlSubmissions(engine, max_attempts=5), SqlClaims(engine), check)
    engine.dispose()


@pytest.fixture
def site(backing: Backing) -> Iterator[Site]:
    board, queue, host = MemoryStatusBoard(), MemoryJobQueue(workers=["celery@here"]), MemoryHost()
    ports = make_ports(
        backing.ledger,
        board,
        queue,
        host,
        "ncr_jobs",
        backing.check,
        {"s3": lambda: None, "sftp": sftp_is_away},
    )
    with serve(create_app(ports, SETTINGS)) as http:
        yield Site(http, ports, backing.claims, board, queue, host)


def sftp_is_away() -> None:
    raise Unavailable("sftp_unreachable", "sftp.partner:22 does not answer", "Ask the partner.")


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"nothing answered at {url}")
