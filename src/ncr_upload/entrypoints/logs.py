"""Logs: one line per event, JSON or text, the same for our own code and for uvicorn's and Celery's."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from ncr_upload.domain.redaction import Redactor
from ncr_upload.domain.text import LOG_VALUE, Limit, bound_json
from ncr_upload.entrypoints.secrets import make_redactor
from ncr_upload.entrypoints.settings import Settings

SHORTEST_SECRET = 4
"""Shorter ones are hidden in a log than elsewhere: no program reads it. Hiding every 'a' would tell more than it hides."""

TRACE_LINES = 200
TRACE_LINE = Limit(1_000, 2_000)

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
ROUTED = ("uvicorn", "uvicorn.error", "uvicorn.asgi", "celery", "celery.task", "celery.worker", "celery.beat", "py.warnings")
LOUD = dict.fromkeys(
    ("uvicorn.access", "httpx", "httpcore", "asyncssh", "alembic", "celery.worker.strategy", "celery.app.trace"),
    logging.WARNING,
) | {"urllib3.connection": logging.ERROR}
"""`urllib3.connection`: its warning of header lines that cannot be read holds the URL, which may be a signed one.
`uvicorn.access`: the API writes its own line per request, without the query. Celery's two: a line for each message that is
received and one for its end, where the worker writes its own per attempt."""


def set_up_logs(settings: Settings) -> None:
    """Send every log of this process to stderr in one form. May be called again (after a fork, in tests).

    Give uvicorn `log_config=None`, and Celery `worker_hijack_root_logger=False`, or they put their own in its place.
    """
    redactor = make_redactor(settings, shortest=SHORTEST_SECRET)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.ExtraAdder(),
        _drop_colour_copy,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared[:-2],
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(settings, redactor),
                _Hider(redactor),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    logging.captureWarnings(True)
    # What no line of ours says is not found out: "Optimization" in Python's logging documentation.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    for name in ROUTED:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name, level in LOUD.items():
        logging.getLogger(name).setLevel(level)


def _renderers(settings: Settings, redactor: Redactor) -> list[Processor]:
    bounded = _Bounded(redactor)
    if settings.log_format == "json":
        return [structlog.processors.format_exc_info, bounded, structlog.processors.JSONRenderer(ensure_ascii=False)]
    # Without rich's traces: they show every local variable, wrapped so that no secret in them is found again.
    plain = structlog.dev.plain_traceback
    console = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)
    return [structlog.processors.format_exc_info, bounded, _show_controls, console]


def _show_controls(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """What strangers send (an address, a server's words) must not command the terminal of whoever reads it."""
    return {
        name: CONTROLS.sub(lambda found: repr(found[0])[1:-1], value) if isinstance(value, str) else value
        for name, value in event.items()
    }


def _drop_colour_copy(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """uvicorn gives its messages a second time, with a terminal's colour codes."""
    event.pop("color_message", None)
    return event


class _Bounded:
    """Hides the secrets in what a line tells, and bounds it: a library's message or trace may quote a server's megabytes."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor

    def __call__(self, _logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
        return {name: self._bound_trace(value) if name == "exception" else self._bound(value) for name, value in event.items()}

    def _bound(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, str):
            return self._redactor.bound(value, LOG_VALUE)
        if isinstance(value, list | tuple | dict):
            return self._redactor.redact_json(bound_json(value, LOG_VALUE.bytes))
        return self._redactor.bound(str(value), LOG_VALUE)

    def _bound_trace(self, trace: str) -> str:
        """Its last lines, which say what it came to."""
        lines = trace.splitlines()
        kept = [self._redactor.bound(line, TRACE_LINE) for line in lines[-TRACE_LINES:]]
        left = len(lines) - len(kept)
        return "\n".join([f"… ({left:,} lines before)", *kept] if left else kept)


class _Hider:
    """The last processor: takes out of the finished line what its parts did not show."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor

    def __call__(self, _logger: WrappedLogger, _name: str, line: str | EventDict | Any) -> str:
        return self._redactor.redact(str(line))
