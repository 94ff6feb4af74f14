"""What follows a failed attempt: another one, and when, or the end."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ncr_upload.domain.errors import (
    CancelRequested,
    Deferred,
    DeliveryError,
    DestinationParked,
    HandedOver,
    LeaseLost,
    Rejected,
    Unavailable,
)

LOOKS = 3
"""After its last attempt, a task whose publish was announced gets so many more that only look whether it happened."""


class ErrorClass(StrEnum):
    """What may be done about a failure (wire format: `Problem.error_class`)."""

    TRANSIENT = "transient"
    PARKED = "parked"
    REJECTED = "rejected"
    DEFERRED = "deferred"
    UNKNOWN = "unknown"


_CLASSES: tuple[tuple[type[DeliveryError], ErrorClass], ...] = (
    (Rejected, ErrorClass.REJECTED),
    (DestinationParked, ErrorClass.PARKED),
    (Deferred, ErrorClass.DEFERRED),
    (Unavailable, ErrorClass.TRANSIENT),
    (LeaseLost, ErrorClass.DEFERRED),
    (HandedOver, ErrorClass.DEFERRED),
    (CancelRequested, ErrorClass.REJECTED),
)


@dataclass(frozen=True, slots=True)
class RetryLimits:
    """The operator's settings: MAX_ATTEMPTS, RETRY_BASE_SECONDS, RETRY_MAX_SECONDS."""

    max_attempts: int
    base_seconds: float
    max_seconds: float


@dataclass(frozen=True, slots=True)
class Policy:
    """How one class of errors is retried. `attempts` None: for as long as it takes."""

    attempts: int | None
    base_seconds: float
    spends_attempt: bool
    because: str


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again in `delay_seconds`; an unspent attempt does not count."""

    delay_seconds: float
    spend_attempt: bool


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The job has failed. `reason` is for its timeline."""

    reason: str


def find_policy(error_class: ErrorClass, limits: RetryLimits) -> Policy:
    """The whole policy (docs/state_machine.md shows it). Waiting jobs look again at a steady pace: their attempt number stands
    still. A parked job does so only when the probe of its destination has not told it how things are."""
    return {
        ErrorClass.TRANSIENT: Policy(limits.max_attempts, limits.base_seconds, True, "a part did not answer"),
        ErrorClass.UNKNOWN: Policy(min(3, limits.max_attempts), limits.base_seconds, True, "an unforeseen error"),
        ErrorClass.PARKED: Policy(None, 60, False, "the destination needs an operator"),
        ErrorClass.DEFERRED: Policy(None, 15, False, "this host has no room now"),
        ErrorClass.REJECTED: Policy(0, 0, True, "it cannot succeed as it stands"),
    }[error_class]


def classify(error: BaseException) -> ErrorClass:
    """The class of a failure. `LeaseLost`, `HandedOver` and `CancelRequested` are orders to stop, no failures: the worker
    obeys them before it plans a retry. Here they count as what comes nearest: two leave the job to another, one ends it."""
    return next((error_class for kind, error_class in _CLASSES if isinstance(error, kind)), ErrorClass.UNKNOWN)


def plan_retry(
    error_class: ErrorClass, attempt: int, limits: RetryLimits, jitter: float, retry_after_seconds: float | None = None
) -> Retry | GiveUp:
    """What follows attempt number `attempt` (from 1), which has just failed.

    The delay doubles with each attempt up to `limits.max_seconds`; `jitter` in [0, 1) picks a point in its upper half.
    `retry_after_seconds`, the part's own wish, is waited out if longer, but never beyond `limits.max_seconds`.
    Raises `ValueError` for an attempt below 1 or a jitter outside [0, 1).
    """
    if attempt < 1 or not 0 <= jitter < 1:
        raise ValueError(f"attempt {attempt} must be 1 or more and jitter {jitter} in [0, 1)")
    policy = find_policy(error_class, limits)
    if policy.attempts == 0:
        return GiveUp(policy.because)
    if policy.attempts is not None and attempt >= policy.attempts:
        return GiveUp(f"{policy.because}, which is given up from attempt {policy.attempts} on")
    doublings = min(attempt - 1, 32) if policy.spends_attempt else 0
    backoff_seconds = min(policy.base_seconds * 2**doublings, limits.max_seconds) * (1 + jitter) / 2
    asked_seconds = min(retry_after_seconds or 0, limits.max_seconds)
    return Retry(max(backoff_seconds, asked_seconds), policy.spends_attempt)


def count_attempt(attempt: int, max_attempts: int) -> str:
    """Which attempt this is, in words. After the last come a few that only look whether the package is delivered."""
    if attempt <= max_attempts:
        return f"attempt {attempt} of {max_attempts}"
    return f"look {attempt - max_attempts} of {LOOKS} after {max_attempts} attempts"
