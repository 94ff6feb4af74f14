"""Starts the parts together, keeps them running, and ends them in order."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ncr_upload.entrypoints.embedded.parts import Part

START_SECONDS = 60.0
STOP_ORDER = (("api", "worker", "beat"), ("validator", "s3", "sftp", "redis"))

_POLL_SECONDS = 0.05
_RESTART_FIRST_SECONDS = 0.1
_RESTART_MOST_SECONDS = 5.0
_LOG_TAIL_LINES = 15


class PartFailed(Exception):
    """A part did not become ready. Says which, and the last lines of its log."""

    def __init__(self, name: str, reason: str, log: Path) -> None:
        lines = log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:] if log.exists() else []
        tail = "\n".join(f"    {line}" for line in lines) or "    (empty)"
        super().__init__(f"the part '{name}' did not start: {reason}. The end of {log}:\n{tail}")
        self.name = name


class _Kept:
    """A part with its process, if it has one now."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.ready = asyncio.Event()
        self.process: asyncio.subprocess.Process | None = None
        self.started_at = 0.0
        self.keeper: asyncio.Task[None] | None = None


class Supervisor:
    """Keeps `parts` running in `run_dir`, each one's output in `log_dir`/NAME.log.

    `on_restart` is called after a dead part has been started again; `tell` is told what happens, in words. Must be used
    from the main thread: the parts die with the thread that started them (see `launch`).
    """

    def __init__(
        self,
        parts: Iterable[Part],
        *,
        run_dir: Path,
        log_dir: Path,
        on_restart: Callable[[], None],
        tell: Callable[[str], None],
    ) -> None:
        self._kept = {part.name: _Kept(part) for part in parts}
        self._run_dir = run_dir
        self._log_dir = log_dir
        self._on_restart = on_restart
        self._tell = tell
        self._stopping = False

    def pids(self) -> dict[str, int]:
        """The main process of each part."""
        return {name: kept.process.pid for name, kept in self._kept.items() if kept.process is not None}

    async def start(self) -> None:
        """Returns when every part is ready. Raises `PartFailed`; the others still run then: call `stop`."""
        starting = [asyncio.create_task(self._start(kept)) for kept in self._kept.values()]
        try:
            await asyncio.gather(*starting)
        finally:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)

    async def wait_ready(self, name: str) -> None:
        """Returns when the part has become ready for the first time."""
        await self._kept[name].ready.wait()

    async def _start(self, kept: _Kept) -> None:
        for needed in kept.part.needs:
            await self.wait_ready(needed)
        process = await self._spawn(kept)
        deadline = time.monotonic() + START_SECONDS
        while not await kept.part.is_ready():
            if process.returncode is not None:
                raise PartFailed(kept.part.name, _death(process.returncode), self._log(kept.part))
            if time.monotonic() > deadline:
                raise PartFailed(kept.part.name, f"not ready after {START_SECONDS:.0f} seconds", self._log(kept.part))
            await asyncio.sleep(_POLL_SECONDS)
        kept.ready.set()
        kept.keeper = asyncio.create_task(self._keep(kept))

    async def _spawn(self, kept: _Kept) -> asyncio.subprocess.Process:
        part = kept.part
        launch = (sys.executable, "-I", "-S", str(Path(__file__).with_name("launch.py")), str(os.getpid()))
        with self._log(part).open("ab") as log:
            kept.process = await asyncio.create_subprocess_exec(
                *launch,
                *part.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._run_dir,
                env=dict(part.environment),
                start_new_session=True,
            )
        kept.started_at = time.monotonic()
        return kept.process

    async def _keep(self, kept: _Kept) -> None:
        """Start the part again whenever it dies: at once, then with a growing delay while it dies young."""
        delay_seconds = _RESTART_FIRST_SECONDS
        while kept.process is not None:
            code = await kept.process.wait()
            if self._stopping:
                return
            end_group(kept.process.pid)
            lived_seconds = time.monotonic() - kept.started_at
            delay_seconds = (
                _RESTART_FIRST_SECONDS
                if lived_seconds > _RESTART_MOST_SECONDS
                else min(delay_seconds * 2, _RESTART_MOST_SECONDS)
            )
            self._tell(f"{kept.part.name} {_death(code)}; starting it again in {delay_seconds:.1f} s")
            await asyncio.sleep(delay_seconds)
            process = await self._spawn(kept)
            self._tell(f"{kept.part.name} runs again as process {process.pid}")
            self._on_restart()

    async def stop(self) -> None:
        """End every part: SIGTERM in `STOP_ORDER`, SIGKILL for what overstays, and whatever a part left behind."""
        self._stopping = True
        for names in STOP_ORDER:
            await asyncio.gather(*(self._stop(self._kept[name]) for name in names if name in self._kept))

    async def _stop(self, kept: _Kept) -> None:
        if kept.keeper is not None:
            kept.keeper.cancel()
        process = kept.process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), kept.part.stop_seconds)
            except TimeoutError:
                self._tell(f"{kept.part.name} did not stop within {kept.part.stop_seconds:.0f} s and is killed")
        end_group(process.pid)
        await process.wait()

    def kill(self) -> None:
        """End every part at once, by SIGKILL."""
        self._stopping = True
        for pid in self.pids().values():
            end_group(pid)

    def _log(self, part: Part) -> Path:
        return self._log_dir / f"{part.name}.log"


def end_group(leader_pid: int) -> None:
    """SIGKILL the process group that a part led: itself, and children that outlived it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader_pid, signal.SIGKILL)


def _death(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"exited with status {code}"
