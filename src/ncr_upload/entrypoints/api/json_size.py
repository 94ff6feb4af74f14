"""Count the values of a JSON text before any of them is built: an object takes fifty times the bytes of `{}`."""

from __future__ import annotations

import re

_NEXT = re.compile(rb'[^"\[{,]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"\[{,]*+)*+[\[{,]', re.DOTALL)
"""Up to and including the next `[`, `{` or comma that is in no string. Possessive, hence linear and in constant memory."""


class TooMuch(Exception):
    """The text holds more than may be built. The message says of what."""


def check_size(text: bytes | bytearray, *, max_containers: int, max_values: int, max_gap: int) -> None:
    """Raise `TooMuch` for a text with more objects and arrays, or more values, than allowed, or with a longer string.

    The counts are exact for valid JSON. A parser stops at the first error, so for invalid JSON they are upper bounds of what it
    builds before. A string is measured by the gap between the brackets or commas around it. Time grows with the text up to the
    limits, memory not at all.
    """
    max_quotes = 4 * max_values  # a name and a value in two each
    if text.count(b'"') - text.count(b'\\"') > max_quotes:
        raise TooMuch(f"more than {max_values} values")
    containers = commas = position = 0
    while found := _NEXT.match(text, position):
        if found.end() - position > max_gap:
            raise TooMuch(f"a text of more than {max_gap} bytes")
        position = found.end()
        if text[position - 1] == ord(","):
            commas += 1
        else:
            containers += 1
        if containers > max_containers:
            raise TooMuch(f"more than {max_containers} objects and lists")
        if commas + containers > max_values:
            raise TooMuch(f"more than {max_values} values")
    end = max(text.rfind(b"]"), text.rfind(b"}"))  # after it are spaces, or what no parser reads
    if (end if end >= position else len(text)) - position > max_gap:
        raise TooMuch(f"a text of more than {max_gap} bytes")
