"""Makes the one redactor of a program from its settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import parse_qsl, unquote

from pydantic import SecretStr
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from ncr_upload.domain.addresses import find_passwords
from ncr_upload.domain.redaction import SHORTEST_SECRET, Redactor
from ncr_upload.entrypoints.settings import Settings

URLS = ("database_url", "validator_api_url", "wasabi_endpoint")
"""Settings that may hold a login; the rest of them is no secret."""

_SECRET_OPTION = re.compile(r"pass|secret|token", re.IGNORECASE)


def make_redactor(settings: Settings, *, shortest: int = SHORTEST_SECRET) -> Redactor:
    """Return the redactor that knows every secret of the settings from that length on."""
    return Redactor(list_secrets(settings), shortest=shortest)


def list_secrets(settings: Settings) -> set[str]:
    """Return every secret of the settings, and the passwords in those that are URLs."""
    found: set[str] = set()
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        plain = value.get_secret_value() if isinstance(value, SecretStr) else value
        if name in URLS and plain:
            found.update(_passwords_of(plain))
        elif isinstance(value, SecretStr):
            found.add(plain)
            if name == "flower_basic_auth":
                found.add(plain.partition(":")[2])
    return found - {""}


def _passwords_of(url: str) -> Iterator[str]:
    """As it is written, as the driver reads it, and each part of one in which an '@' is not written %40."""
    for password in find_passwords(url):
        yield from (password, unquote(password), *password.split("@"))
    for name, value in parse_qsl(url.partition("?")[2]):
        if _SECRET_OPTION.search(name):
            yield value
    try:
        yield make_url(url).password or ""
    except (ArgumentError, ValueError):
        return
