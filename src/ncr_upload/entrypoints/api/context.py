"""What a route works with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from ncr_upload.application.api_ports import ApiPorts
from ncr_upload.application.ports import Wanted
from ncr_upload.application.submissions import Answer, SubmitLimits, SubmitPorts
from ncr_upload.application.views import iso_time
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.redaction import Redactor
from ncr_upload.entrypoints.settings import Settings


@dataclass(frozen=True, slots=True)
class Context:
    """The parts of one application; kept in its `state`."""

    ports: ApiPorts
    settings: Settings
    submits: SubmitPorts
    limits: SubmitLimits
    submit_each: Callable[[Sequence[Wanted]], list[Answer | Unavailable]]
    """`submissions.submit_each` on these parts."""
    redactor: Redactor
    """For what an outside part said."""
    leaving: threading.Event = field(default_factory=threading.Event)
    """Set once this process is to stop: it serves on, but asks for no more requests."""


async def _context(request: Request) -> Context:
    context = request.app.state.context
    assert isinstance(context, Context)
    return context


In = Annotated[Context, Depends(_context)]


def now() -> str:
    """The time of an answer."""
    return iso_time(time.time())
