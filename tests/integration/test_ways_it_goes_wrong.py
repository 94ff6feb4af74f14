"""What has gone wrong in other systems of this shape, tried on whole jobs with real parts (see docs/reliability.md)."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
from pydantic import SecretStr

from fault_table import fault
from ledger_twin import MemoryHost, MemoryJobQueue, MemoryStatusBoard
from ncr_upload.adapters.sql.recovery import SqlRecovery
from ncr_upload.adapters.sql.submissions import SqlSubmissions
from ncr_upload.adapters.sql.workers import SqlWorkerReports
from ncr_upload.application.doorbell import Doorbell
from ncr_upload.application.recovery import ReleaseLimits
from ncr_upload.application.submissions import Accepted, SubmitLimits, SubmitPorts, submit_batch
from ncr_upload.domain.admission import AdmissionLimits
from ncr_upload.domain.jobs import NewJob, Status, Task
from ncr_upload.entrypoints.embedded.product import Product, break_model, make_product
from servers import free_port
from workplace import Workplace

LARGE_BYTES = 96 * 1024 * 1024


def test_a_rerun_that_the_validator_refuses_leaves_the_previous_delivery(workplace: Workplace, job_id: str) -> None:
    product = make_product("studio/RERUN", "RERUN")
    workplace.place(job_id, product)
    assert workplace.deliver(job_id).status is Status.COMPLETED
    workplace.place(job_id, break_model(product))
    assert workplace.deliver(job_id).status is Status.VALIDATION_FAILED
    assert workplace.delivered(job_id) == product.delivered


@fault("SFTP: away through every attempt", injector="closed port", invariants="LOPR", outcome="failed; may be submitted again")
def test_an_upload_that_failed_leaves_the_gate_open_for_the_next_one(workplace: Workplace, small: Product, job_id: str) -> None:
    workplace.place(job_id, small)
    good = workplace.settings
    workplace.change(sftp_port=free_port())
    assert workplace.deliver(job_id).status is Status.FAILED
    (row,) = workplace.studio_rows("job_details")
    assert (row["is_uploaded"], row["upload_count"]) == (1, 0)
    assert workplace.studio_rows("email") == []
    workplace.settings = good
    assert workplace.deliver(job_id).status is Status.COMPLETED
    (row,) = workplace.studio_rows("job_details")
    assert (row["is_uploaded"], row["upload_count"]) == (0, 1)
    assert workplace.delivered(job_id) == small.delivered


def _with_mesh_glb(product: Product, folder: str) -> Product:
    """The same product with a main model called `mesh.glb`."""
    named = {product.main_model: f"{folder}/GLB_files/mesh.glb"}
    return replace(
        product,
        files={named.get(key, key): content for key, content in product.files.items()},
        targets={named.get(key, key): target for key, target in product.targets.items()},
    )


def test_jobs_at_once_do_not_swap_their_mesh_glb(workplace: Workplace, job_id: str) -> None:
    products = {}
    for number in range(3):
        sku = f"MESH{number}"
        products[f"{job_id}-{number}"] = _with_mesh_glb(make_product("studio/mesh", sku, seed=number + 7), f"studio/mesh/{sku}")
    tasks: list[Task] = []
    for each, product in products.items():
        workplace.place(each, product)
        tasks += workplace.submit(each)
    with ThreadPoolExecutor(3) as workers:
        ended = list(workers.map(workplace.attempt, tasks))
    assert [task.status for task in ended] == [Status.COMPLETED] * 3, [task.message for task in ended]
    for each, product in products.items():
        assert workplace.delivered(each) == product.delivered


def test_what_lies_about_in_a_workspace_is_neither_judged_nor_delivered(
    workplace: Workplace, small: Product, job_id: str
) -> None:
    workplace.place(job_id, small)
    (task,) = workplace.submit(job_id)
    left = workplace.settings.work_dir / f"{task.task_id}-0"
    left.mkdir(parents=True)
    for name in ("mesh.glb", "stale.blend", hashlib.sha256(small.main_model.encode()).hexdigest()):
        (left / name).write_bytes(b"another product's bytes")
    ended = workplace.attempt(task)
    assert (ended.status, ended.files) == (Status.COMPLETED, len(small.delivered))
    assert workplace.delivered(job_id) == small.delivered


def test_a_job_is_in_the_ledger_for_everyone_before_its_bell_rings(workplace: Workplace, job_id: str) -> None:
    """Rung for earlier, its worker would find nothing and the job would be pending for ever."""
    found: dict[str, bool] = {}

    class Bell(MemoryJobQueue):
        def ring(self, task_ids: Sequence[str], *, first: bool = False) -> None:
            for task_id in task_ids:
                found[task_id] = SqlSubmissions(workplace.engine, max_attempts=3).task(task_id) is not None

    doorbell = Doorbell(Bell(), MemoryStatusBoard())
    accepted = submit_batch(
        [NewJob(f"{job_id}-{number}", "ann", "spring") for number in range(20)],
        SubmitPorts(
            SqlSubmissions(workplace.engine, max_attempts=3),
            SqlRecovery(workplace.engine),
            SqlWorkerReports(workplace.engine),
            MemoryHost(),
            doorbell,
        ),
        SubmitLimits(AdmissionLimits(99), ReleaseLimits(batch_size=20, report_seconds=30)),
    )
    doorbell.close(20)
    assert isinstance(accepted, Accepted)
    assert found == {task.task_id: True for task in accepted.tasks}


def test_a_large_file_goes_through_in_constant_memory(workplace: Workplace, small: Product, job_id: str) -> None:
    """Download, zip, multipart body and upload: none of them holds the file."""
    key, target = "studio/large/scene.blend", "SKU1/sources/SKU1.blend"
    large = b"BLENDER-v402" + os.urandom(LARGE_BYTES)
    expected = (len(large), hashlib.sha256(large).hexdigest())
    workplace.put_objects({**small.files, key: large})
    del large
    workplace.list_job(job_id, "SKU1", [*small.files, key])
    with highest_memory() as grown_bytes:
        ended = workplace.deliver(job_id)
    assert ended.status is Status.COMPLETED, ended.message
    content = (workplace.sftp.folder / job_id / target).read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == expected
    assert grown_bytes() < LARGE_BYTES / 2, f"{grown_bytes() / 1e6:.0f} MB"


@contextmanager
def highest_memory() -> Iterator[Callable[[], int]]:
    """By how many bytes this process grew while the block ran, at most."""
    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.01):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: highest - before
    finally:
        done.set()
        watcher.join()


def test_no_secret_or_signature_reaches_a_jobs_history_or_the_log(
    workplace: Workplace, small: Product, job_id: str, caplog: Any
) -> None:
    """Storage that refuses a signature tells all about it, and the validator's address may hold a login."""
    workplace.place(job_id, small)
    workplace.change(
        wasabi_secret_key=SecretStr("hidden-s3-secret"),
        validator_api_url="http://caller:hidden-login@127.0.0.1:9/validate",
        sftp_password=SecretStr("hidden-sftp-password"),
    )
    with caplog.at_level("DEBUG"):
        task = workplace.deliver(job_id)
    told = "\n".join([repr(task), *workplace.history(task), caplog.text])
    assert task.status is Status.FAILED
    for secret in ("hidden-", "X-Amz-", "Signature=", "AWS4-HMAC-SHA256"):
        assert secret not in told


def test_a_job_that_never_finds_room_does_not_go_round_for_ever(workplace: Workplace, small: Product, job_id: str) -> None:
    workplace.place(job_id, small)
    workplace.change(max_memory_usage_percent=0.0001)
    began = time.monotonic()
    task = workplace.deliver(job_id)  # the workplace's PARK_HOURS are over at once
    assert task.status is Status.FAILED, f"after {time.monotonic() - began:.1f} s"
    assert task.problem is not None
    assert task.problem.error_class == "deferred"
    assert "PARK_HOURS" in task.message
