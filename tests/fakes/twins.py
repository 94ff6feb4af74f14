"""In-memory twins of the ports that move bytes. They keep the promises of the real adapters: the same tests run on both.

Each can be told to fail: `failures` maps a name (an object's key, or a method) to the errors its next calls raise.
"""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ncr_upload.application.arrivals import Arrival, Follower, Turns
from ncr_upload.application.ports import (
    AnnouncedPublish,
    Fetched,
    Leftover,
    ObjectInfo,
    OnBytes,
    Previous,
    Staged,
    Successor,
    Verdict,
)
from ncr_upload.domain.errors import LeaseLost, Rejected, Unavailable

CHUNK_BYTES = 64 * 1024
Failures = defaultdict[str, list[Exception]]


def _fail_if_told(failures: Failures, name: str) -> None:
    if failures[name]:
        raise failures[name].pop(0)


class MemoryObjectStore:
    """A bucket as a dict from key to content; `listed` is what its lists tell."""

    def __init__(self, objects: dict[str, bytes] | None = None, bucket: str = "memory") -> None:
        self.objects = dict(objects or {})
        self.bucket = bucket
        self.fetched: list[str] = []
        self.listed: dict[str, ObjectInfo] = {}
        self.failures: Failures = defaultdict(list)

    @property
    def source(self) -> str:
        return self.bucket

    async def stat(self, key: str) -> ObjectInfo:
        content = self._content(key)
        return ObjectInfo(key, len(content), _md5(content))

    async def glance(self, keys: Sequence[str]) -> Mapping[str, ObjectInfo]:
        return {key: self.listed[key] for key in keys if key in self.listed}

    async def fetch(
        self,
        key: str,
        to: Path,
        on_bytes: OnBytes,
        *,
        known: ObjectInfo | None = None,
        turns: Turns | None = None,
        follower: Follower | None = None,
    ) -> Fetched:
        content = self._content(key)
        self.fetched.append(key)
        for start in range(0, len(content), CHUNK_BYTES):
            on_bytes(len(content[start : start + CHUNK_BYTES]))
        _write(to, content)
        return Fetched(len(content), hashlib.sha256(content).hexdigest(), zlib.crc32(content), _md5(content))

    def _content(self, key: str) -> bytes:
        _fail_if_told(self.failures, key)
        if key not in self.objects:
            raise Rejected("object_missing", f"there is no object {key!r} in bucket {self.bucket!r}", "Upload it again.")
        return self.objects[key]


def _write(to: Path, content: bytes) -> None:
    to.write_bytes(content)


def _md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


class MemoryValidator:
    """Gives `answers` in turn, the last one for ever; keeps what it was asked."""

    def __init__(self, *answers: Verdict | Exception) -> None:
        self.answers = list(answers) or [Verdict(True, "Valid", 200, '{"data":[{"result":"Valid"}]}')]
        self.asked: list[tuple[str, bytes]] = []

    @property
    def url(self) -> str:
        return "memory:validator"

    async def judge(self, sku: str, package: Iterable[bytes]) -> Verdict:
        self.asked.append((sku, await asyncio.to_thread(b"".join, package)))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


Package = dict[str, bytes]
"""Content by target."""


@dataclass
class Staging:
    """`package` is None once it is published."""

    package: Package | None = field(default_factory=dict)
    previous: dict[str, Package] = field(default_factory=dict)


class MemoryDropoff:
    """`deliveries` is what the partner sees, by job; `staging` is by (task, fence)."""

    def __init__(self) -> None:
        self.deliveries: dict[str, Package] = {}
        self.staging: dict[tuple[str, int], Staging] = {}
        self.uploaded: list[str] = []
        self.logins = 0
        self.probed_for: list[str] = []
        self.idle_seconds: dict[str, float] = {}
        self.failures: Failures = defaultdict(list)

    @property
    def destination(self) -> str:
        return "partner@memory:/"

    @asynccontextmanager
    async def session(self, patience_seconds: float = 0) -> AsyncIterator[MemoryDropoffSession]:
        self.logins += 1
        _fail_if_told(self.failures, "session")
        yield MemoryDropoffSession(self)


class MemoryDropoffSession:
    def __init__(self, place: MemoryDropoff) -> None:
        self._place = place

    async def probe(self, parked_for: str = "") -> None:
        self._place.probed_for.append(parked_for)
        _fail_if_told(self._place.failures, "probe")

    async def adopt(self, task_id: str, fence: int, announced: AnnouncedPublish | None = None) -> str:
        _fail_if_told(self._place.failures, "adopt")
        fences = sorted(other for task, other in self._place.staging if task == task_id)
        if fences and fences[-1] > fence:
            raise LeaseLost(task_id, fence)
        if fence not in fences:
            newest = self._place.staging.pop((task_id, fences.pop())) if fences else Staging()
            self._place.staging[task_id, fence] = newest
            self._put_back(newest)
        for older in fences:
            if older != fence:
                self._remove(task_id, older)
        return ""

    async def stage(
        self,
        task_id: str,
        fence: int,
        files: AsyncIterator[Arrival],
        on_bytes: OnBytes,
        previous: Previous | None = None,
    ) -> Staged:
        _fail_if_told(self._place.failures, "stage")
        package = self._own(task_id, fence).package
        if package is None:
            raise Unavailable("staging_missing", f"{task_id}: the package is published", "Nothing to do.")
        kept, unwanted = [], set(package)
        async for arrival in files:
            local = await arrival.whole()
            _check(local.file.target)
            unwanted.discard(local.file.target)
            target, content = local.file.target, local.path.read_bytes()
            if package.get(target) != content:
                package[target] = content
                self._place.uploaded.append(target)
            else:
                kept.append(len(content))
            on_bytes(len(content))
        for target in unwanted:
            del package[target]
        return Staged(len(kept), sum(kept))

    async def publish(self, task_id: str, fence: int, job_id: str, between: Callable[[], None]) -> str:
        _fail_if_told(self._place.failures, "publish")
        _check(job_id.replace("/", "//"))  # one segment only
        own = self._own(task_id, fence)
        if own.package is None:
            return ""
        if job_id in self._place.deliveries:
            own.previous[job_id] = self._place.deliveries.pop(job_id)
            between()
        self._place.deliveries[job_id], own.package = own.package, None
        return ""

    async def is_published(self, task_id: str, fence: int) -> bool:
        return self._own(task_id, fence).package is None

    async def leftovers(self) -> list[Leftover]:
        idle = self._place.idle_seconds
        return [Leftover(f"{task}-{fence}", task, idle.get(task, 0)) for task, fence in self._place.staging]

    async def clear(self, leftover: Leftover, successor: Successor = Successor.UNKNOWN) -> None:
        _fail_if_told(self._place.failures, "clear")
        task, _, fence = leftover.name.rpartition("-")
        self._remove(task, int(fence))

    async def discard(self, task_id: str, successor: Successor = Successor.NONE) -> None:
        _fail_if_told(self._place.failures, "discard")
        for task, fence in list(self._place.staging):
            if task == task_id:
                self._remove(task, fence)

    def _own(self, task_id: str, fence: int) -> Staging:
        if (task_id, fence) not in self._place.staging:
            raise Unavailable("staging_missing", f"there is no staging folder {task_id}-{fence}", "It is tried again.")
        return self._place.staging[task_id, fence]

    def _remove(self, task_id: str, fence: int) -> None:
        self._put_back(self._place.staging.pop((task_id, fence)))

    def _put_back(self, staging: Staging) -> None:
        """What was renamed aside for a package that did not follow."""
        for job_id in list(staging.previous) if staging.package is not None else ():
            if job_id not in self._place.deliveries:
                self._place.deliveries[job_id] = staging.previous.pop(job_id)


def _check(path: str) -> None:
    if any(segment in ("", ".", "..") for segment in path.split("/")):
        raise Rejected("path_refused", f"{path!r} is no place for a delivery", "Correct it.")
