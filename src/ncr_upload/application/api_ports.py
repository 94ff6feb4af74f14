"""What the API is made of; `bootstrap` builds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ncr_upload.application.lanes import Lanes
from ncr_upload.application.metrics import MemoryMetrics, MetricsStore
from ncr_upload.application.ports import Host, JobQueue, Recovery, Statistics, StatusBoard, Submissions, WorkerReports

Probe = Callable[[], object]
"""Asks one outside part whether it works. Blocks for a second or two at most; raises a `DeliveryError` when it does not."""


@dataclass(frozen=True, slots=True)
class ApiPorts:
    """The ports of one API process. `deep_probes` are asked on `/health?deep=true`, by part: tables, s3, sftp, validator."""

    ledger: Submissions
    recovery: Recovery
    board: StatusBoard
    queue: JobQueue
    host: Host
    queue_name: str
    check_database: Probe
    deep_probes: Mapping[str, Probe]
    reports: WorkerReports
    statistics: Statistics
    metrics: MetricsStore = field(default_factory=MemoryMetrics)
    lanes: Lanes = field(default_factory=Lanes)
