"""The secrets of one state folder: random, made once, readable by their owner only."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FILE_NAME = "secrets.json"


@dataclass(frozen=True, slots=True)
class Credentials:
    api_key: str
    redis_password: str
    s3_access_key: str
    s3_secret_key: str
    sftp_password: str
    validator_key: str

    def __repr__(self) -> str:
        return "Credentials(…)"


def load_credentials(state_dir: Path) -> Credentials:
    """The secrets of the folder, made on first use. Raises ValueError when the file is not what this wrote."""
    path = state_dir / FILE_NAME
    if not path.exists():
        made = Credentials(
            **{field.name: secrets.token_urlsafe(24).replace("-", "x").replace("_", "y") for field in fields(Credentials)}
        )
        write_private(path, json.dumps(asdict(made), indent=2))
        return made
    try:
        return Credentials(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a file of secrets; remove it, and new ones are made") from error


def write_private(path: Path, text: str) -> None:
    """Replace the file's content at once, for its owner's eyes only (mode 0600)."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    partial.unlink(missing_ok=True)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    partial.replace(path)
