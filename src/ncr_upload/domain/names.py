"""What callers may name things."""

from __future__ import annotations

import re

MAX_NAME_LENGTH = 128

JOB_ID_PATTERN = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$"
"""A job_id: a path segment and a database key, so plain ASCII and no leading dot. Also in the OpenAPI document."""

ISSUED_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""The form of every task_id and batch_id that was ever issued."""

_JOB_ID = re.compile(JOB_ID_PATTERN)


def check_job_id(value: str) -> str:
    """`value`, if it is a job_id. Raises `ValueError` saying what one is."""
    if not _JOB_ID.fullmatch(value):
        raise ValueError(f"must be 1 to {MAX_NAME_LENGTH} letters, digits, '.', '_' or '-', not starting with a dot")
    return value


def check_label(value: str) -> str:
    """`value`, if it is 1 to 128 printable characters, not only spaces (a username, a campaign). Raises `ValueError` saying so.

    Printable is what Unicode calls so, and the space: no control or format characters, line breaks or lone surrogates.
    """
    if not 1 <= len(value) <= MAX_NAME_LENGTH or not value.isprintable() or value.isspace():
        raise ValueError(f"must be 1 to {MAX_NAME_LENGTH} printable characters, not only spaces")
    return value
