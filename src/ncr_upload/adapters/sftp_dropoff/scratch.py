"""Trying out, in a folder of our own, what the destination lets this login do.

    {base}/.ncr-staging/probe.scratch/{a or b}/file    one folder for all probes: where nothing may be deleted, nothing grows
    {base}/.ncr-staging.probe                          that folder for a moment, where a publish is tried too

What fails in a job's folder concerns the destination only if it fails here too.
"""

from __future__ import annotations

import asyncio
import posixpath
import random
import secrets
import time
from collections.abc import Awaitable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from ncr_upload.adapters.sftp_dropoff.links import EXTENSION, see_link
from ncr_upload.adapters.sftp_dropoff.remote import Act, Denied, Failed, Missing, Remote, disk_full, escaped
from ncr_upload.domain.errors import DeliveryError, DestinationParked, Unavailable

STAGING = ".ncr-staging"
PROBE = "probe."
SCRATCH = PROBE + "scratch"
IN_BASE = ".ncr-staging.probe"
FOLDERS = ("a", "b")
TRIES = 10
JUDGE_SECONDS = 30.0
TOKEN_BYTES = 16
PROBE_BYTES = 256 * 1024
ROOM_FOR_MORE_BYTES = 1024 * 1024
CONTENT = (bytes(range(256)) * (PROBE_BYTES // 256))[TOKEN_BYTES:]
"""Every byte, so that a server shows itself that changes line ends; larger than what a full disk may still take in."""


IN_TIME = "It is tried again; see whether the server is slow."


class Ability(StrEnum):
    """Something a login may be allowed or refused, in the words of SFTP."""

    LIST = "list"
    MAKE = "mkdir"
    WRITE = "write"
    READ = "read"
    RENAME = "rename"
    PUBLISH = "publish"
    LINK = "hardlink"
    SET_TIME = "setstat"
    FREE_SPACE = "statvfs"
    DELETE = "remove"


REQUIRED = (Ability.LIST, Ability.MAKE, Ability.WRITE, Ability.RENAME)
"""Without one of these nothing can be delivered."""

SHARED = (Ability.MAKE, Ability.WRITE, Ability.RENAME, Ability.DELETE)
"""What fails, without a reason, also when another probe works in the same folder."""

_OF_VERB = {
    "list": Ability.LIST,
    "make": Ability.MAKE,
    "write": Ability.WRITE,
    "read": Ability.READ,
    "rename": Ability.RENAME,
    "remove": Ability.DELETE,
}
_CODES = {Ability.RENAME: "rename_refused", Ability.READ: "read_refused", Ability.DELETE: "delete_refused"}
_NEEDED_FOR = {
    "permission_denied": (Ability.PUBLISH,),
    "rename_refused": (Ability.RENAME,),
    "read_refused": (Ability.READ,),
    "delete_refused": (Ability.DELETE,),
}
"""What must work again before a destination parked with this code is healed, beside what is always required."""

NEXT_STEPS = {
    Ability.LIST: "Ask the partner to let the login list the folder (opendir, readdir, lstat).",
    Ability.MAKE: "Ask the partner to let the login make folders there (mkdir), also ones whose name begins with a dot.",
    Ability.WRITE: "Ask the partner to let the login write there.",
    Ability.READ: "Ask the partner to let the login read what it has written (OpenSSH: no 'read' in `internal-sftp -P`).",
    Ability.RENAME: "Ask the partner to let the login rename folders, by which a package becomes visible (OpenSSH: no 'rename' "
    "and 'posix-rename' in `internal-sftp -P`).",
    Ability.PUBLISH: "Ask the partner to let the login move folders from .ncr-staging into the base folder: the login must be "
    "able to write to it, and both must be on one file system.",
    Ability.LINK: "Ask the partner to offer hardlink@openssh.com for the login.",
    Ability.SET_TIME: "Ask the partner to let the login set the times of its files (setstat).",
    Ability.FREE_SPACE: "Ask the partner to offer statvfs@openssh.com for the login.",
    Ability.DELETE: "Ask the partner to let the login delete its own files and folders (remove, rmdir).",
}
COSTS = {
    Ability.READ: "an upload that was cut off begins again from its first byte",
    Ability.LINK: "a re-delivery sends every file again",
    Ability.SET_TIME: "a re-delivery sends the newest files again",
    Ability.FREE_SPACE: "a full disk is told as a mere failure, which spends the attempts of jobs",
    Ability.DELETE: "every job leaves a folder in .ncr-staging, and a re-delivery the delivery before",
}
"""What it costs that an ability is missing which a delivery can do without."""


@dataclass
class Report:
    """What was tried and failed, by ability; and the extensions that the server offers."""

    extensions: tuple[str, ...]
    failures: dict[Ability, DeliveryError] = field(default_factory=dict)
    tried: dict[Ability, None] = field(default_factory=dict)

    def works(self) -> list[Ability]:
        return [ability for ability in self.tried if ability not in self.failures]

    def first(self, needed: Iterable[Ability]) -> DeliveryError | None:
        """Return why the first of these abilities is missing that is."""
        return next((self.refusal(ability) for ability in needed if ability in self.failures), None)

    def refusal(self, ability: Ability) -> DeliveryError:
        """Return the failure in words for an operator, with the code of the ability."""
        failure = self.failures[ability]
        if not isinstance(failure, Denied | Failed):
            return failure
        code, next_step = _CODES.get(ability, failure.code), NEXT_STEPS[ability]
        if ability is Ability.PUBLISH and isinstance(failure, Failed):
            code = "publish_refused"
        if code == "sftp_failure":
            return failure
        return DestinationParked(code, failure.message, next_step)


class _Disturbed(Exception):
    """Another probe is using the folder."""


class Scratch:
    """The scratch folder of a session's destination."""

    def __init__(self, remote: Remote, base: str) -> None:
        self._remote = remote
        self._base = base
        self._staging = posixpath.join(base, STAGING)
        self._top = posixpath.join(self._staging, SCRATCH)
        self.in_base = posixpath.join(base, IN_BASE)

    async def probe(self, parked_for: str = "") -> None:
        """Raise why nothing could be delivered now, or why what a destination was parked for does not work yet."""
        needed = (*_NEEDED_FOR.get(parked_for, ()), *REQUIRED)
        report = await self.examine(publish=Ability.PUBLISH in needed)
        failure = report.first(needed)
        if failure is not None:
            raise failure

    async def judge(self, failure: Denied | Failed) -> DeliveryError:
        """Return what to raise for a failed operation: what fails here too is the destination's, the rest is the job's."""
        act = failure.act or Act("", "")
        if isinstance(failure, Failed) and act.verb != "rename":
            return failure
        concerned = [Ability.RENAME]
        if isinstance(failure, Denied):
            concerned = [*REQUIRED, *([_OF_VERB[act.verb]] if act.verb in _OF_VERB else [])]
            if any(not self._is_staged(path) for path in act.paths):
                concerned.append(Ability.PUBLISH)
        try:
            async with asyncio.timeout(JUDGE_SECONDS):
                report = await self.examine(publish=Ability.PUBLISH in concerned)
        except TimeoutError:
            return Unavailable("sftp_unreachable", f"{failure.message}; whether other jobs are, was not found out", IN_TIME)
        except DeliveryError as unproven:
            return unproven if isinstance(failure, Denied) else failure
        refused = report.first(concerned)
        if refused is not None:
            if isinstance(refused, Unavailable) or refused.code not in ("permission_denied", *_CODES.values()):
                return refused
            told = f"{failure.message}; the login is refused that in a folder of its own too"
            return DestinationParked(refused.code, told, refused.next_step)
        return failure if isinstance(failure, Failed) else await self._job_denied(failure, act)

    async def examine(self, *, publish: bool) -> Report:
        """Try every ability. Raises `Unavailable` when the connection is lost."""
        for turn in range(1, TRIES):
            began = time.monotonic()
            try:
                return await self._examine(publish, last=False)
            except _Disturbed:
                await asyncio.sleep(random.random() * (0.05 + time.monotonic() - began) * 2 * turn)
        return await self._examine(publish, last=True)

    async def _examine(self, publish: bool, last: bool) -> Report:
        report = Report(self._remote.extensions())
        turn = _Turn(self._remote, self._base, report, last)
        await self._try_all(turn, publish)
        if Ability.MAKE not in report.failures:
            await turn.attempt(Ability.DELETE, self._remove_all(Ability.LIST in report.failures))
        return report

    async def _remove_all(self, unlisted: bool) -> None:
        """Remove the scratch folder, by the names it is known to have. What else is in it is found if it can be listed."""
        folders = [posixpath.join(self._top, name) for name in FOLDERS]
        await self._remote.remove_files(posixpath.join(folder, name) for folder in folders for name in ("file", "link"))
        try:
            await self._remote.remove_folders([self._top, *folders])
        except Failed:
            if unlisted:
                raise
            await self._remote.remove_tree(self._top)

    async def _try_all(self, turn: _Turn, publish: bool) -> None:
        remote, top = self._remote, self._top
        if not await turn.attempt(Ability.MAKE, remote.make_folders(self._staging)):
            return
        await _side_by_side(
            turn.attempt(Ability.LIST, self._list_staging()), turn.attempt(Ability.MAKE, remote.make_folder(top))
        )
        if Ability.MAKE in turn.report.failures:
            return
        here, there = await self._choose_folders(turn, publish)
        if not await turn.attempt(Ability.MAKE, remote.make_folder(here)):
            return
        file, content = posixpath.join(here, "file"), secrets.token_bytes(TOKEN_BYTES) + CONTENT
        if not await turn.attempt(Ability.WRITE, remote.write(file, content)):
            return
        await _side_by_side(
            turn.attempt(Ability.READ, self._read_back(turn, file, content)),
            turn.attempt(Ability.LINK, self._link(file)),
            turn.attempt(Ability.SET_TIME, self._set_time(file)),
            turn.attempt(Ability.FREE_SPACE, self._tell_free_space()),
        )
        if await turn.attempt(Ability.RENAME, self._rename(turn, here, there)):
            if publish:
                await turn.attempt(Ability.PUBLISH, self._publish(turn, there))
            await turn.attempt(Ability.RENAME, self._remote.rename(there, here))

    async def _list_staging(self) -> None:
        await self._remote.entries(self._staging)

    async def _choose_folders(self, turn: _Turn, publish: bool) -> tuple[str, str]:
        """Return the folder to write in and the name to give it. One that an earlier probe could not delete is used again."""
        first, second = (posixpath.join(self._top, name) for name in FOLDERS)
        if publish:
            await self._bring_back(first)
        if not await self._is_there(second):
            return first, second
        if not await self._is_there(first):
            return second, first
        await turn.attempt(Ability.DELETE, self._remote.remove_tree(second))
        return first, second

    async def _is_there(self, path: str) -> bool:
        try:
            return await self._remote.exists(path)
        except (Denied, Failed):
            return False

    async def _bring_back(self, first: str) -> None:
        """Take back what a probe that was cut off left in the base folder."""
        if not await self._is_there(self.in_base):
            return
        with suppress(Denied, Failed, Missing):
            await self._remote.rename(self.in_base, first)
        if await self._is_there(self.in_base):
            with suppress(Denied, Failed, Missing):
                await self._remote.remove_tree(self.in_base)

    async def _read_back(self, turn: _Turn, file: str, content: bytes) -> None:
        read = await self._remote.read(file, PROBE_BYTES)
        if read == content:
            return
        if not turn.last:
            raise _Disturbed
        turn.report.failures[Ability.WRITE] = DestinationParked(
            "content_changed",
            f"{self._remote.address} gives other bytes back from {file} than were written",
            "Ask the partner for a server that stores files as they are (binary mode, no conversion of line ends).",
        )

    async def _link(self, file: str) -> None:
        remote, link = self._remote, posixpath.join(posixpath.dirname(file), "link")
        if EXTENSION not in remote.extensions():
            raise Failed("sftp_failure", f"{remote.address} does not offer hard links", "")
        with suppress(Failed):  # it may be left there from before, which is as good
            await remote.ask(Act.of("link", link), remote.channel.link(file, link))
        if await see_link(remote, link, PROBE_BYTES) is None:
            raise Failed("links_unseen", f"{remote.address} answers that {link} is linked, and it is not there", "")

    async def _set_time(self, file: str) -> None:
        mtime = (await self._remote.stat(file)).mtime
        if mtime:
            await self._remote.set_time(file, int(mtime) - 1)

    async def _tell_free_space(self) -> None:
        if await self._remote.free_room(self._base) is None:
            raise Failed("sftp_failure", f"{self._remote.address} does not tell its free space", "")

    async def _rename(self, turn: _Turn, here: str, there: str) -> None:
        """A folder with a file in it, whose content must come along."""
        await self._remote.rename(here, there)
        if not turn.last:
            await self._remote.size(posixpath.join(there, "file"))
        elif not await self._remote.exists(posixpath.join(there, "file")):
            raise Failed("sftp_failure", f"{self._remote.address} renamed {here} without the file in it", "")

    async def _publish(self, turn: _Turn, folder: str) -> None:
        try:
            await self._remote.rename(folder, self.in_base)
        except Failed:
            if not turn.last and await self._remote.exists(self.in_base):
                raise _Disturbed from None
            raise
        try:
            await self._remote.rename(self.in_base, folder)
        except (Denied, Failed):
            with suppress(Denied, Failed):
                await self._remote.remove_tree(self.in_base)
            raise

    def _is_staged(self, path: str) -> bool:
        return path == self._staging or path.startswith(self._staging + "/")

    async def _job_denied(self, failure: Denied, act: Act) -> Unavailable:
        """Say whose the folder is that only this job is refused."""
        paths = sorted(act.paths, key=self._is_staged)
        for path in paths:
            with suppress(DeliveryError):
                owner = await self._owner(path)
                return Unavailable(
                    "job_folder_denied",
                    f"{failure.message}. It belongs to {owner}; other jobs are not concerned",
                    f"Ask the partner to give {escaped(path)} to the login, or to move it away.",
                )
        return Unavailable(
            "job_folder_denied",
            f"{failure.message}; other jobs are not concerned",
            "Ask the partner to let the login write to this job's folder.",
        )

    async def _owner(self, path: str) -> str:
        found = await self._remote.stat(path)
        mode = f", mode {found.permissions & 0o7777:04o}" if found.permissions is not None else ""
        return (
            f"uid {found.uid}, gid {found.gid}{mode}" if found.uid is not None else f"somebody the server does not name{mode}"
        )


async def _side_by_side(*attempts: Awaitable[bool]) -> None:
    for found in await asyncio.gather(*attempts, return_exceptions=True):
        if isinstance(found, BaseException):
            raise found


class _Turn:
    """One run through all abilities. While it is not the `last`, what another probe may have caused is no failure."""

    def __init__(self, remote: Remote, base: str, report: Report, last: bool) -> None:
        self._remote = remote
        self._base = base
        self.report = report
        self.last = last

    async def attempt(self, ability: Ability, work: Awaitable[None]) -> bool:
        """Return whether it worked; note why it did not."""
        self.report.tried[ability] = None
        try:
            await work
        except Missing as failure:
            if not self.last:
                raise _Disturbed from None
            self._note(ability, Failed("sftp_failure", failure.message, failure.next_step))
        except (Denied, DestinationParked) as failure:
            self._note(ability, failure)
        except Failed as failure:
            full = await find_full_disk(self._remote, self._base, failure)
            if full is None and not self.last and ability in SHARED:
                raise _Disturbed from None
            self._note(ability, full or failure)
        else:
            return True
        return False

    def _note(self, ability: Ability, failure: DeliveryError) -> None:
        """What is refused may be to look whether something is there, which every other ability needs."""
        if isinstance(failure, Denied) and failure.act is not None and failure.act.verb == "look at":
            self.report.failures.setdefault(Ability.LIST, failure)
            self.report.tried.setdefault(Ability.LIST)
        self.report.failures.setdefault(ability, failure)


async def find_full_disk(remote: Remote, base: str, failure: Failed) -> DestinationParked | None:
    """Return the failure as a full disk, if the free space says so: OpenSSH says only that it failed."""
    free = await remote.free_room(base)
    if free is None or (free.size >= ROOM_FOR_MORE_BYTES and free.files > 0):
        return None
    return disk_full(failure.message, f"{free.size} bytes and {free.files} files are free")
