"""What was staged, by hash: the file beside `package` that lets the next attempt keep what is whole."""

from __future__ import annotations

import asyncio
import json
import posixpath
import secrets
from contextlib import suppress

from ncr_upload.adapters.sftp_dropoff.remote import Missing, Remote

GROUP_SECONDS = 0.5
"""So long finished files are collected for one manifest, as long as more files are to come."""


class Manifest:
    """Target → SHA-256 of every file that is in `package` or on its way there. What has another hash there must be removed
    before its target is `note`d, and what arrives is given its name only once the manifest `cover`s it: so the file of a
    target has the hash that the manifest says, or is not there."""

    def __init__(self, remote: Remote, own: str, written: dict[str, str]) -> None:
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
            written = json.loads(await remote.read(_path(own)))
        except (Missing, ValueError):
            written = {}
        return cls(remote, own, written if isinstance(written, dict) else {})

    def sha256(self, target: str) -> str | None:
        return self._written.get(target)

    def note(self, target: str, sha256: str) -> None:
        self._noted[target] = sha256

    async def complete(self) -> None:
        """No more files are to come: cover all of them at once."""
        self._complete.set()
        async with self._turn:
            await self._write(dict(self._noted))

    async def cover(self, target: str) -> None:
        """Returns once the manifest at the destination has the target. One write serves every target noted by then."""
        async with self._turn:
            if self._written.get(target) == self._noted[target]:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._complete.wait(), GROUP_SECONDS)
            await self._write(dict(self._noted))

    async def _write(self, noted: dict[str, str]) -> None:
        if noted == self._written:
            return
        part = posixpath.join(self._own, "parts", f"manifest-{secrets.token_hex(8)}")
        await self._remote.write(part, json.dumps(noted).encode())
        await self._remote.replace(part, _path(self._own))
        self._written = noted


def _path(own: str) -> str:
    return posixpath.join(own, "manifest.json")
