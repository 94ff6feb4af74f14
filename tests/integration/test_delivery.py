"""One job through the whole pipeline on real servers: delivered whole, recorded once, cleaned up."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from ncr_upload.domain.jobs import Stage, Status
from ncr_upload.entrypoints.embedded.product import Product
from workplace import Workplace


def test_a_product_arrives_whole_where_the_customer_expects_it(workplace: Workplace, product: Product) -> None:
    workplace.place("whole", product)
    task = workplace.deliver("whole")
    assert (task.status, task.stage, task.progress, task.problem) == (Status.COMPLETED, Stage.DONE, 100, None)
    assert workplace.delivered("whole") == product.delivered
    assert (task.sku, task.verdict, task.files) == ("SKU1", "Valid", len(product.delivered))
    assert task.bytes == sum(len(content) for content in product.delivered.values())
    assert workplace.leftovers() == []


def test_a_delivery_is_recorded_once_in_the_studios_tables(workplace: Workplace, product: Product) -> None:
    workplace.place("recorded", product)
    workplace.deliver("recorded")
    (row,) = workplace.studio_rows("job_details")
    assert (row["is_uploaded"], row["is_reviewed"], row["job_status"], row["upload_count"]) == (0, 0, "IAPPROVED", 1)
    assert [(mail["sku"], mail["status"], mail["campagin"]) for mail in workplace.studio_rows("email")] == [
        ("SKU1", "Waiting", "spring")
    ]
    assert len(workplace.studio_rows("history_log")) == 1
    assert [answer["response"] for answer in workplace.studio_rows("model_validation")] == [200]
    assert workplace.studio_rows("validation_failed_req") == []


def test_the_ledger_keeps_each_files_size_and_hash(workplace: Workplace, product: Product) -> None:
    workplace.place("files", product)
    workplace.deliver("files")
    found = {row["target"]: row["size"] for row in workplace.studio_rows("ncr_files")}
    assert found == {target: len(content) for target, content in product.delivered.items()}


def test_the_timeline_tells_every_stage_and_what_was_left_out(workplace: Workplace, product: Product) -> None:
    workplace.place("timeline", product)
    task = workplace.deliver("timeline")
    told = "\n".join(workplace.history(task))
    for words in (
        "accepted",
        "attempt 1 of 3",
        "SKU SKU1",
        "1 reference picture",
        "downloading",
        "Valid",
        "uploading",
        "delivered as",
    ):
        assert words in told


def test_a_delivered_job_is_not_delivered_again(workplace: Workplace, product: Product) -> None:
    workplace.place("again", product)
    workplace.deliver("again")
    second = workplace.deliver("again")
    assert second.status is Status.FAILED
    assert second.problem is not None
    assert second.problem.code == "not_awaiting_upload"
    assert workplace.delivered("again") == product.delivered


def test_a_new_upload_of_a_job_replaces_the_delivery_whole(workplace: Workplace, product: Product) -> None:
    workplace.place("replace", product)
    workplace.deliver("replace")
    fewer = [key for key, target in product.targets.items() if "/renders/" not in target]
    workplace.list_job("replace", "SKU1", fewer)
    assert workplace.deliver("replace").status is Status.COMPLETED
    assert workplace.delivered("replace") == {product.targets[key]: product.files[key] for key in fewer}
    assert workplace.leftovers() == []


@pytest.mark.parametrize("point", ["publish:after", "record:before"])
def test_a_worker_that_dies_after_publishing_leaves_one_delivery_and_one_record(
    workplace: Workplace, product: Product, point: str
) -> None:
    """The crash is an exception nothing may catch here; tests/acceptance kills real processes."""
    from ncr_upload.application.attempts import run_task
    from ncr_upload.entrypoints.bootstrap import deliveries

    class Killed(BaseException):
        pass

    def die(reached: str) -> None:
        if reached == point:
            raise Killed

    workplace.place(point.replace(":", "-"), product)
    (task,) = workplace.submit(point.replace(":", "-"))
    options = deliveries.make_worker_options(workplace.settings, "doomed")
    with pytest.raises(Killed):
        run_task(task.task_id, workplace.ports(), options, die)
    assert workplace.studio_rows("email") == []
    with workplace.engine.begin() as connection:
        connection.execute(text("UPDATE ncr_jobs SET claimable_at = 1"))
    before = (workplace.sftp.folder / task.job_id).stat().st_ino
    ended = workplace.attempt(task)
    assert (ended.status, ended.attempt) == (Status.COMPLETED, 2)
    assert (workplace.sftp.folder / task.job_id).stat().st_ino == before, "it was published a second time"
    assert len(workplace.studio_rows("email")) == 1
    assert workplace.leftovers() == []
