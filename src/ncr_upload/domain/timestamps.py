"""The studio's timestamps, as the database hands them over."""

from __future__ import annotations

import re
from datetime import datetime

_DATE_FIRST = re.compile(r"\d{4}-\d{2}-\d{2}(?![\d-])", re.ASCII)


def parse_timestamp(text: str) -> datetime | None:
    """The studio-local time in `text`: 'YYYY-MM-DD HH:MM:SS', also with 'T', fractions, an offset (dropped, the studio's
    clock is meant) or the date alone. None for what is no time: empty, '0000-00-00 00:00:00', garbled."""
    text = text.strip()
    if not _DATE_FIRST.match(text):
        return None
    try:
        return datetime.fromisoformat(text).replace(tzinfo=None)
    except ValueError:
        return None
