"""The tree of what can go wrong, classed by what may be done about it.

    DeliveryError
    ├── Rejected          bad data or a missing thing: terminal, never retried
    ├── Unavailable       a part did not answer or answered nonsense: retried with backoff
    │   ├── PackageChanged a file on this host's disk is not what was downloaded
    │   └── PublishUnsettled a publish broke off, and the destination lets nobody end it
    ├── NotPublished      a publish has not happened, by what was seen at the destination; its cause says why
    ├── DestinationParked the destination needs an operator (disk full, host key, login): jobs wait, no attempt spent
    │   └── StillParked   an earlier job found it so; this one has not asked
    ├── Deferred          not enough memory or disk here, now: no attempt spent
    ├── LeaseLost         another worker owns the job now: stop at once, touch nothing more
    ├── HandedOver        this worker is being stopped: put back at once, no attempt spent
    └── CancelRequested   the caller asked for the job to stop

What fits none of these is *unknown*: see `retries.ErrorClass`.
"""

from __future__ import annotations

from ncr_upload.domain.text import CODE, MESSAGE, NEXT_STEP, bound_text


class DeliveryError(Exception):
    """A failure somebody can act on.

    `code` is stable and machine readable (``object_missing``). `message` says what is wrong and with which
    thing (key, path, host, row). `next_step` tells an operator what to do. Each is bounded here. None holds a secret once it is
    written down or answered (see `Redactor`).
    """

    def __init__(self, code: str, message: str, next_step: str) -> None:
        self.code = bound_text(code, CODE)
        self.message = bound_text(message, MESSAGE)
        self.next_step = bound_text(next_step, NEXT_STEP)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} ({self.code}). {self.next_step}"

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.code, self.message, self.next_step))


class Rejected(DeliveryError):
    """The job can never succeed as it stands."""


class Unavailable(DeliveryError):
    """An outside part failed in a way that may heal. `retry_after_seconds` is the part's own wish, if it gave one."""

    def __init__(self, code: str, message: str, next_step: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(code, message, next_step)
        self.retry_after_seconds = retry_after_seconds


class PackageChanged(Unavailable):
    """A file on this host's disk has other bytes than had arrived."""


class PublishUnsettled(Unavailable):
    """A publish broke off half-way and could be neither finished nor undone. Nothing was removed."""


class NotPublished(DeliveryError):
    """A publish has not happened: the destination was looked at, and what had the final name has it still. `cause` is why."""

    def __init__(self, cause: DeliveryError) -> None:
        super().__init__(cause.code, cause.message, cause.next_step)
        self.cause = cause

    def __reduce__(self) -> tuple[object, ...]:
        return (NotPublished, (self.cause,))


class DestinationParked(DeliveryError):
    """The destination refuses every job until an operator acts there."""


class StillParked(DestinationParked):
    """Known to be parked: the job waits for the probe without asking the destination."""


class Deferred(DeliveryError):
    """There is no room for the job now: on this host, or in what all workers may use of the destination."""


class LeaseLost(DeliveryError):
    """The job belongs to another worker now."""

    def __init__(self, task_id: str, fence: int) -> None:
        super().__init__(
            "lease_lost",
            f"task {task_id}: the lease with fence {fence} is no longer this worker's",
            "Nothing to do: the worker that holds the newer lease finishes the job.",
        )


class HandedOver(DeliveryError):
    """This worker process is being stopped before the job is done."""

    def __init__(self) -> None:
        super().__init__(
            "handed_over", "the worker was stopped while the job ran", "Nothing to do: another worker takes the job."
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (HandedOver, ())


class CancelRequested(DeliveryError):
    """The caller cancelled the job while it ran."""

    def __init__(self, task_id: str) -> None:
        super().__init__("cancelled", f"task {task_id} was cancelled by its caller", "Submit the job again if needed.")
