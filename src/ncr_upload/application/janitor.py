"""What no job removes after itself, because it ended with the power cut: staging of tasks that are gone, old keys."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from ncr_upload.application.parking import require_open
from ncr_upload.application.ports import Cleaning, Dropoff, Parking, Successor
from ncr_upload.domain.errors import DeliveryError, DestinationParked, Unavailable

log = logging.getLogger(__name__)

ENDED_SECONDS = 300.0
"""A task that ended so long ago has nobody any more who uses its staging."""


@dataclass(frozen=True, slots=True)
class JanitorOptions:
    """The operator's settings: JANITOR_SECONDS, STAGING_KEEP_HOURS, IDEMPOTENCY_HOURS."""

    every_seconds: float
    keep_staging_seconds: float
    keep_keys_seconds: float


def clean(cleaning: Cleaning, parking: Parking, dropoff: Dropoff, options: JanitorOptions) -> None:
    """Remove what is left over. Raises `DeliveryError`."""
    if forgotten := cleaning.forget_keys(options.keep_keys_seconds):
        log.info("janitor: forgot %d idempotency keys", forgotten)
    require_open(parking, dropoff.destination)
    if removed := asyncio.run(_clean_staging(cleaning, dropoff, options)):
        log.info("janitor: removed from the staging of %s: %s", dropoff.destination, ", ".join(removed))


async def _clean_staging(cleaning: Cleaning, dropoff: Dropoff, options: JanitorOptions) -> list[str]:
    """Folders of ended tasks, and old ones of tasks this ledger does not know: another installation may deliver there too."""
    removed, failures = [], list[DeliveryError]()
    async with dropoff.session() as session:
        left = await session.leftovers()
        task_ids = [each.task_id for each in left if each.task_id is not None]
        ended = await asyncio.to_thread(cleaning.ended_long_ago, task_ids, ENDED_SECONDS)
        for each in left:
            if not ended.get(each.task_id or "", each.idle_seconds > options.keep_staging_seconds):
                continue
            successor = Successor.UNKNOWN
            if each.task_id is not None:
                successor = await asyncio.to_thread(cleaning.find_successor, each.task_id)
            try:
                await session.clear(each, successor)
            except (DestinationParked, Unavailable) as failure:
                if failure.code == "sftp_unreachable":
                    raise
                failures.append(failure)  # the next folder may be one that can be removed
            else:
                removed.append(each.name)
    for unremoved in failures:
        log.warning("janitor: a staging folder is left: %s", unremoved)
    return removed
