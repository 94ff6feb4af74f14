"""Parts that send our secrets back, and megabytes: neither is in an answer, a table, Redis or any program's log."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from redis import Redis
from sqlalchemy import MetaData, select

from databases import Databases
from fault_table import fault
from installation import Installation, Judge, Outside, install, start_outside
from running_stack import ENDED, until
from servers import Answer, Gateway, HttpServer, Request, start_gateway, start_http
from valkey_server import ValkeyServer, start_valkey

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

KEY = 'k9Zq+7/of "ours"&0001'
SECRETS = {
    "API_KEY": "caller-key/0002 & more",
    "FLOWER_BASIC_AUTH": "ann:flower-pass/0003",
    "SFTP_PRIVATE_KEY_PASSPHRASE": "pass-phrase+0004%",
}
SMALL_BYTES = 32_768


def forms_of(secret: str) -> list[str]:
    encoded = [
        base64.b64encode(f"{before}{secret}{after}".encode()).decode()
        for before in ("", "u", "me:")
        for after in ("", ", and more")
    ]
    url = [quote(secret), quote(secret, safe=""), quote_plus(secret)]
    return [secret, *url, json.dumps(secret)[1:-1], *encoded, *(each.rstrip("=") for each in encoded)]


class Parrot(HttpServer):
    """A validator that says all it was ever told, in every form and place, and a megabyte more."""

    plan: tuple[int, str] = (200, "Invalid")
    secrets: tuple[str, ...] = ()

    def answer_to(self, request: Request) -> Answer:
        said = [form for secret in self.secrets for form in forms_of(secret)] + [json.dumps(request.headers)]
        status, result = self.plan
        words = " ".join(said)
        issues = [{"severity": "error", "code": each[:60], "file": each, "message": each} for each in said]
        issues += [{"message": "x" * (390 + number) + words} for number in range(20)]
        answer = {
            "data": [{"result": result, "issues": issues, **{each: each for each in said}}],
            "detail": words + "😀" * 300_000,
        }
        return Answer(status, json.dumps(answer).encode(), {"X-Echo": quote(words[:4000]), "Retry-After": "9" * 400})


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    with start_outside(tmp_path_factory.mktemp("outside")) as started:
        yield started


@pytest.fixture(scope="module")
def parrot() -> Iterator[Parrot]:
    with start_http(Answer()) as server:
        server.__class__ = Parrot
        assert isinstance(server, Parrot)
        yield server


@pytest.fixture(scope="module")
def storage(outside: Outside) -> Iterator[Gateway]:
    with start_gateway(outside.s3.endpoint) as gateway:
        yield gateway


@pytest.fixture(scope="module", params=["sqlite", "mariadb"])
def site(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    outside: Outside,
    parrot: Parrot,
    storage: Gateway,
) -> Iterator[tuple[Installation, ValkeyServer]]:
    folder, databases = tmp_path_factory.mktemp("site"), Databases()
    settings = {
        **SECRETS,
        "VALIDATOR_API_KEY": KEY,
        "VALIDATOR_API_URL": parrot.url,
        "WASABI_ENDPOINT": storage.url,
        "MAX_ATTEMPTS": "2",
        "LOG_LEVEL": "DEBUG",
        "DOWNLOAD_CACHE_BYTES": "0",
        "LEASE_SECONDS": "20",
    }
    judge = replace(outside, judge=Judge(parrot.url, outside.judge.open))
    parrot.secrets = (KEY, *(each.partition(":")[2] or each for each in SECRETS.values()), outside.s3.secret_key)
    try:
        with (
            start_valkey(folder, append_only=True) as valkey,
            install(folder, judge, databases.create(request.param, folder), valkey.port, settings) as made,
            made.run("api"),
            made.run("beat"),
            made.run("worker"),
        ):
            yield made, valkey
    finally:
        databases.close()


def follow(site: Installation, job_id: str) -> str:
    """The job's task, once it has ended."""
    task_id = site.submit(job_id)
    until(lambda: site.ask("GET", f"/job-status/{task_id}").json()["status"] in ENDED, 120)
    return task_id


def shown(site: Installation, valkey: ValkeyServer, task_id: str) -> dict[str, str]:
    """All that anybody can read of it, by place."""
    places = {}
    for path in (f"/job-status/{task_id}", f"/jobs/{task_id}/history", "/jobs/active", "/celery-stats", "/health?deep=true"):
        places[path] = site.ask("GET", path).text
    tables = MetaData()
    tables.reflect(site.engine)
    with site.engine.connect() as connection:
        for table in tables.sorted_tables:
            places[table.name] = "\n".join(str(tuple(row)) for row in connection.execute(select(table)))
    with Redis.from_url(valkey.url, decode_responses=True) as client:
        for key in client.scan_iter():
            kind = client.type(key)
            value = client.hgetall(key) if kind == "hash" else client.lrange(key, 0, -1) if kind == "list" else client.type(key)
            places[f"redis {key}"] = json.dumps(value) + str(value)
    for log in Path(site.folder).glob("*.log"):
        places[log.name] = log.read_text(errors="replace")
    return places


def assert_nothing_shown(places: dict[str, str], secrets: tuple[str, ...]) -> None:
    for place, told in places.items():
        for secret in secrets:
            for form in forms_of(secret):
                assert form not in told, (place, form, told[max(0, told.find(form) - 300) :][:600])
            for end in (secret[:8], base64.b64encode(secret.encode()).decode()[:10]):
                assert end not in told, (place, end, told[max(0, told.find(end) - 300) :][:600])
        if place.endswith(".log"):
            assert max(map(len, told.splitlines()), default=0) < 4 * SMALL_BYTES, place
        if place.startswith(("redis ", "/job")):
            assert len(told) < 8 * SMALL_BYTES, place


@fault(
    "Validator: sends our secrets back, in every form, and megabytes",
    injector="HTTP server",
    invariants="LSHB",
    outcome="the job ends by the verdict; no secret in any answer, table, Redis value or log",
)
@pytest.mark.parametrize(
    ("plan", "code"),
    [((200, "Invalid"), "validation_failed"), ((422, "no"), "validation_failed"), ((503, "?"), "validator_undecided")],
)
def test_a_validator_that_knows_our_secrets_tells_them_to_nobody(
    site: tuple[Installation, ValkeyServer], parrot: Parrot, plan: tuple[int, str], code: str
) -> None:
    installation, valkey = site
    parrot.plan = plan
    task_id = follow(installation, f"told-{plan[0]}")
    row = installation.row(task_id)
    assert row["problem_code"] == code, row
    if plan[0] != 503:
        assert "***" in row["message"]
    assert_nothing_shown(shown(installation, valkey, task_id), parrot.secrets)


@fault(
    "S3: an error of 3 MB with our secrets in it",
    injector="HTTP gateway",
    invariants="LSHB",
    outcome="fails as storage_unavailable; no secret and no megabyte in any answer, table, Redis value or log",
)
def test_a_storage_that_knows_our_secrets_tells_them_to_nobody(
    site: tuple[Installation, ValkeyServer], parrot: Parrot, storage: Gateway
) -> None:
    installation, valkey = site
    told = " ".join(form for secret in parrot.secrets for form in forms_of(secret))
    body = f"<Error><Code>{'A' * 3_145_728}</Code><Message>{told}{'😀' * 300_000}</Message></Error>".encode()
    real = storage.spoil
    storage.spoil = lambda request, forward: Answer(400, body) if request.method == "GET" else forward()
    try:
        task_id = follow(installation, "stored")
        row = installation.row(task_id)
        assert row["problem_code"] in ("storage_unavailable", "storage_denied"), row
        assert_nothing_shown(shown(installation, valkey, task_id), parrot.secrets)
    finally:
        storage.spoil = real
