"""What was staged, by hash: the file beside `package` that lets the next attempt keep what is whole."""

from __future__ import annotations

import asyncio
import json
import posixpath
import secrets
from collections.abc import Collection
from contextlib import suppress
from typing import NamedTuple

from ncr_upload.adapters.sftp_dropoff.remote import Denied, Failed, Missing, Remote

GROUP_SECONDS = 0.5
"""So long finished files are collected for one manifest, as long as more files are to come."""


LINKED = ""
"""No target has this name: below it are the times of those that are links into the previous delivery."""


class Entry(NamedTuple):
    """The SHA-256 of a staged file; if it is a link, also the time it had when it was linked."""

    sha256: str
    linked_mtime: int | None = None


class Manifest:
    """Target → what is in `package` or on its way there. What differs from it there must be removed before its target is
    `note`d, and what arrives is given its name only once the manifest `cover`s it: so the file of a target is what the
    manifest says, or is not there."""

    def __init__(self, remote: Remote, own: str, written: dict[str, Entry]) -> None:
        self._remote = remote
        self._own = own
        self._written = written
        self._noted = dict(written)
        self._complete = asyncio.Event()
        self._turn = asyncio.Lock()

    @classmethod
    async def read(cls, remote: Remote, own: str) -> Manifest:
        """Empty where there is none, or one that cannot be read: then nothing staged is kept."""
        try:
            written = _parse(await remote.read(_path(own)))
        except (Missing, Denied, Failed, ValueError, RecursionError):
            written = {}
        return cls(remote, own, written)

    def entry(self, target: str) -> Entry | None:
        return self._written.get(target)

    def targets(self) -> Collection[str]:
        return self._written.keys()

    def linked(self) -> set[str]:
        return {target for target, entry in self._written.items() if entry.linked_mtime is not None}

    def note(self, target: str, entry: Entry) -> None:
        self._noted[target] = entry

    async def complete(self) -> None:
        """No more files are to come: cover all of them at once."""
        self._complete.set()
        async with self._turn:
            await self._write(dict(self._noted))

    async def cover(self, target: str) -> None:
        """Returns once the manifest at the destination has the target. One write serves every target noted by then."""
        if self._covers(target):
            return
        async with self._turn:
            if self._covers(target):
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._complete.wait(), GROUP_SECONDS)
            await self._write(dict(self._noted))

    def _covers(self, target: str) -> bool:
        return self._written.get(target) == self._noted[target]

    async def _write(self, noted: dict[str, Entry]) -> None:
        if noted == self._written:
            return
        content: dict[str, object] = {target: entry.sha256 for target, entry in noted.items()}
        linked = {target: entry.linked_mtime for target, entry in noted.items() if entry.linked_mtime is not None}
        if linked:
            content[LINKED] = linked
        part = posixpath.join(self._own, "parts", f"manifest-{secrets.token_hex(8)}")
        await self._remote.write(part, json.dumps(content).encode())
        await self._remote.replace(part, _path(self._own))
        self._written = noted


def _parse(content: bytes) -> dict[str, Entry]:
    """Return the entries of a manifest. Raise `ValueError` or `RecursionError` for any other content."""
    hashes = json.loads(content)
    if not isinstance(hashes, dict):
        raise ValueError("it is no object")
    linked = hashes.pop(LINKED, {})
    if not isinstance(linked, dict) or not all(type(sha256) is str for sha256 in hashes.values()):
        raise ValueError("it has other values than hashes and times")
    if not all(type(mtime) is int for mtime in linked.values()):
        raise ValueError("it has times that are no integers")
    return {target: Entry(sha256, linked.get(target)) for target, sha256 in hashes.items()}


def _path(own: str) -> str:
    return posixpath.join(own, "manifest.json")
