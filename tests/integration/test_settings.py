"""Settings: documented, without a secret in their defaults, and read as the seed README says."""

from __future__ import annotations

import re
from pathlib import Path
from runpy import run_path
from typing import get_args

import pytest
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from ncr_upload.entrypoints.settings import Settings, SettingsInvalid, load_settings

SAMPLE = Path(__file__).parents[2] / "env_sample"
PERFORMANCE = SAMPLE.with_name("docs") / "performance.md"
COMPOSE = SAMPLE.with_name("docker-compose.yml")
INTERPOLATED = re.compile(r"\$\{(\w+)")
DEFAULTED = re.compile(r"\$\{(\w+):-([^}]*)\}")
LINE = re.compile(r"^([A-Z][A-Z0-9_]*)=(.*)$", re.MULTILINE)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


def test_env_sample_lists_every_setting_and_no_other() -> None:
    listed = [name for name, _ in LINE.findall(SAMPLE.read_text())]
    settings = {name.upper() for name in Settings.model_fields}
    for_compose = set(INTERPOLATED.findall(COMPOSE.read_text())) - settings
    assert sorted(listed) == sorted(settings | for_compose)


def test_env_sample_is_made_from_the_settings_class() -> None:
    script = run_path(str(SAMPLE.parent / "scripts/env_sample.py"))
    assert SAMPLE.read_text() == script["render"](SAMPLE.read_text()), "run `make docs`"


def test_a_new_setting_would_be_written_with_its_description_and_default(monkeypatch: pytest.MonkeyPatch) -> None:
    script = run_path(str(SAMPLE.parent / "scripts/env_sample.py"))
    fields = {"log_level": Settings.model_fields["log_level"], "brave_new": FieldInfo(default=2.5, description="What it does.")}
    monkeypatch.setattr(Settings, "__pydantic_fields__", fields)
    assert script["render"]("").endswith("LOG_LEVEL=INFO\n# What it does.\nBRAVE_NEW=2.5\n")


def test_env_sample_shows_the_defaults_of_docker_compose_too() -> None:
    sample = dict(LINE.findall(SAMPLE.read_text()))
    for name, default in DEFAULTED.findall(COMPOSE.read_text()):
        assert sample[name] == default or (default == "/dev/null" and not sample[name]), name


def test_env_sample_shows_the_defaults() -> None:
    from_sample = Settings(_env_file=SAMPLE)
    assert from_sample == Settings()


def test_the_page_on_performance_names_the_defaults() -> None:
    (told,) = re.findall(r"The defaults \(([^)]*)\)", PERFORMANCE.read_text())
    named = dict(re.findall(r"`([A-Z_]+)=([^`]+)`", told))
    sample = dict(LINE.findall(SAMPLE.read_text()))
    assert named
    assert named == {name: sample[name] for name in named}


def test_no_secret_has_a_default() -> None:
    secrets = [
        name for name, field in Settings.model_fields.items() if SecretStr in (field.annotation, *get_args(field.annotation))
    ]
    assert {"api_key", "wasabi_secret_key", "sftp_password", "db_password", "validator_api_key"} <= set(secrets)
    assert all(Settings.model_fields[name].default is None for name in secrets)


def test_secrets_do_not_show_in_the_settings_text() -> None:
    settings = Settings(sftp_password=SecretStr("hunter2"), database_url=SecretStr("mysql+pymysql://u:hunter2@h/d"))
    assert "hunter2" not in f"{settings!r} {settings}"


def test_the_memory_limit_may_be_fractional() -> None:
    assert Settings(max_memory_usage_percent=0.5).max_memory_usage_percent == 0.5


def test_the_database_url_is_made_from_its_parts_with_the_password_escaped() -> None:
    settings = Settings(
        db_type="postgresql", db_host="db", db_name="studio", db_user="ann@x", db_password=SecretStr("p@ss/word")
    )
    assert settings.resolved_database_url() == "postgresql+psycopg://ann%40x:p%40ss%2Fword@db:5432/studio"


def test_an_unknown_time_zone_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="timezone"):
        Settings(timezone="Mars/Olympus")


@pytest.mark.parametrize("name", ["API_PORT", "REDIS_PORT", "DB_PORT", "SFTP_PORT", "FLOWER_PORT"])
@pytest.mark.parametrize("port", ["0", "-1", "65536"])
def test_a_port_that_is_none_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, port: str) -> None:
    assert _refusal(monkeypatch, **{name: port}).startswith(f"invalid settings: {name}: ")


@pytest.mark.parametrize("url", ["hunter2", "mysql+pymysql://u:hunter2@h:33o6/d", "://hunter2"])
def test_a_database_url_that_is_none_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    told = _refusal(monkeypatch, DATABASE_URL=url)
    assert told.startswith("invalid settings: DATABASE_URL: is no URL of a database; write it as mysql+pymysql://")
    assert "hunter2" not in told
    assert "33o6" not in told


def test_a_lease_that_would_run_out_before_it_is_renewed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "LEASE_RENEW_SECONDS: must be at most half of LEASE_SECONDS, 2" in _refusal(monkeypatch, LEASE_SECONDS="4")
    assert Settings(lease_seconds=4, lease_renew_seconds=2).lease_renew_seconds == 2


def _refusal(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """What is said of these settings."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    load_settings.cache_clear()
    with pytest.raises(SettingsInvalid) as refused:
        load_settings()
    return str(refused.value)
