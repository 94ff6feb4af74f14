"""`ncr dev`: the stack, staying up until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import Any

from sqlalchemy import make_url

from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.domain.errors import DeliveryError
from ncr_upload.entrypoints.embedded.endpoints import locate_bucket
from ncr_upload.entrypoints.embedded.parts import PartMissing, Site
from ncr_upload.entrypoints.embedded.samples import SEED_README_JOBS, arm_seed_readme_jobs
from ncr_upload.entrypoints.embedded.sockets import LOOPBACK
from ncr_upload.entrypoints.embedded.stack import ENDPOINTS_NAME, SEED_README_REDIS_PORT, Stack, StackRefused
from ncr_upload.entrypoints.embedded.supervisor import PartFailed

SEED_README_API_PORT = 8001
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_dev(
    state_dir: Path, port: int = SEED_README_API_PORT, database: str | None = None, endpoints: Path | None = None
) -> int:
    """Run the stack until SIGINT or SIGTERM; a second one ends it at once. Returns the exit status: 0 when it was up and
    stopped cleanly, 1 when it could not start (said on standard error)."""
    try:
        stack = Stack(
            state_dir,
            api_port=port,
            redis_port=SEED_README_REDIS_PORT if port == SEED_README_API_PORT else None,
            database=database,
            endpoints_files=[endpoints] if endpoints else [],
            tell=say,
        )
    except StackRefused as refused:
        say(f"error: {refused}")
        return 1
    return asyncio.run(_run(stack))


async def _run(stack: Stack) -> int:
    stopped = StopSignal(stack)
    began = time.monotonic()
    starting = asyncio.create_task(stack.start(prepare=_arm))
    try:
        await stopped.or_done(starting)
        if not stopped.is_set():
            say(_summary(stack, time.monotonic() - began))
            await stopped.wait()
    except (PartFailed, PartMissing, DeliveryError) as error:
        say(f"error: {error}")
        return 1
    finally:
        say("stopping")
        await stack.stop()
    say("stopped")
    return 0


class StopSignal:
    """Set by the first SIGINT, SIGTERM or SIGHUP; the second kills the stack's parts."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._event = asyncio.Event()
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started under nohup
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self._event.is_set():
            self._stack.kill()
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()

    async def wait(self) -> None:
        await self._event.wait()

    async def or_done(self, work: asyncio.Task[Any]) -> None:
        """Wait for the work, but drop it once a signal comes. Raises what the work raises."""
        signalled = asyncio.create_task(self.wait())
        await asyncio.wait({work, signalled}, return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        if work.done():
            work.result()
        else:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


def _arm(site: Site) -> None:
    engine = open_engine(site.database_url, pool_size=1)
    try:
        for problem in arm_seed_readme_jobs(engine, locate_bucket(site)):
            say(f"warning: a sample job was not put in place: {problem}")
    finally:
        engine.dispose()


def _summary(stack: Stack, took_seconds: float) -> str:
    site = stack.site
    database = make_url(site.database_url).render_as_string(hide_password=True)
    names = ", ".join(sample.job_id for sample in SEED_README_JOBS)
    return "\n".join(
        (
            f"ready after {took_seconds:.1f} s",
            f"  API        {site.url('api')}  (docs at /docs)",
            f"  Redis      {LOOPBACK}:{site.ports['redis']}",
            f"  database   {database}",
            f"  S3         {site.url('s3')}",
            f"  SFTP       {LOOPBACK}:{site.ports['sftp']}, deliveries land in {site.sftp_root}",
            f"  validator  {site.url('validator')}/validate",
            f"  logs       {site.log_dir}",
            f"  keys       {site.state_dir / ENDPOINTS_NAME}",
            f"  jobs ready to submit: {names}",
            "stop with Ctrl-C",
        )
    )


def say(line: str) -> None:
    """A line for the person at the terminal, apart from what a program reads on standard output."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
