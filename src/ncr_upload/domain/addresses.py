"""Shows an address without the login in it, also where that is written wrong."""

from __future__ import annotations

import re

from ncr_upload.domain.text import REASONS, bound_line

_NO_PORT = re.compile(r"^([^/:\[]*):(?!\d{0,5}(/|$))[^/]*")
_HIDDEN_PORT = r"\1:…"
"""What stands in a port's place and is no number may be a password whose host was forgotten."""


def show_url(url: str) -> str:
    """Return scheme, host, port and path of `url`: no login, no query, no fragment.

    An unescaped '@', '/', '?' or '#' in a password makes its end look like a host or a path. So when in doubt, everything
    before the last '@' is left out.
    """
    scheme, found, rest = url.partition("://")
    if not found:
        scheme, rest = "", url
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in rest and (authority.count("@") != 1 or "@" in rest[len(authority) :]):
        if "@" in authority or ":" in authority:
            rest = rest.rpartition("@")[2]
    else:
        rest = authority.rpartition("@")[2] + rest[len(authority) :]
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    return bound_line(f"{scheme}{found}{_NO_PORT.sub(_HIDDEN_PORT, rest)}", REASONS)


def find_passwords(url: str) -> list[str]:
    """Return what may be the password in `url`: as it is written, up to each '@' that may end it."""
    rest = url.partition("://")[2] or url
    if "@" not in rest:
        return []
    first, last = (_between_colon_and(rest, at) for at in (rest.index("@"), rest.rindex("@")))
    return [password for password in dict.fromkeys((first, last)) if password]


def _between_colon_and(rest: str, end: int) -> str:
    return rest[:end].partition(":")[2]
