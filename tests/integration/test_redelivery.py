"""A job that is delivered again sends what changed; the ledger knows the rest by hash, size and time."""

from __future__ import annotations

from ncr_upload.domain.jobs import Status
from ncr_upload.entrypoints.embedded.product import Product
from workplace import Workplace


def again(workplace: Workplace, job_id: str, product: Product) -> str:
    """Deliver once more what the artist has uploaded again; the timeline."""
    workplace.place(job_id, product)
    task = workplace.deliver(job_id)
    assert task.status is Status.COMPLETED
    assert workplace.delivered(job_id) == product.delivered
    return "\n".join(workplace.history(task))


def test_a_redelivery_links_what_did_not_change(workplace: Workplace, product: Product) -> None:
    count, size = len(product.delivered), sum(map(len, product.delivered.values()))
    assert "linked" not in again(workplace, "unchanged", product)
    folder = workplace.sftp.folder / "unchanged"
    first = {path: path.stat().st_ino for path in folder.rglob("*") if path.is_file()}
    assert f"{count} files, {size} bytes, were linked from the previous delivery" in again(workplace, "unchanged", product)
    assert {path: path.stat().st_ino for path in first} == first
    assert workplace.leftovers() == []


def test_a_file_that_the_partner_retouched_is_delivered_as_it_should_be(workplace: Workplace, product: Product) -> None:
    again(workplace, "retouched", product)
    target, content = next(item for item in product.delivered.items() if item[1])
    with (workplace.sftp.folder / "retouched" / target).open("r+b") as live:
        live.write(bytes([content[0] ^ 1]))
    count = len(product.delivered) - 1
    assert f"{count} files" in again(workplace, "retouched", product)
