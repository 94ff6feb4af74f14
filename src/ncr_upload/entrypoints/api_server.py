"""uvicorn that is drained: after SIGTERM it says not ready and goes on serving, so that whoever spreads the requests sends
the next ones elsewhere before it stops listening."""

from __future__ import annotations

import gc
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
import uvicorn

from ncr_upload.entrypoints.settings import Settings

log = structlog.get_logger("ncr.api")


class DrainingServer(uvicorn.Server):
    """The first SIGTERM sets `leaving` and stops the server `drain_seconds` later; a second one, or SIGINT, at once."""

    def __init__(self, config: uvicorn.Config, leaving: threading.Event, drain_seconds: float) -> None:
        super().__init__(config)
        self._leaving = leaving
        self._drain_seconds = drain_seconds
        self._stops_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGTERM and self._drain_seconds > 0 and self._stops_at is None:
            self._stops_at = time.monotonic() + self._drain_seconds
            self._leaving.set()
            return
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self._stops_at is not None and time.monotonic() >= self._stops_at and not self.should_exit:
            log.info("drained", seconds=self._drain_seconds)
            self.should_exit = True
        return await super().on_tick(counter)


def serve(settings: Settings, *, reload: bool) -> None:
    """Until told to stop. With `reload` a process of its own watches the code, and nothing is drained."""
    options: dict[str, Any] = {
        "host": settings.api_host,
        "port": settings.api_port,
        "http": "ncr_upload.entrypoints.api.protocol:ProblemProtocol",
        "log_config": None,
        "access_log": False,
        "timeout_graceful_shutdown": 10,
        "server_header": False,
        "proxy_headers": False,
    }
    if reload:
        source = str(Path(__file__).resolve().parents[2])
        uvicorn.run("ncr_upload.entrypoints.bootstrap.api:make_api", factory=True, reload=True, reload_dirs=[source], **options)
        return
    from ncr_upload.entrypoints.bootstrap.api import make_api  # noqa: PLC0415 - the process that watches does not need it

    app = make_api()
    gc.collect()
    gc.freeze()  # what has been loaded stays: the collector need not look through it again and again
    DrainingServer(uvicorn.Config(app, **options), app.state.context.leaving, settings.api_drain_seconds).run()
