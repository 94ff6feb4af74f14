"""`ncr doctor` on real parts: what is right is said, what is wrong is named with the next step, and nobody waits for long."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from ncr_upload.entrypoints.bootstrap.doctor import make_checks
from ncr_upload.entrypoints.doctor import Finding, State, examine, is_well, render
from ncr_upload.entrypoints.settings import Settings
from patience import allowed
from servers import free_port
from valkey_server import ValkeyServer
from workplace import Workplace

SECRETS = ("hunter2", "test-secret-key")
NCR = (sys.executable, "-m", "ncr_upload.entrypoints.cli")


@pytest.fixture
def site(workplace: Workplace, valkey: ValkeyServer) -> Workplace:
    """Everything in place."""
    workplace.change(redis_host="127.0.0.1", redis_port=valkey.port)
    return workplace


def ask(settings: Settings, part: str | None = None, seconds: float = 30) -> list[Finding]:
    checks = make_checks(settings)
    return examine({part: checks[part]} if part else checks, seconds)


def wrong(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.part: finding for finding in findings if finding.state is State.WRONG}


def test_with_everything_in_place_every_part_is_right(site: Workplace) -> None:
    findings = ask(site.settings)
    assert is_well(findings), render(findings)
    right = {finding.part for finding in findings if finding.state is State.RIGHT}
    assert right == {"settings", "database", "clock", "redis", "s3", "validator", "sftp", "work_dir"}
    assert not any((site.sftp.folder / ".ncr-staging").iterdir())
    assert not any(site.settings.work_dir.iterdir())


def test_a_redis_that_forgets_is_a_doubt_and_one_that_evicts_is_wrong(site: Workplace, valkey: ValkeyServer) -> None:
    from redis import Redis

    (doubt,) = [finding for finding in ask(site.settings, "redis") if finding.state is State.DOUBTFUL]
    assert "AOF" in doubt.told
    with Redis.from_url(valkey.url) as client:
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            found = wrong(ask(site.settings, "redis"))["redis"]
        finally:
            client.config_set("maxmemory-policy", "noeviction")
    assert (found.code, "noeviction" in str(found.next_step)) == ("redis_evicts", True)


def drop(statement: str) -> Callable[[Workplace], None]:
    def act(site: Workplace) -> None:
        with site.engine.begin() as connection:
            connection.execute(text(statement))

    return act


def change(**settings: object) -> Callable[[Workplace], None]:
    return lambda site: site.change(**settings)


def file_as_work_dir(site: Workplace) -> None:
    site.settings.work_dir.write_text("a file")


@pytest.mark.parametrize(
    ("make", "part", "code", "named"),
    [
        (change(redis_port=1), "redis", "redis_unavailable", "127.0.0.1:1"),
        (change(wasabi_secret_key=SecretStr("hunter2")), "s3", "storage_login_refused", "WASABI_SECRET_KEY"),
        (change(bucket_name="nowhere"), "s3", "bucket_missing", "nowhere"),
        (change(validator_api_key=SecretStr("hunter2")), "validator", "validator_key_refused", "VALIDATOR_API_KEY"),
        (change(validator_api_url="http://127.0.0.1:1/validate"), "validator", "validator_unreachable", "VALIDATOR_API_URL"),
        (change(sftp_password=SecretStr("hunter2")), "sftp", "login_refused", "SFTP_PASSWORD"),
        (change(sftp_host_key=None), "sftp", "host_key_unpinned", "SFTP_HOST_KEY"),
        (change(database_url=SecretStr("sqlite:////proc/no/ncr.db")), "database", "database_unavailable", "/proc/no"),
        (drop("DROP TABLE history_log"), "database", "database_schema", "history_log"),
        (drop("ALTER TABLE job_details DROP COLUMN is_reviewed"), "database", "database_schema", "job_details.is_reviewed"),
        (drop("ALTER TABLE ncr_jobs DROP COLUMN verdict"), "database", "database_schema", "ncr_jobs.verdict"),
        (drop("DROP TABLE ncr_alembic_version"), "database", "database_schema", "ncr db upgrade"),
        (file_as_work_dir, "work_dir", "work_dir_unwritable", "WORK_DIR"),
        (change(bucket_name=None), "settings", "settings_missing", "BUCKET_NAME"),
    ],
)
def test_what_is_wrong_is_named_with_the_next_step(
    site: Workplace, make: Callable[[Workplace], None], part: str, code: str, named: str
) -> None:
    make(site)
    found = wrong(ask(site.settings, part))[part]
    assert (found.code, named in f"{found.told} {found.next_step}") == (code, True), found
    assert not any(secret in str(found) for secret in SECRETS)


def test_a_base_folder_that_cannot_be_written_is_wrong(site: Workplace) -> None:
    site.change(sftp_base_dir="/blocked")
    (site.sftp.folder / "blocked").write_text("a file where the folder should be")
    assert not is_well(ask(site.settings, "sftp"))


def test_a_part_that_never_answers_keeps_nobody_waiting_for_long(site: Workplace) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        site.change(sftp_host="127.0.0.1", sftp_port=silent.getsockname()[1], redis_host="127.0.0.1")
        site.change(validator_api_url=f"http://127.0.0.1:{silent.getsockname()[1]}/validate")
        began = time.monotonic()
        found = wrong(examine({part: make_checks(site.settings)[part] for part in ("sftp", "validator")}, 3))
    assert set(found) == {"sftp", "validator"}
    assert time.monotonic() - began < allowed(15)


def environment_of(settings: Settings) -> dict[str, str]:
    values = {name.upper(): getattr(settings, name) for name in Settings.model_fields if name in settings.model_fields_set}
    plain = {name: value.get_secret_value() if isinstance(value, SecretStr) else str(value) for name, value in values.items()}
    return dict(os.environ) | plain


def test_the_command_says_it_in_words_and_in_json_and_by_its_exit_status(site: Workplace, tmp_path: Path) -> None:
    def run(*options: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = environment_of(site.settings) | more
        return subprocess.run([*NCR, "doctor", *options], env=environment, cwd=tmp_path, capture_output=True, text=True)

    well = run()
    assert (well.returncode, "everything that was tried works" in well.stdout) == (0, True), well.stdout + well.stderr
    ill = run("--json", REDIS_PORT=str(free_port()), SFTP_PASSWORD="hunter2")
    told = json.loads(ill.stdout)
    assert (ill.returncode, told["ok"]) == (1, False)
    assert {finding["part"] for finding in told["findings"] if finding["state"] == "wrong"} == {"redis", "sftp"}
    invalid = run("--json", API_PORT="many")
    assert (invalid.returncode, json.loads(invalid.stdout)["findings"][0]["code"]) == (1, "settings_invalid")
    assert not any(secret in each.stdout + each.stderr for each in (well, ill, invalid) for secret in SECRETS)
