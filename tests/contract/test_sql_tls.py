"""The connection to the studio's database is encrypted as the settings say, to nobody but the server they mean."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from sqlalchemy import make_url, text

from certificates import Certificates, make_certificates
from databases import SERVERS, prepared
from fault_table import fault
from ncr_upload.domain.errors import Unavailable
from ncr_upload.entrypoints.bootstrap.records import check_database, make_engine
from ncr_upload.entrypoints.settings import Settings

CIPHER = {
    "postgresql": "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()",
    "mariadb": "SELECT variable_value FROM information_schema.session_status WHERE variable_name = 'Ssl_version'",
    "mysql": "SELECT variable_value FROM performance_schema.session_status WHERE variable_name = 'Ssl_version'",
}
PASSWORD = "hunter2"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"), rfc5280=False)


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[tuple[str, str]]:
    """The kind, and the URL of a server with TLS on; PostgreSQL asks for a password."""
    with prepared(request.param, login=f"test:{PASSWORD}" if request.param == "postgresql" else "") as running:
        certificate, key = (Path(shutil.copy(path, running.folder)) for path in (certificates.server, certificates.server_key))
        if running.user:
            shutil.chown(key, running.user, running.user)
        key.chmod(0o600)
        if request.param == "postgresql":
            options = {"ssl": "on", "ssl_cert_file": str(certificate), "ssl_key_file": str(key)}
            running.more = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        else:
            running.more = [f"--ssl-cert={certificate}", f"--ssl-key={key}"]
        yield request.param, running.start()


def settings_for(url: str, **tls: object) -> Settings:
    return Settings(_env_file=None, database_url=SecretStr(url), **tls)


def ask(settings: Settings, statement: str) -> object:
    engine = make_engine(settings, pool_size=1)
    try:
        with engine.connect() as connection:
            return connection.execute(text(statement)).scalar()
    finally:
        engine.dispose()


def refusal(settings: Settings) -> Unavailable:
    engine = make_engine(settings, pool_size=1)
    try:
        with pytest.raises(Unavailable) as refused:
            check_database(engine)
        return refused.value
    finally:
        engine.dispose()


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
def test_the_connection_is_encrypted(server: tuple[str, str], certificates: Certificates, mode: str) -> None:
    kind, url = server
    assert str(ask(settings_for(url, db_ssl_mode=mode, db_ssl_ca=certificates.authority), CIPHER[kind])).startswith("TLSv1")


def test_without_encryption_when_so_wanted(server: tuple[str, str]) -> None:
    kind, url = server
    assert not ask(settings_for(url, db_ssl_mode="disable"), CIPHER[kind])


def test_the_query_of_database_url_works_too(server: tuple[str, str], certificates: Certificates) -> None:
    kind, url = server
    query = {"sslmode": "verify-full", "sslrootcert": str(certificates.authority)}
    query = query if kind == "postgresql" else {"ssl_ca": str(certificates.authority)}
    with_tls = make_url(url).update_query_dict(query).render_as_string(hide_password=False)
    assert str(ask(settings_for(with_tls), CIPHER[kind])).startswith("TLSv1")


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(
            mode,
            marks=fault(
                "Database: certificate of a foreign authority",
                injector="TLS",
                invariants="A",
                outcome="refused, naming host and DB_SSL_CA",
            ),
        )
        for mode in ("verify-ca", "verify-full")
    ],
)
def test_a_certificate_of_a_foreign_authority_is_refused(
    server: tuple[str, str], certificates: Certificates, mode: str
) -> None:
    refused = refusal(settings_for(server[1], db_ssl_mode=mode, db_ssl_ca=certificates.foreign))
    assert (refused.code, "127.0.0.1" in refused.message, "DB_SSL_CA" in refused.next_step) == ("database_tls", True, True)
    assert PASSWORD not in str(refused)


def test_a_certificate_for_another_host_is_refused(server: tuple[str, str], certificates: Certificates) -> None:
    other = make_url(server[1]).set(host="localhost").render_as_string(hide_password=False)
    refused = refusal(settings_for(other, db_ssl_mode="verify-full", db_ssl_ca=certificates.authority))
    assert refused.code == "database_tls", refused
    engine = make_engine(settings_for(other, db_ssl_mode="verify-ca", db_ssl_ca=certificates.authority), pool_size=1)
    check_database(engine)
    engine.dispose()


def test_a_server_without_tls_is_refused_when_tls_is_required(tmp_path: Path) -> None:
    with prepared("mariadb") as running:
        running.more = ["--skip-ssl"]
        refused = refusal(settings_for(running.start(), db_ssl_mode="require"))
    assert refused.code == "database_tls", refused


def test_a_wrong_password_is_refused_by_host_and_name_without_showing_it(server: tuple[str, str]) -> None:
    wrong = make_url(server[1]).set(username="test", password="hunter3").render_as_string(hide_password=False)
    refused = refusal(settings_for(wrong))
    assert (refused.code, "127.0.0.1" in refused.message) == ("database_login_refused", True), refused
    assert "hunter3" not in str(refused)


@pytest.mark.parametrize("content", [None, "not a certificate"])
def test_a_file_that_holds_no_certificate_is_refused_with_its_setting(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValidationError, match=r"db_ssl_ca[\s\S]*ca\.pem"):
        settings_for("postgresql+psycopg://h/d", db_ssl_ca=path)
