"""Logs: one line per event, JSON or text, the same for our own code and for uvicorn's and Celery's."""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Any
from urllib.parse import quote

import structlog
from pydantic import SecretStr
from sqlalchemy import make_url
from structlog.typing import EventDict, Processor, WrappedLogger

from ncr_upload.entrypoints.settings import Settings

HIDDEN = "***"
SHORTEST_SECRET = 4
"""Shorter ones are not searched for: hiding every 'a' would tell more than it hides."""

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
ROUTED = ("uvicorn", "uvicorn.error", "uvicorn.asgi", "celery", "celery.task", "celery.worker", "celery.beat", "py.warnings")
LOUD = dict.fromkeys(
    ("uvicorn.access", "httpx", "httpcore", "asyncssh", "alembic", "celery.worker.strategy", "celery.app.trace"),
    logging.WARNING,
)
"""`uvicorn.access`: the API writes its own line per request, without the query. Celery's two: a line for each message that is
received and one for its end, where the worker writes its own per attempt."""


def set_up_logs(settings: Settings) -> None:
    """Send every log of this process to stderr in one form. May be called again (after a fork, in tests).

    Give uvicorn `log_config=None`, and Celery `worker_hijack_root_logger=False`, or they put their own in its place.
    """
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
                *_renderers(settings),
                _Hider(secrets_of(settings)),
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


def secrets_of(settings: Settings) -> frozenset[str]:
    """Every secret of the settings that may turn up in a text, also as a URL writes it."""
    found: set[str] = set()
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            found.update(_forms(name, value.get_secret_value()))
    return frozenset(secret for secret in found if len(secret) >= SHORTEST_SECRET)


def _forms(name: str, secret: str) -> set[str]:
    """The secret as it is, as a URL writes it and as JSON does."""
    if name == "database_url":  # the URL itself is no secret, its password is
        secret = make_url(secret).password or ""
    if name == "flower_basic_auth":
        secret = secret.partition(":")[2]
    return {secret, quote(secret, safe=""), json.dumps(secret, ensure_ascii=False)[1:-1]}


def _renderers(settings: Settings) -> list[Processor]:
    if settings.log_format == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=False)]
    # Without rich's traces: they show every local variable, wrapped so that no secret in them is found again.
    plain = structlog.dev.plain_traceback
    console = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)
    return [structlog.processors.format_exc_info, _show_controls, console]


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


class _Hider:
    """The last processor: takes the secrets out of the finished line."""

    def __init__(self, secrets: frozenset[str]) -> None:
        self._secrets = sorted(secrets, key=len, reverse=True)

    def __call__(self, _logger: WrappedLogger, _name: str, line: str | EventDict | Any) -> str:
        text = str(line)
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return text
