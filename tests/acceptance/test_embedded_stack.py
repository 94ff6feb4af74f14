"""`ncr dev`: the whole system on real parts, as its user and its tests rely on it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh
import boto3
import httpx
import psutil
import pytest
import redis
from botocore.config import Config
from sqlalchemy import text

from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.entrypoints.embedded.product import make_product
from ncr_upload.entrypoints.embedded.samples import place_product
from ncr_upload.entrypoints.embedded.studio import missing_tables
from parts import require
from patience import until
from running_stack import NCR, RunningStack, follow, start_stack, stop_stack

PARTS = ("api", "worker", "beat", "redis", "s3", "sftp", "validator")
STACK_ENVIRONMENT = {"SFTP_USERNAME": "somebody", "LEASE_SECONDS": "8", "LEASE_RENEW_SECONDS": "2"}
STACK_ENV_FILE = (
    "DATABASE_URL=sqlite:////nowhere/x.db\nREDIS_PORT=1\nSFTP_HOST=partner.invalid\nBUCKET_NAME=production\nDB_TYPE=nonsense\n"
)
"""The `.env` of other systems, which is of no concern to the stack that starts beside it."""

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]


@pytest.fixture
def client(stack: RunningStack) -> Iterator[httpx.Client]:
    until(lambda: _healthy(stack))
    with stack.client() as opened:
        yield opened


def _healthy(stack: RunningStack) -> bool:
    try:
        with stack.client() as client:
            return bool(client.get("/health", params={"deep": "true"}).json()["status"] == "healthy")
    except (httpx.HTTPError, ValueError):
        return False


def deliver(stack: RunningStack, client: httpx.Client, job_id: str) -> dict[str, Any]:
    """Put a product in place, submit it, and hold what arrives against it."""
    product = make_product(f"artists/{job_id}", "SKU-9", seed=9)
    engine = open_engine(stack.endpoints["database"]["url"], pool_size=1)
    try:
        place_product(stack.endpoints["s3"], engine, job_id, product, campaign="tests")
    finally:
        engine.dispose()
    response = client.post("/process-job", json={"job_id": job_id, "username": "tester", "campaign": "tests"})
    assert response.status_code == 202, response.text
    status = follow(client, response.json()["task_id"])
    if status["status"] == "completed":
        root = Path(stack.endpoints["sftp"]["root"], job_id)
        arrived = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        assert arrived == product.delivered
    return status


def test_the_endpoints_file_says_exactly_what_was_promised(stack: RunningStack) -> None:
    endpoints = stack.endpoints
    shape = {name: set(value) for name, value in endpoints.items() if isinstance(value, dict)}
    assert shape == {
        "api": {"url", "key"},
        "database": {"url"},
        "redis": {"url"},
        "s3": {"endpoint", "access_key", "secret_key", "bucket"},
        "sftp": {"host", "port", "username", "password", "host_key", "root"},
        "validator": {"url", "key"},
        "pids": set(PARTS),
    }
    assert stack.endpoints_file.stat().st_mode & 0o777 == 0o600
    assert all(psutil.pid_exists(pid) for pid in endpoints["pids"].values())
    assert Path(endpoints["sftp"]["root"]).is_absolute()


def test_every_part_answers_to_the_logins_in_the_file_and_to_no_others(stack: RunningStack) -> None:
    endpoints = stack.endpoints
    with redis.Redis.from_url(endpoints["redis"]["url"]) as board:
        assert board.ping()
        settings = board.config_get()
        assert (settings["appendonly"], settings["maxmemory-policy"]) == ("yes", "noeviction")
    with (
        pytest.raises(redis.AuthenticationError),
        redis.Redis(port=int(endpoints["redis"]["url"].split(":")[-1][:-2])) as board,
    ):
        board.ping()

    s3 = endpoints["s3"]
    for secret, allowed in ((s3["secret_key"], True), ("wrong", False)):
        bucket = boto3.client(
            "s3",
            endpoint_url=s3["endpoint"],
            aws_access_key_id=s3["access_key"],
            aws_secret_access_key=secret,
            region_name="us-east-1",
            config=Config(retries={"max_attempts": 1}),
        )
        if allowed:
            assert bucket.list_objects_v2(Bucket=s3["bucket"], Prefix="artists/your-job-id/")["KeyCount"] > 20
        else:
            with pytest.raises(bucket.exceptions.ClientError):
                bucket.list_objects_v2(Bucket=s3["bucket"])

    for key, status in ((endpoints["validator"]["key"], 415), ("wrong", 401)):
        answer = httpx.post(f"{endpoints['validator']['url']}/SKU", headers={"X-API-Key": key}, trust_env=False)
        assert answer.status_code == status, answer.text


async def _log_in(endpoints: Any) -> list[str]:
    sftp = endpoints["sftp"]
    pinned = asyncssh.import_known_hosts(f"[{sftp['host']}]:{sftp['port']} {sftp['host_key']}")
    login = {"username": sftp["username"], "password": sftp["password"], "known_hosts": pinned, "client_keys": None}
    async with (
        asyncssh.connect(sftp["host"], sftp["port"], config=None, **login) as connection,
        connection.start_sftp_client() as files,
    ):
        async with files.open("/seen-from-outside", "w") as file:
            await file.write("x")
        return [str(name) for name in await files.listdir("/")]


def test_what_the_sftp_login_writes_appears_in_the_root_folder(stack: RunningStack) -> None:
    import asyncio

    assert "seen-from-outside" in asyncio.run(_log_in(stack.endpoints))
    assert Path(stack.endpoints["sftp"]["root"], "seen-from-outside").read_text() == "x"


def test_the_studios_tables_are_there_and_the_users_own_settings_reached_only_where_they_may(stack: RunningStack) -> None:
    engine = open_engine(stack.endpoints["database"]["url"], pool_size=1)
    assert missing_tables(engine) == set()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT id FROM job_details WHERE job_id = 'your-job-id'")).scalar() == 123
    engine.dispose()
    worker = psutil.Process(stack.endpoints["pids"]["worker"]).environ()
    assert worker["LEASE_SECONDS"] == "8"
    assert worker["SFTP_USERNAME"] == stack.endpoints["sftp"]["username"]


def test_the_seed_readmes_single_job_is_delivered_and_a_second_time_refused_with_its_reason(
    stack: RunningStack, client: httpx.Client
) -> None:
    body = '{"job_id": "your-job-id", "username": "your-username", "campaign": "your-campaign", "row_id": 123}'
    headers = {"Content-Type": "application/json"}
    accepted = client.post("/process-job", content=body, headers=headers)
    assert accepted.status_code == 202
    status = follow(client, accepted.json()["task_id"])
    assert (status["status"], status["username"], status["row_id"]) == ("completed", "your-username", 123)
    assert Path(stack.endpoints["sftp"]["root"], "your-job-id", status["sku"], f"{status['sku']}.glb").exists()

    again = client.post("/process-job", content=body, headers=headers)
    assert again.status_code == 202
    refused = follow(client, again.json()["task_id"])
    assert refused["status"] == "failed"
    assert "await" in refused["message"]


def test_the_seed_readmes_batch_is_delivered_whole(stack: RunningStack, client: httpx.Client) -> None:
    body = """[
       {"job_id": "job-1", "username": "user1", "campaign": "campaign1"},
       {"job_id": "job-2", "username": "user2", "campaign": "campaign2"}
    ]"""
    accepted = client.post("/process-batch", content=body, headers={"Content-Type": "application/json"}).json()
    assert accepted["total_jobs"] == 2
    for job in accepted["jobs"]:
        assert follow(client, job["task_id"])["status"] == "completed"
    batch = client.get(f"/batch-status/{accepted['batch_id']}").json()
    assert (batch["status"], batch["counts"]["completed"], batch["percentage"]) == ("completed", 2, 100)
    assert {"job-1", "job-2"} <= {path.name for path in Path(stack.endpoints["sftp"]["root"]).iterdir()}


@pytest.mark.parametrize("path", ["/", "/health", "/memory-stats", "/celery-stats", "/jobs/active", "/docs", "/redoc"])
def test_the_seed_readmes_other_addresses_answer(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 200


@pytest.mark.parametrize("name", PARTS)
def test_a_killed_part_is_started_again_with_its_new_pid_in_the_file_and_the_work_goes_on(
    stack: RunningStack, name: str
) -> None:
    until(lambda: _healthy(stack))
    before = stack.endpoints
    os.kill(before["pids"][name], signal.SIGKILL)
    until(lambda: stack.endpoints["pids"][name] != before["pids"][name])
    until(lambda: _healthy(stack))
    after = stack.endpoints
    assert {part: pid for part, pid in after["pids"].items() if part != name} == {
        part: pid for part, pid in before["pids"].items() if part != name
    }
    assert {part: value for part, value in after.items() if part != "pids"} == {
        part: value for part, value in before.items() if part != "pids"
    }
    with stack.client() as client:
        assert deliver(stack, client, f"after-{name}-died")["status"] == "completed"


def test_no_secret_is_in_what_the_stack_prints_or_logs(stack: RunningStack) -> None:
    secrets = set((stack.state_dir / "secrets.json").read_text().split('"')[3::4])
    assert len(secrets) == 6
    for path in [stack.output, *stack.state_dir.glob("logs/*")]:
        said = path.read_text(errors="replace")
        assert not [secret for secret in secrets if secret in said], path


def test_no_secret_is_in_any_command_line(stack: RunningStack) -> None:
    secrets = set((stack.state_dir / "secrets.json").read_text().split('"')[3::4])
    for member in psutil.Process(stack.process.pid).children(recursive=True):
        assert not [secret for secret in secrets if secret in " ".join(member.cmdline())], member


def test_everything_listens_on_loopback_only(stack: RunningStack) -> None:
    listening = [
        connection.laddr.ip
        for member in psutil.Process(stack.process.pid).children(recursive=True)
        for connection in member.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert set(listening) == {"127.0.0.1"}
    assert len(listening) >= 5


def test_a_second_stack_on_the_same_state_folder_is_refused(stack: RunningStack, tmp_path: Path) -> None:
    command = [*NCR, "dev", "--state-dir", str(stack.state_dir), "--port", "0", "--endpoints", str(tmp_path / "e.json")]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 1
    assert "already running" in second.stderr
    assert not (tmp_path / "e.json").exists()
    assert stack.endpoints["pids"]


def test_a_taken_port_is_refused_naming_it(stack: RunningStack, tmp_path: Path) -> None:
    port = stack.endpoints["api"]["url"].rsplit(":", 1)[1]
    command = [*NCR, "dev", "--state-dir", str(tmp_path / "state"), "--port", port]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 1
    assert f"port {port}" in second.stderr


def test_a_part_that_cannot_start_is_named_and_nothing_is_left_running(tmp_path: Path) -> None:
    require("rclone")
    command = [*NCR, "dev", "--state-dir", str(tmp_path / "state"), "--port", "0", "--endpoints", str(tmp_path / "e.json")]
    environment = dict(os.environ) | {"LEASE_SECONDS": "never"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "did not start: exited with status" in done.stderr
    assert "LEASE_SECONDS" in done.stderr, "the end of the part's log is shown"
    assert not (tmp_path / "e.json").exists()
    running = [
        process for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(process.info["cmdline"] or [])
    ]
    assert running == []


def test_the_demo_uses_a_stack_that_already_runs(stack: RunningStack) -> None:
    import json

    until(lambda: _healthy(stack))
    command = [*NCR, "demo", "--state-dir", str(stack.state_dir), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert (result["ok"], result["failures"]) == (True, [])
    assert stack.process.poll() is None


def test_sigterm_ends_everything_and_the_next_start_finds_its_data_and_arms_the_samples_again(tmp_path: Path) -> None:
    require("rclone")
    first = start_stack(tmp_path)
    with first.client() as client:
        accepted = client.post("/process-job", json={"job_id": "job-1", "username": "user1", "campaign": "campaign1"}).json()
        assert follow(client, accepted["task_id"])["status"] == "completed"
    before = first.endpoints
    first.note_family()
    assert stop_stack(first) == 0
    until(lambda: not first.survivors())
    assert not first.endpoints_file.exists()

    second = start_stack(tmp_path)
    try:
        with second.client() as client:
            assert client.get(f"/job-status/{accepted['task_id']}").json()["status"] == "completed"
            again = client.post("/process-job", json={"job_id": "job-1", "username": "user1", "campaign": "campaign1"}).json()
            assert follow(client, again["task_id"])["status"] == "completed"
        after = second.endpoints
        assert (after["api"]["key"], after["sftp"]["host_key"]) == (before["api"]["key"], before["sftp"]["host_key"])
        second.note_family()
        second.process.kill()
        second.process.wait()
        until(lambda: not second.survivors())
    finally:
        second.process.kill()
