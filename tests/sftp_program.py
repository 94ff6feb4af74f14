"""An SFTP server that fails on request: `sftp_program.py ROOT HOST_KEY CONTROL USER PASSWORD [--plain]`.

The word in the file CONTROL says how:
    no-space, quota   large writes fail as on a full disk or a spent quota
    vague             large writes fail with SFTP's catch-all code and no reason
    denied            new folders are refused
    hang, hang-large  writes, or large ones, are never answered
    cut-on-write      the connection is cut by the next large write, then the server is well
    cut-after-aside   the next rename of a delivery into staging is done, then the connection is cut before its answer
    cut-after-publish the next rename out of staging is done, then the connection is cut before its answer
    refuse-publish    renames of a package out of staging fail
    no-continue       a file that exists is not opened for writing, unless it is emptied
    no-overwrite      a file that exists is not opened for writing at all (ProFTPD without AllowOverwrite)
    follow-links      a rename of a link renames what it leads to (ProFTPD)
    in-order          a write that does not begin at the end of the file fails, as where files are objects in a store
    no-links, empty-links, copy-links   links are answered OK, and there is nothing, an empty file, or a copy
    odd-names         listings of folders also hold names that no file can have
    squat             somebody else makes the final folder just before the next rename out of staging
    copy WHICH STOPS DELETES SECONDS ANSWER
                      folders are renamed by copying their files, each in SECONDS. WHICH: `all` renames of folders, or only the
                      next one that is `aside` (a delivery into staging), `publish` (out of staging) or `adopt` (a staging
                      folder). After STOPS files (-1: never) it breaks off with "Failure"; it DELETES the source's files
                      `each`, at the `end` or `never`. ANSWER `no` says "Failure" though all went well
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import asyncssh
from asyncssh.sftp import SFTPServerHandler

from folder_copies import copy_folder

ROOT, HOST_KEY, CONTROL, USER, PASSWORD = sys.argv[1:6]
LARGE_BYTES = 4096
ERRNO = {"no-space": errno.ENOSPC, "quota": errno.EDQUOT}


def fault() -> str:
    return Path(CONTROL).read_text()


class Files(asyncssh.SFTPServer):
    def __init__(self, channel: asyncssh.SSHServerChannel[bytes]) -> None:
        super().__init__(channel, chroot=os.fsencode(ROOT))

    def _cut(self) -> None:
        Path(CONTROL).write_text("")
        self.connection.abort()

    async def write(self, file_obj: object, offset: int, data: bytes) -> int:
        name = fault()
        if name == "hang" or (name == "hang-large" and len(data) >= LARGE_BYTES):
            await asyncio.sleep(3600)
        if len(data) >= LARGE_BYTES:
            if name in ERRNO:
                raise OSError(ERRNO[name], os.strerror(ERRNO[name]))
            if name == "vague":
                raise asyncssh.SFTPFailure("Failure")
            if name == "cut-on-write":
                self._cut()
            if name == "in-order" and offset != os.fstat(file_obj.fileno()).st_size:  # type: ignore[attr-defined]
                raise asyncssh.SFTPFailure("Failure")
        return super().write(file_obj, offset, data)  # type: ignore[return-value]

    def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> object:
        if fault() == "no-continue" and pflags & asyncssh.FXF_WRITE and not pflags & asyncssh.FXF_TRUNC:
            raise asyncssh.SFTPPermissionDenied("no")
        if fault() == "no-overwrite" and pflags & asyncssh.FXF_WRITE and os.path.lexists(self.map_path(path)):
            raise asyncssh.SFTPPermissionDenied("no")
        return super().open(path, pflags, attrs)

    def mkdir(self, path: bytes, attrs: asyncssh.SFTPAttrs) -> None:
        if fault() == "denied":
            raise asyncssh.SFTPPermissionDenied("no")
        super().mkdir(path, attrs)

    def link(self, oldpath: bytes, newpath: bytes) -> None:
        with Path(CONTROL).with_name("links").open("a") as log:
            log.write("link\n")
        name, new = fault(), Path(os.fsdecode(self.map_path(newpath)))
        if name == "empty-links":
            new.touch()
        elif name == "copy-links":
            new.write_bytes(Path(os.fsdecode(self.map_path(oldpath))).read_bytes())
        elif name != "no-links":
            super().link(oldpath, newpath)

    async def scandir(self, path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
        if fault() == "odd-names":
            for name in (b"", b"../../escaped", b"a/b", b"nul\0"):
                yield asyncssh.SFTPName(name, attrs=asyncssh.SFTPAttrs(size=1, permissions=0o100644, mtime=1))
        async for entry in super().scandir(path):
            yield entry

    def rename(self, oldpath: bytes, newpath: bytes) -> Awaitable[None] | None:  # type: ignore[override]
        name = fault()
        old, new = (Path(os.fsdecode(self.map_path(path))) for path in (oldpath, newpath))
        if name.startswith("copy ") and old.is_dir():
            which, *how = name.split()[1:]
            if which in ("all", _kind_of(oldpath, newpath)):
                if which != "all":
                    Path(CONTROL).write_text("")
                stops, deletes, seconds, answer = how
                return copy_folder(old, new, int(stops), deletes, float(seconds), answers_no=answer == "no")
        publishes = oldpath.endswith(b"/package") and b".ncr-staging" not in newpath
        sets_aside = b".ncr-staging" not in oldpath and b"/previous/" in newpath
        if publishes and name == "refuse-publish":
            raise asyncssh.SFTPFailure("Failure")
        if publishes and name == "squat":
            Path(CONTROL).write_text("")
            squatted = Path(os.fsdecode(self.map_path(newpath)))
            squatted.mkdir()
            (squatted / "foreign.txt").write_text("not ours")
        if name == "follow-links":
            oldpath = b"/" + os.fsencode(old.resolve().relative_to(Path(ROOT).resolve()))
        super().rename(oldpath, newpath)
        if (publishes and name == "cut-after-publish") or (sets_aside and name == "cut-after-aside"):
            self._cut()
        return None


def _kind_of(old: bytes, new: bytes) -> str:
    if b".ncr-staging" not in old:
        return "aside"
    return "adopt" if b".ncr-staging" in new else "publish"


class Login(asyncssh.SSHServer):
    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == (USER, PASSWORD)


async def serve() -> None:
    if "--plain" in sys.argv:
        SFTPServerHandler._extensions = []
    listener = await asyncssh.listen(
        "127.0.0.1", 0, server_factory=Login, server_host_keys=[HOST_KEY], sftp_factory=Files, allow_scp=False
    )
    print(f"listening on {listener.get_port()}", flush=True)  # noqa: T201
    await listener.wait_closed()


asyncio.run(serve())
