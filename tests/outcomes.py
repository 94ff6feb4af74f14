"""What the promises allow a job to end as, read from the destination, the studio's tables and the ledger's history."""

from __future__ import annotations

from ncr_upload.domain.jobs import Status, Task
from ncr_upload.entrypoints.embedded.product import Product
from workplace import Workplace


def assert_delivered_once(workplace: Workplace, task: Task, product: Product, *, spent: int) -> None:
    """Published whole and recorded once, in attempt number `spent`; nothing left behind."""
    assert (task.status, task.problem, task.attempt) == (Status.COMPLETED, None, spent), task.message
    assert workplace.delivered(task.job_id) == product.delivered
    assert recorded(workplace) == {"email": 1, "history_log": 1, "model_validation": 1}
    (row,) = workplace.studio_rows("job_details")
    assert (row["is_uploaded"], row["upload_count"], row["job_status"]) == (0, 1, "IAPPROVED")
    assert workplace.leftovers() == []


def assert_failed(workplace: Workplace, task: Task, code: str, error_class: str, *named: str) -> None:
    """Ended for this reason, naming these things; nothing delivered or recorded, the gate still open, nothing left."""
    assert (task.status, task.problem and task.problem.code) == (Status.FAILED, code), task.message
    assert task.problem is not None
    assert task.problem.error_class == error_class
    for words in (*named, task.problem.next_step):
        assert words in task.message
    assert_undelivered(workplace, task)
    assert workplace.studio_rows("job_details")[0]["is_uploaded"] == 1


def assert_undelivered(workplace: Workplace, task: Task) -> None:
    """Nothing is visible, recorded as delivered, or left behind."""
    assert workplace.delivered(task.job_id) is None
    assert workplace.studio_rows("email") == workplace.studio_rows("history_log") == []
    assert workplace.leftovers(None if task.finished_at else task) == []


def assert_told(workplace: Workplace, task: Task, *facts: str) -> None:
    """One line of the history has all of these (class, cause, attempt n of m)."""
    history = workplace.history(task)
    assert any(all(fact in line for fact in facts) for line in history), (facts, history)


def recorded(workplace: Workplace) -> dict[str, int]:
    return {table: len(workplace.studio_rows(table)) for table in ("email", "history_log", "model_validation")}
