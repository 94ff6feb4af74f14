"""What outside parts say, of any size and with our own secrets in it: jobs end as they ended, and what is kept is small."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import MetaData, select

from databases import SERVERS, Databases
from fault_table import fault
from ncr_upload.application.views import view_of
from ncr_upload.domain.jobs import Status, Task
from ncr_upload.entrypoints.embedded.product import Product
from ncr_upload.entrypoints.secrets import list_secrets
from ncr_upload.entrypoints.settings import Settings, SettingsInvalid, load_settings
from servers import Answer, start_gateway, start_http
from studio_rows import open_database
from workplace import Workplace

SMALL_BYTES = 32_768


@pytest.fixture(scope="module")
def databases() -> Iterator[Databases]:
    running = Databases()
    yield running
    running.close()


@pytest.fixture(params=["sqlite", *SERVERS])
def site(request: pytest.FixtureRequest, workplace: Workplace, databases: Databases, tmp_path: Path) -> Workplace:
    folder = tmp_path / "other"
    folder.mkdir()
    url = databases.create(request.param, folder)
    workplace.engine.dispose()
    workplace.engine = open_database(url)
    workplace.change(database_url=SecretStr(url))
    return workplace


def assert_small(site: Workplace, task: Task) -> None:
    view = json.dumps(view_of(task), ensure_ascii=False).encode()
    assert len(view) < SMALL_BYTES
    assert all(len(line.encode()) < SMALL_BYTES for line in site.history(task))


@fault(
    "S3: an error with a code of 3 MB",
    injector="HTTP gateway",
    invariants="LHB",
    outcome="its attempts are spent and it fails as storage_unavailable, in a few words",
)
def test_a_storage_that_says_megabytes_does_not_hide_how_the_job_ended(site: Workplace, job_id: str, small: Product) -> None:
    site.place(job_id, small)
    body = b"<Error><Code>" + b"A" * 3_145_728 + b"</Code><Message>" + "😀".encode() * 500_000 + b"</Message></Error>"
    site.change(max_attempts=1)
    with start_gateway(site.s3.endpoint) as gateway:
        gateway.spoil = lambda _request, _forward: Answer(400, body)
        site.change(wasabi_endpoint=gateway.url)
        task = site.deliver(job_id)
    assert (task.status, task.problem and task.problem.code, task.problem and task.problem.error_class) == (
        *(Status.FAILED, "storage_unavailable", "transient"),
    )
    assert "it answered 400" in task.message
    assert "given up" in task.message
    assert_small(site, task)


@fault(
    "Validator: 60 reasons of 400 emoji",
    injector="HTTP server",
    invariants="LHB",
    outcome="validation_failed with the first reasons, and how many more there are",
)
def test_a_verdict_of_many_emoji_is_the_jobs_end(site: Workplace, job_id: str, small: Product) -> None:
    site.place(job_id, small)
    issues = [{"severity": "error", "message": "😀" * 400} for _ in range(60)]
    with start_http(Answer(200, json.dumps({"data": [{"result": "Invalid", "issues": issues}]}).encode())) as validator:
        site.change(validator_api_url=validator.url)
        task = site.deliver(job_id)
    assert (task.status, task.problem and task.problem.code, task.problem and task.problem.error_class) == (
        *(Status.VALIDATION_FAILED, "validation_failed", "rejected"),
    )
    assert " more" in task.message
    assert_small(site, task)
    assert [row["is_uploaded"] for row in site.studio_rows("job_details")] == [0]


@pytest.mark.parametrize(
    "body",
    [
        b'{"data": [' + b'{"result": "Valid"},' * 300_000 + b'{"result": "Valid"}]}',
        b'{"data": [{"result": "Valid", "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}]}",
        b'{"data": [{"result": "Valid", "x": ' + b"1" * 5_000 + b"}]}",
    ],
    ids=["hundreds of thousands of results", "deep", "a number of 5,000 digits"],
)
def test_an_answer_that_nobody_can_mean_is_no_verdict(workplace: Workplace, job_id: str, small: Product, body: bytes) -> None:
    workplace.place(job_id, small)
    workplace.change(max_attempts=1)
    with start_http(Answer(200, body)) as validator:
        workplace.change(validator_api_url=validator.url)
        task = workplace.deliver(job_id)
    assert (task.status, task.problem and task.problem.code) == (Status.FAILED, "validator_undecided"), task.message


@pytest.mark.parametrize("body", [b"[" * 50_000 + b"]" * 50_000, b'{"detail": ' + b"1" * 5_000 + b"}", b"\xff\0" * 500_000])
def test_a_refusal_in_any_form_is_a_no(workplace: Workplace, job_id: str, small: Product, body: bytes) -> None:
    workplace.place(job_id, small)
    with start_http(Answer(422, body)) as validator:
        workplace.change(validator_api_url=validator.url)
        task = workplace.deliver(job_id)
    assert (task.status, task.problem and task.problem.code) == (Status.VALIDATION_FAILED, "validation_failed"), task.message
    assert_small(workplace, task)


def test_keys_and_paths_stay_exact_also_where_they_are_a_secret(workplace: Workplace, job_id: str, small: Product) -> None:
    workplace.change(api_key=SecretStr(job_id), flower_basic_auth=SecretStr(f"ann:{small.sku}-and-more"))
    workplace.place(job_id, small)
    task = workplace.deliver(job_id)
    assert (task.status, task.job_id) == (Status.COMPLETED, job_id)
    assert workplace.delivered(job_id) == small.delivered
    found = MetaData()
    found.reflect(workplace.engine)
    with workplace.engine.connect() as connection:
        keys = {row.object_key for row in connection.execute(select(found.tables["ncr_files"]))}
    assert keys == set(small.files)
    assert job_id not in task.message


@pytest.mark.parametrize(
    "password", ["p@ss-with-a-tail", "p@s/s-with-a-tail", "a#b@c-with-a-tail", "a?b@c-with-a-tail", "a/b@c-with-a-tail"]
)
def test_a_database_url_with_an_at_sign_in_its_password_is_refused_without_any_end_of_it(
    monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"mysql+pymysql://u:{password}@host/db")
    load_settings.cache_clear()
    with pytest.raises(SettingsInvalid) as refused:
        load_settings()
    load_settings.cache_clear()
    assert "DATABASE_URL" in str(refused.value)
    assert "%40 for an @" in str(refused.value)
    assert "tail" not in str(refused.value)


def test_every_secret_of_the_settings_is_known(tmp_path: Path) -> None:
    names = [name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)]
    planted = {name: SecretStr(f"planted-{name}") for name in names} | {
        "database_url": SecretStr("postgresql+psycopg://u:planted%2Fdatabase@h/d?sslpassword=planted-key"),
        "flower_basic_auth": SecretStr("ann:planted-flower"),
    }
    urls = {"validator_api_url": "http://u:planted-url@host/x", "wasabi_endpoint": "http://u:planted-s3@host"}
    known = list_secrets(Settings(_env_file=None, **planted, **urls))  # type: ignore[arg-type]
    expected = {f"planted-{name}" for name in names} - {"planted-database_url", "planted-flower_basic_auth"}
    expected |= {"planted/database", "planted%2Fdatabase", "planted-key", "planted-flower", "planted-url", "planted-s3"}
    assert expected <= known
