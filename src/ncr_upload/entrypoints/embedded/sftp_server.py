"""The embedded SFTP server: ``python -m ncr_upload.entrypoints.embedded.sftp_server --port N --root DIR --host-key FILE``.

One login by password (`SFTP_USERNAME` and `SFTP_PASSWORD` in the environment) that sees DIR as `/` and nothing outside
of it, whatever `..` or symbolic link a path holds. Files and renames behave as on OpenSSH: a plain rename never
overwrites, `posix-rename@openssh.com` does; hard links, fsync, statvfs and limits are offered as extensions. The host
key is made on the first start and kept. No shell, no forwarding.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import asyncssh

from ncr_upload.entrypoints.embedded.host_key import load_public_key

_LOGIN_SECONDS = 20
_IDLE_SECONDS = 30


class RootedFiles(asyncssh.SFTPServer):
    """Files below one folder. Every path is resolved anew on every request, so a link made or moved later is no way out."""

    def __init__(self, channel: asyncssh.SSHServerChannel[bytes], root: Path) -> None:
        self._root = root.resolve()
        super().__init__(channel, chroot=os.fsencode(self._root))

    def map_path(self, path: bytes) -> bytes:
        local = self._local(path)
        self._confine(local.resolve())
        return os.fsencode(local)

    def _map_entry(self, path: bytes) -> Path:
        """Like `map_path` for the directory entry itself: a link is not followed, only its folder must be inside."""
        local = self._local(path)
        self._confine(local.parent.resolve() if local != self._root else local)
        return local

    def _local(self, path: bytes) -> Path:
        return Path(os.fsdecode(super().map_path(path)))

    def _confine(self, resolved: Path) -> None:
        if not resolved.is_relative_to(self._root):
            raise asyncssh.SFTPPermissionDenied("the path leads out of the login's folder")

    def lstat(self, path: bytes) -> os.stat_result:
        return self._map_entry(path).lstat()

    def remove(self, path: bytes) -> None:
        self._map_entry(path).unlink()

    def rename(self, oldpath: bytes, newpath: bytes) -> None:
        """As OpenSSH does it: a file by link and unlink, so that two renames to one name cannot both win."""
        old, new = self._map_entry(oldpath), self._map_entry(newpath)
        if new.exists() or new.is_symlink():
            raise asyncssh.SFTPFileAlreadyExists("the new name exists")
        if old.is_file() and not old.is_symlink():
            new.hardlink_to(old)
            old.unlink()
        else:
            old.rename(new)

    def posix_rename(self, oldpath: bytes, newpath: bytes) -> None:
        self._map_entry(oldpath).replace(self._map_entry(newpath))


class PasswordLogin(asyncssh.SSHServer):
    def __init__(self, username: str, password: str) -> None:
        self._username = username
        self._password = password

    def begin_auth(self, _username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        right_user = secrets.compare_digest(username.encode(), self._username.encode())
        right_password = secrets.compare_digest(password.encode(), self._password.encode())
        return right_user and right_password


async def serve(
    *,
    host: str,
    port: int,
    root: Path,
    host_key: Path,
    username: str,
    password: str,
    on_ready: Callable[[int], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. `on_ready` is told the port once connections are accepted."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    listener = await asyncssh.listen(
        host,
        port,
        server_factory=lambda: PasswordLogin(username, password),
        server_host_keys=[str(host_key)],
        sftp_factory=lambda channel: RootedFiles(channel, root),
        login_timeout=_LOGIN_SECONDS,
        keepalive_interval=_IDLE_SECONDS,
        agent_forwarding=False,
        x11_forwarding=False,
        reuse_address=True,
    )
    if on_ready is not None:
        on_ready(listener.get_port())
    await stopping.wait()
    listener.close()  # `wait_closed` would wait for the clients that are connected, since Python 3.12


def main() -> None:
    parser = argparse.ArgumentParser(description="An SFTP server for one folder, with one login by password.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--host-key", type=Path, required=True)
    arguments = parser.parse_args()
    username, password = os.environ.get("SFTP_USERNAME"), os.environ.get("SFTP_PASSWORD")
    if not username or not password:
        sys.exit("SFTP_USERNAME and SFTP_PASSWORD must be set in the environment: they are the login")

    def announce(port: int) -> None:
        sys.stdout.write(f"listening on {arguments.host}:{port}, serving {arguments.root}\n")
        sys.stdout.flush()

    arguments.root.mkdir(parents=True, exist_ok=True)
    load_public_key(arguments.host_key)
    asyncio.run(
        serve(
            host=arguments.host,
            port=arguments.port,
            root=arguments.root,
            host_key=arguments.host_key,
            username=username,
            password=password,
            on_ready=announce,
        )
    )


if __name__ == "__main__":
    main()
