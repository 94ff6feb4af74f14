"""The embedded SFTP server's host key."""

from __future__ import annotations

from pathlib import Path

from ncr_upload.entrypoints.embedded.credentials import write_private


def load_public_key(path: Path) -> str:
    """The public half of the private key at `path`, as a client pins it (``ssh-ed25519 AAAA…``); both are made on
    first use, the public half in a file of the same name ending in ``.pub``."""
    public = path.with_name(path.name + ".pub")
    if not (path.exists() and public.exists()):
        import asyncssh  # noqa: PLC0415 - slow to import, and needed only once in a state folder's life

        key = asyncssh.read_private_key(path) if path.exists() else asyncssh.generate_private_key("ssh-ed25519")
        write_private(path, key.export_private_key().decode())
        write_private(public, key.export_public_key().decode())
    return " ".join(public.read_text().split()[:2])
