"""How a server renames a folder whose storage knows none: file by file, and it may stop at any of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncssh

COPYING: set[asyncio.Task[None]] = set()


async def copy_folder(old: Path, new: Path, stops: int, deletes: str, seconds: float, *, answers_no: bool = False) -> None:
    """Copy the files, each in so many seconds; break off with "Failure" after `stops` of them (-1: never). The source's files
    are deleted `each`, at the `end` or `never`. It goes on when the client is gone."""
    copying = asyncio.create_task(_copy(old, new, stops, deletes, seconds))
    COPYING.add(copying)
    await asyncio.shield(copying)
    if answers_no:
        raise asyncssh.SFTPFailure("Failure")


def _make_folders(old: Path, new: Path) -> tuple[list[Path], list[Path]]:
    """The folders and files that are to be copied."""
    paths = sorted(old.rglob("*"))
    folders = [path.relative_to(old) for path in paths if path.is_dir()]
    for folder in [Path(), *folders]:
        (new / folder).mkdir(parents=True, exist_ok=True)
    return folders, [path.relative_to(old) for path in paths if path.is_file()]


async def _copy(old: Path, new: Path, stops: int, deletes: str, seconds: float) -> None:
    """What is at the target already is merged with."""
    folders, files = _make_folders(old, new)
    for count, path in enumerate(files):
        if count == stops:
            raise asyncssh.SFTPFailure("Failure")
        content = (old / path).read_bytes()
        (new / path).write_bytes(content[: len(content) // 2])
        await asyncio.sleep(seconds)
        (new / path).write_bytes(content)
        if deletes == "each":
            (old / path).unlink()
    if deletes == "never":
        return
    for count, path in enumerate(files):
        if len(files) + count == stops:
            raise asyncssh.SFTPFailure("Failure")
        (old / path).unlink(missing_ok=True)
    for folder in reversed([Path(), *folders]):
        (old / folder).rmdir()
