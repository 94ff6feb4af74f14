"""Whatever is wrong with a job ends it (or a retry does), names the thing and the next step, and delivers nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import SecretStr

from fault_table import fault
from ncr_upload.domain.jobs import Status, Task
from ncr_upload.entrypoints.embedded.product import Product
from servers import free_port
from workplace import Workplace

OTHER_HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBZqX0pWmwqYzQmXH1f9mF0J7p5r0mYV0mW1m1o8v2dK"


def assert_refused(workplace: Workplace, task: Task, code: str, *named: str, status: Status = Status.FAILED) -> None:
    """Ended for this reason, naming these things and a next step; nothing delivered, nothing left, gate still open."""
    assert task.status is status
    assert task.problem is not None
    assert task.problem.code == code
    for name in named:
        assert name in task.message
    assert len(task.problem.next_step) > 10
    assert task.problem.next_step in task.message or status is Status.VALIDATION_FAILED
    assert workplace.delivered(task.job_id) is None
    assert workplace.leftovers() == []
    assert workplace.studio_rows("email") == []


def test_a_job_without_files_is_refused(workplace: Workplace) -> None:
    workplace.list_job("no-files", "SKU1", [])
    assert_refused(workplace, workplace.deliver("no-files"), "no_files", "no-files")


def test_a_job_with_nothing_but_reference_pictures_has_no_files(workplace: Workplace) -> None:
    workplace.list_job("pictures", "SKU1", ["a/source_front.JPG"])
    assert_refused(workplace, workplace.deliver("pictures"), "no_files", "pictures")


def test_a_job_without_an_active_sku_is_refused(workplace: Workplace) -> None:
    workplace.list_job("no-sku", None, ["a/GLB_files/x.glb"])
    assert_refused(workplace, workplace.deliver("no-sku"), "sku_not_found", "no-sku")


def test_a_job_the_studio_does_not_know_is_refused(workplace: Workplace) -> None:
    assert_refused(workplace, workplace.deliver("unheard-of"), "sku_not_found", "unheard-of")


def test_a_row_id_of_another_job_is_refused(workplace: Workplace, product: Product) -> None:
    workplace.place("mine", product)
    other = workplace.list_job("other", "SKU2", ["a/b.glb"])
    assert_refused(workplace, workplace.deliver("mine", row_id=other), "row_mismatch", f"row_id {other}", "mine")


def test_a_job_not_awaiting_upload_is_refused_before_anything_is_fetched(workplace: Workplace, product: Product) -> None:
    row_id = workplace.list_job("not-awaiting", "SKU1", list(product.files))
    with workplace.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE job_details SET is_uploaded = 0")
    task = workplace.deliver("not-awaiting")
    assert_refused(workplace, task, "not_awaiting_upload", "not-awaiting", f"row {row_id}")
    assert not any("downloading" in line for line in workplace.history(task))


def test_a_missing_object_fails_the_job_naming_its_key(workplace: Workplace, product: Product) -> None:
    gone = next(key for key in product.targets if key.endswith(".fbx"))
    keys = [key.replace("studio/", "elsewhere/") for key in product.files]
    objects = {key.replace("studio/", "elsewhere/"): content for key, content in product.files.items() if key != gone}
    workplace.put_objects(objects)
    workplace.list_job("missing", "SKU1", keys)
    assert_refused(workplace, workplace.deliver("missing"), "object_missing", gone.replace("studio/", "elsewhere/"))


def test_a_wrong_bucket_is_refused_by_name(workplace: Workplace, product: Product) -> None:
    workplace.place("bucket", product)
    workplace.change(bucket_name="no-such-bucket")
    assert_refused(workplace, workplace.deliver("bucket"), "bucket_missing", "no-such-bucket")


def test_an_unplaceable_file_is_refused_by_its_key(workplace: Workplace) -> None:
    workplace.list_job("unplaceable", "SKU1", ["a/GLB_files/SKU1.glb", "a/Materials/plain.glb"])
    assert_refused(workplace, workplace.deliver("unplaceable"), "unplaceable_key", "a/Materials/plain.glb")


@pytest.mark.parametrize("key", ["a/../../etc/passwd.png", "/etc/x.png", "a//b.png", "a/\x07b.png", "a/" + "n" * 256 + ".png"])
def test_a_hostile_key_is_refused(workplace: Workplace, key: str) -> None:
    workplace.list_job("hostile", "SKU1", ["a/GLB_files/SKU1.glb", key])
    assert_refused(workplace, workplace.deliver("hostile"), "hostile_key")


def test_a_hostile_sku_never_becomes_a_path(workplace: Workplace) -> None:
    workplace.list_job("hostile-sku", "../../escape", ["a/GLB_files/x.glb"])
    assert_refused(workplace, workplace.deliver("hostile-sku"), "sku_invalid")


def test_two_files_for_one_place_are_refused_naming_both(workplace: Workplace) -> None:
    keys = ["a/GLB_files/one.glb", "b/GLB_files/two.glb"]
    workplace.list_job("collision", "SKU1", keys)
    assert_refused(workplace, workplace.deliver("collision"), "layout_collision", *keys)


def test_a_broken_model_is_refused_by_the_validator_with_its_reason(workplace: Workplace, broken_product: Product) -> None:
    workplace.place("broken", broken_product)
    task = workplace.deliver("broken")
    assert_refused(workplace, task, "validation_failed", "BROKEN/BROKEN.glb", status=Status.VALIDATION_FAILED)
    (row,) = workplace.studio_rows("job_details")
    assert (row["is_uploaded"], row["upload_count"]) == (0, 0)
    assert task.attempt == 1


def _wrong_password(workplace: Workplace) -> None:
    workplace.change(sftp_password=SecretStr("wrong-password"))


def _wrong_host_key(workplace: Workplace) -> None:
    workplace.change(sftp_host_key=OTHER_HOST_KEY)


def _no_host_key(workplace: Workplace) -> None:
    workplace.change(sftp_host_key=None)


def _sftp_away(workplace: Workplace) -> None:
    workplace.change(sftp_port=free_port())


def _wrong_s3_secret(workplace: Workplace) -> None:
    workplace.change(wasabi_secret_key=SecretStr("wrong-secret"))


def _s3_away(workplace: Workplace) -> None:
    workplace.change(wasabi_endpoint=f"http://127.0.0.1:{free_port()}")


def _validator_away(workplace: Workplace) -> None:
    workplace.change(validator_api_url=f"http://127.0.0.1:{free_port()}/validate")


def _wrong_validator_key(workplace: Workplace) -> None:
    workplace.change(validator_api_key=SecretStr("wrong-key"))


@pytest.mark.parametrize(
    ("spoil", "codes", "named"),
    [
        (_wrong_password, {"login_refused"}, "partner"),
        (_wrong_host_key, {"host_key_mismatch"}, "127.0.0.1"),
        (_no_host_key, {"host_key_unpinned"}, "SFTP_HOST_KEY"),
        (_sftp_away, {"sftp_unreachable"}, "127.0.0.1"),
        (_wrong_s3_secret, {"storage_login_refused"}, "WASABI"),
        (_s3_away, {"storage_unavailable"}, "127.0.0.1"),
        (_validator_away, {"validator_undecided"}, "127.0.0.1"),
    ],
)
@fault(
    "Any part: refused or away for ever",
    injector="wrong settings, closed ports",
    invariants="LOPRH",
    outcome="fails; the previous delivery stays",
)
def test_a_part_that_refuses_or_is_away_ends_the_job_and_leaves_the_previous_delivery(
    workplace: Workplace, product: Product, spoil: Callable[[Workplace], None], codes: set[str], named: str
) -> None:
    job_id = f"prev-{spoil.__name__.strip('_').replace('_', '-')}"
    workplace.place(job_id, product)
    good = workplace.settings
    assert workplace.deliver(job_id).status is Status.COMPLETED
    workplace.list_job(job_id, "SKU1", [key for key, target in product.targets.items() if "/renders/" not in target])
    spoil(workplace)
    task = workplace.deliver(job_id)
    assert task.status is Status.FAILED
    assert task.problem is not None
    assert task.problem.code in codes
    assert named in task.message
    for secret in ("wrong-password", "wrong-secret", "wrong-key", "secret-key"):
        assert secret not in "\n".join([task.message, *workplace.history(task)])
    workplace.settings = good
    assert workplace.delivered(job_id) == product.delivered
    assert len(workplace.studio_rows("email")) == 1
    assert workplace.leftovers() == []


def test_a_wrong_validator_key_is_a_no_that_says_where_to_mend_it(workplace: Workplace, product: Product) -> None:
    workplace.place("validator-key", product)
    _wrong_validator_key(workplace)
    task = workplace.deliver("validator-key")
    assert_refused(workplace, task, "validation_failed", "VALIDATOR_API_KEY", status=Status.VALIDATION_FAILED)
    (entry,) = workplace.studio_rows("validation_failed_req")
    assert entry["response"] == 401


def test_a_fault_that_heals_is_retried_and_then_delivered(workplace: Workplace, product: Product) -> None:
    workplace.place("heals", product)
    good = workplace.settings
    _validator_away(workplace)
    (task,) = workplace.submit("heals")
    waiting = workplace.attempt(task)
    assert waiting.status is Status.PENDING
    assert waiting.due_at is not None
    assert "attempt 1 of 3" in waiting.message
    assert "next try in" in waiting.message
    workplace.settings = good
    with workplace.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE ncr_jobs SET claimable_at = 1")
    assert workplace.attempt(task).status is Status.COMPLETED
    assert workplace.delivered("heals") == product.delivered


@pytest.mark.parametrize(
    ("short", "named"), [({"max_memory_usage_percent": 0.001}, "MAX_MEMORY_USAGE_PERCENT"), ({"free_disk": 0}, "WORK_DIR")]
)
@fault("Worker: no memory, no disk", injector="settings", invariants="LH", outcome="deferred, no attempt spent")
def test_a_job_without_room_waits_unspent_and_then_goes_on(
    workplace: Workplace, product: Product, monkeypatch: pytest.MonkeyPatch, short: dict[str, float], named: str
) -> None:
    job_id = f"room-{named.lower()}"
    workplace.place(job_id, product)
    good = workplace.settings
    workplace.change(park_hours=1, **{name: value for name, value in short.items() if name != "free_disk"})
    (task,) = workplace.submit(job_id)
    with monkeypatch.context() as patched:
        if "free_disk" in short:
            patched.setattr("ncr_upload.adapters.host.MachineHost.free_disk", lambda *_: 0)
        waiting = workplace.attempt(task)
    assert (waiting.status, waiting.attempt) == (Status.PENDING, 0)
    assert named in waiting.message
    workplace.settings = good
    with workplace.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE ncr_jobs SET claimable_at = 1")
    assert workplace.attempt(task).status is Status.COMPLETED


def test_a_job_larger_than_the_whole_disk_is_refused_at_once(
    workplace: Workplace, product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace.place("too-large", product)
    monkeypatch.setattr("ncr_upload.adapters.host.MachineHost.total_disk", lambda *_: 1000)
    ended = workplace.deliver("too-large")
    assert (ended.status, ended.attempt, ended.problem and ended.problem.code) == (Status.FAILED, 1, "disk_too_small")
    assert workplace.leftovers() == []


@fault(
    "Studio: upload withdrawn while the job runs",
    injector="UPDATE job_details",
    invariants="LOPR",
    outcome="refused before the publish",
)
def test_an_upload_withdrawn_while_the_job_runs_is_not_published(workplace: Workplace, product: Product) -> None:
    workplace.place("withdrawn", product)
    (task,) = workplace.submit("withdrawn")

    def withdraw(reached: str) -> None:
        if reached == "stage:after":
            with workplace.engine.begin() as connection:
                connection.exec_driver_sql("UPDATE job_details SET is_uploaded = 0")

    ended = workplace.attempt(task, withdraw)
    assert (ended.status, ended.problem and ended.problem.code) == (Status.FAILED, "withdrawn")
    workplace.sweep(task)
    assert workplace.leftovers() == []
    assert workplace.delivered("withdrawn") is None
    assert workplace.studio_rows("email") == []


def test_an_upload_withdrawn_after_publishing_is_told_in_the_history(workplace: Workplace, product: Product) -> None:
    workplace.place("too-late", product)
    (task,) = workplace.submit("too-late")

    def withdraw(reached: str) -> None:
        if reached == "publish:after":
            with workplace.engine.begin() as connection:
                connection.exec_driver_sql("UPDATE job_details SET is_uploaded = 0")

    assert workplace.attempt(task, withdraw).status is Status.COMPLETED
    assert "none was updated" in workplace.history(task)[-1]
