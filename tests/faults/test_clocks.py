"""A worker or an API whose clock is two hours off: only the database's clock counts (libfaketime)."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from databases import create_database, started
from fault_table import fault
from installation import Installation, install, start_outside
from parts import require
from patience import until
from valkey_server import start_valkey

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

LEASES = {"LEASE_SECONDS": "8", "LEASE_RENEW_SECONDS": "1", "CELERY_WORKER_CONCURRENCY": "1"}
HOURS = [pytest.param(2, id="ahead"), pytest.param(-2, id="behind")]


UNDISTURBED_SLEEP = "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds) and None\n"
"""sitecustomize.py of a skewed program: libfaketime spoils the absolute clock_nanosleep that Python's sleep makes."""


def skew(hours: int, folder: Path) -> dict[str, str]:
    """What makes a program's wall clock wrong. Its steady clock, by which it waits, stays."""
    (folder / "sitecustomize.py").write_text(UNDISTURBED_SLEEP)
    program = Path(require("faketime"))
    (library,) = program.parent.parent.glob("lib/*/faketime/libfaketimeMT.so.1")
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME": f"{hours:+d}h",
        "DONT_FAKE_MONOTONIC": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])),
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("site")
    with (
        start_outside(folder / "outside") as outside,
        start_valkey(folder) as valkey,
        started("postgresql") as server,  # SQLite has no clock but that of the one machine which all its programs share
        install(folder, outside, create_database(server), valkey.port, LEASES) as installed,
        installed.run("beat"),
    ):
        yield installed


@pytest.fixture(scope="module")
def lenient(site: Installation) -> Iterator[str]:
    """The address of a storage that has the product's objects and looks at no signature, nor at its time."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            key = unquote(self.path.partition("?")[0]).removeprefix(f"/{site.outside.s3.bucket}/")
            content = site.outside.product.files.get(key, b"")
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
            self.send_header("Last-Modified", "Sun, 01 Nov 2026 10:00:00 GMT")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("hours", HOURS)
def test_the_programs_of_these_tests_really_see_the_wrong_time(hours: int, tmp_path: Path) -> None:
    program = "import time; began = time.monotonic(); time.sleep(0.2); print(time.time(), time.monotonic() - began)"
    ran = subprocess.run([sys.executable, "-c", program], env=skew(hours, tmp_path), capture_output=True, text=True, check=True)
    seen, slept = map(float, ran.stdout.split())
    assert abs(seen - time.time() - hours * 3600) < 300
    assert 0.2 <= slept < 60


@pytest.mark.parametrize("hours", HOURS)
@fault(
    "Clock: worker and API two hours off",
    injector="libfaketime",
    invariants="LOSA",
    outcome="leases, retries and sweeps go by the database's clock: no live job is run again, no dead one is forgotten",
)
def test_a_clock_two_hours_off_changes_nothing(site: Installation, lenient: str, hours: int, tmp_path: Path) -> None:
    job_id = f"skewed-{hours}"
    storage, wrong = {"WASABI_ENDPOINT": lenient}, skew(hours, tmp_path)
    with (
        site.run("api", **wrong),
        site.run("worker", **storage),
        site.run("worker", **storage, **wrong) as skewed,
    ):
        site.outside.judge.hold()
        # A live job, on either worker, is left alone for as long as its lease is renewed: twice its length.
        task_ids = {f"{job_id}-{number}": site.submit(f"{job_id}-{number}") for number in range(2)}
        until(lambda: site.outside.judge.waiting == 2, 90)
        time.sleep(2 * float(site.settings["LEASE_SECONDS"]))
        assert {site.row(task_id)["attempt"] for task_id in task_ids.values()} == {1}
        ours = {task_id for task_id in task_ids.values() if pid_of(site, task_id) in {c.pid for c in skewed.children()}}
        assert ours, "the skewed worker has no job"
        # A dead one is taken over as soon as ever.
        skewed.kill()
        until(lambda: all(site.row(task_id)["attempt"] == 1 for task_id in task_ids.values() if task_id not in ours))
        site.outside.judge.open.set()
        for each, task_id in task_ids.items():
            site.assert_delivered_once(each, task_id)
        assert {site.row(task_id)["attempt"] for task_id in ours} == {2}
        assert {site.row(task_id)["attempt"] for task_id in task_ids.values() if task_id not in ours} <= {1}
        # All that is written is the database's time, whoever wrote it.
        latest = site.count("SELECT MAX(at) FROM ncr_events")
        assert abs(latest - time.time()) < 300


@fault(
    "Clock: storage refuses a skewed worker's signatures",
    injector="libfaketime; RequestTimeTooSkewed",
    invariants="LH",
    outcome="the history names the worker's clock; no attempt is spent, another worker delivers",
)
def test_a_worker_whose_signatures_are_refused_for_its_clock_says_so_and_spends_no_attempt(
    site: Installation, tmp_path: Path
) -> None:
    job_id = "refused-for-its-clock"
    with site.run("api"), site.run("worker") as right:
        with right.asleep(), site.run("worker", **skew(2, tmp_path)):
            task_id = site.submit(job_id)
            until(lambda: any("put_back" in line for line in site.history(task_id)), 90)
        site.assert_delivered_once(job_id, task_id)
    said = [line for line in site.history(task_id) if "put_back" in line]
    assert all("the clock of worker host" in line and "not counted" in line for line in said)
    assert site.row(task_id)["attempt"] == 1


def pid_of(site: Installation, task_id: str) -> int:
    return int(site.row(task_id)["worker"].rpartition(":")[2])
