"""The background programs: worker, beat and Flower."""

from __future__ import annotations

import os
import signal
import socket

import structlog

from ncr_upload.entrypoints.arenas import share_arenas
from ncr_upload.entrypoints.bootstrap.records import make_celery, wait_for_tables
from ncr_upload.entrypoints.logs import set_up_logs
from ncr_upload.entrypoints.settings import Settings, load_settings

log = structlog.get_logger("ncr.programs")


class PortRefused(Exception):
    """A program cannot listen where it is told to; the message says where, why and which setting changes it."""


def require_port(host: str, port: int, setting: str) -> None:
    """Raises `PortRefused` when nothing could listen there now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PortRefused(
                f"cannot listen on {host}:{port}: {reason}. Stop what listens there, or choose another {setting}."
            ) from error


def run_worker(settings: Settings, concurrency: int | None) -> None:
    """Until told to stop: SIGTERM and the first Ctrl-C finish the running jobs first."""
    share_arenas()
    _prepare(settings)
    if settings.validator_api_url is None:
        from ncr_upload.entrypoints.bundled_validator import BundledValidator

        os.environ.update(BundledValidator().start())
        load_settings.cache_clear()
    from ncr_upload.entrypoints.worker import app

    arguments = [
        "--quiet",  # no banner among the log's lines
        "worker",
        "--pool=prefork",
        f"--loglevel={settings.log_level}",
        "--without-gossip",
        "--without-mingle",
        f"--hostname=ncr-{os.getpid()}@%h",  # two workers of one host have each their own name, report and answers
    ]
    app.worker_main([*arguments, f"--concurrency={concurrency}"] if concurrency else arguments)


def run_beat(settings: Settings) -> None:
    """Until told to stop."""
    _prepare(settings)
    from ncr_upload.entrypoints.beat import SweepScheduler, app

    class Beat(app.Beat):  # type: ignore[misc]
        def install_sync_handler(self, service: object) -> None:  # noqa: ARG002 - Celery's signature
            """There is no schedule on the disk to write down first; a sweep may be cut off anywhere."""
            end_when_told(signal.SIGTERM)
            end_when_told(signal.SIGINT)

    Beat(scheduler_cls=SweepScheduler, loglevel=settings.log_level, quiet=True).run()


def run_flower(settings: Settings) -> None:
    """Until told to stop. Raises `PortRefused`. Flower's own FLOWER_* variables work too, but not for what is set here."""
    from flower.options import options
    from tornado.ioloop import IOLoop

    set_up_logs(settings)
    address = settings.flower_host or ("0.0.0.0" if settings.flower_basic_auth else "127.0.0.1")  # noqa: S104
    require_port(address, settings.flower_port, "FLOWER_PORT")
    for name in ("FLOWER_PORT", "FLOWER_BASIC_AUTH"):
        os.environ.pop(name, None)
    if settings.flower_basic_auth is not None:  # as an argument, it would be split at commas
        options.basic_auth = [settings.flower_basic_auth.get_secret_value()]
    log.info("flower_starts", address=address, port=settings.flower_port, guarded=bool(options.basic_auth))
    arguments = [f"--address={address}", f"--port={settings.flower_port}", "--logging=none"]
    end_when_told(signal.SIGINT)
    IOLoop.current().add_callback(end_when_told)  # once Flower, whose answer to SIGTERM is an exception, has set itself up
    make_celery(settings).start(["--quiet", "flower", *arguments])


def _prepare(settings: Settings) -> None:
    """Logs and tables. The wait for a database can be ended by SIGTERM, as process 1 of a container too."""
    set_up_logs(settings)
    end_when_told()
    wait_for_tables(settings)


def end_when_told(by: signal.Signals = signal.SIGTERM) -> None:
    """At once: there is nothing yet, or never, that has to be ended in order. An exception would not do: one that is raised
    while Python runs a finalizer is swallowed, and the program would go on, unstoppable."""
    signal.signal(by, lambda *_: os._exit(0))
