"""An SFTP server without a chroot that renames folders by copying them, for one user's key:
`copying_sftp_program.py HOST_KEY AUTHORIZED_KEYS USER STOPS DELETES SECONDS` (see `folder_copies.copy_folder`)."""

from __future__ import annotations

import asyncio
import os
import pwd
import sys
from collections.abc import Awaitable
from pathlib import Path

import asyncssh

from folder_copies import copy_folder

HOST_KEY, AUTHORIZED, USER, STOPS, DELETES, SECONDS = sys.argv[1:7]


class Files(asyncssh.SFTPServer):
    def rename(self, oldpath: bytes, newpath: bytes) -> Awaitable[None] | None:  # type: ignore[override]
        old, new = (Path(os.fsdecode(self.map_path(path))) for path in (oldpath, newpath))
        if old.is_dir():
            return copy_folder(old, new, int(STOPS), DELETES, float(SECONDS))
        super().rename(oldpath, newpath)
        return None


async def serve() -> None:
    listener = await asyncssh.listen(
        "127.0.0.1", 0, server_host_keys=[HOST_KEY], authorized_client_keys=AUTHORIZED, sftp_factory=Files, allow_scp=False
    )
    if os.geteuid() == 0:  # as sshd does
        user = pwd.getpwnam(USER)
        os.setgroups([])
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    print(f"listening on {listener.get_port()}", flush=True)  # noqa: T201
    await listener.wait_closed()


asyncio.run(serve())
