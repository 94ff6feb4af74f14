"""Takes the secrets of this installation out of free text, in every form in which a part may send them back.

Only free text goes through here: messages, reasons, a validator's answer, log lines. Keys, paths and manifests stay exact.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from ncr_upload.domain.errors import DeliveryError
from ncr_upload.domain.jobs import Problem
from ncr_upload.domain.text import CUT, Limit, bound_text

HIDDEN = "***"
SHORTEST_SECRET = 8
"""Shorter ones are words: to hide each of them would tell more than it hides."""

SHORTEST_BEGINNING = 4
SHORTEST_ENDING = 6
"""So much of a secret is hidden where a text was cut off within it: before the mark of a cut, and at the text's very end."""

_BASE64 = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_")
_LONGEST_FORM = 64
"""Of one character or run of spaces: what a pattern of `_forms_of` matches is no longer."""


class Redactor:
    """Knows the secrets, and hides them. It finds each one plain, as a URL, JSON, HTML or Python writes it, and in base64, also
    within a longer encoded text such as ``user:password``. Without secrets it changes nothing."""

    def __init__(self, secrets: Iterable[str] = (), *, shortest: int = SHORTEST_SECRET) -> None:
        plain = {secret.strip() for secret in secrets}
        known = sorted({secret for secret in plain if len(secret) >= shortest}, key=lambda secret: (-len(secret), secret))
        self._forms = [_Form(form, in_base64) for secret in known for form, in_base64 in _encoded(secret)]
        self._margin = max((form.longest for form in self._forms), default=0)

    def redact(self, text: str) -> str:
        """Return `text` with every secret replaced. Where the text was cut off within a secret, its beginning goes too."""
        while spans := self._find(text):
            shorter = "".join(_between(text, spans))
            if len(shorter) >= len(text):
                return shorter
            text = shorter
        return text

    def bound(self, text: str, limit: Limit) -> str:
        """Return `text` without secrets and within `limit`. Of a long text only the beginning is searched."""
        if not self._forms:
            return bound_text(text, limit)
        room = limit.characters + 1
        if len(text) <= room + self._margin:
            return bound_text(self.redact(text), limit)
        shown = self.redact(text[: room + self._margin])
        return bound_text(shown[: -self._margin], limit, characters_in_all=len(text))

    def redact_problem(self, problem: Problem) -> Problem:
        """Return the problem without secrets in its words."""
        return replace(problem, message=self.redact(problem.message), next_step=self.redact(problem.next_step))

    def redact_error(self, error: DeliveryError) -> DeliveryError:
        """Take the secrets out of the words of this very error, which is returned."""
        error.message, error.next_step = self.redact(error.message), self.redact(error.next_step)
        error.args = (error.message,)
        return error

    def redact_json(self, value: Any) -> Any:
        """Return what `json.loads` gave with the secrets taken out of its texts, names and numbers."""
        match value:
            case str():
                return self.redact(value)
            case list():
                return [self.redact_json(each) for each in value]
            case dict():
                return {self.redact(name): self.redact_json(each) for name, each in value.items()}
            case int() | float() if not isinstance(value, bool):
                return HIDDEN if self._find(str(value)) else value
            case _:
                return value

    def _find(self, text: str) -> list[tuple[int, int]]:
        found = [span for form in self._forms for span in form.find(text)]
        return _merged(found)


class _Form:
    """One way in which a secret is written."""

    def __init__(self, text: str, in_base64: bool) -> None:
        forms = [_form_of_base64(each) for each in text] if in_base64 else list(_forms_of(text))
        self.longest = _LONGEST_FORM * len(text)
        self._in_base64 = in_base64
        self._whole = re.compile("".join(forms))
        self._head = re.compile("".join(forms[:SHORTEST_BEGINNING]))
        self._each = [re.compile(form) for form in forms]

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield where it stands. Each place is looked at once, for no longer than the form itself can be."""
        at = 0
        while head := self._head.search(text, at):
            start = head.start()
            if whole := self._whole.match(text, start):
                yield self._widened(text, start, whole.end())
            else:
                end = self._follow(text, start)
                if text.startswith(CUT, end) or (end == len(text) and end - start >= SHORTEST_ENDING):
                    yield start, end
            at = start + 1

    def _follow(self, text: str, at: int) -> int:
        """Where the text stops being the secret."""
        for each in self._each:
            found = each.match(text, at)
            if found is None:
                break
            at = found.end()
        return at

    def _widened(self, text: str, start: int, end: int) -> tuple[int, int]:
        """With the characters around it that hold a few of its bits, and the padding."""
        if self._in_base64:
            start -= start > 0 and text[start - 1] in _BASE64
            end += end < len(text) and text[end] in _BASE64
            while end < len(text) and text[end] == "=":
                end += 1
        return start, end


NO_SECRETS = Redactor()


def _encoded(secret: str) -> Iterator[tuple[str, bool]]:
    """The secret itself, and the part of its base64 that does not depend on what is around it, for each place it may have in
    three bytes."""
    yield secret, False
    for plain in sorted({secret.encode("utf-8", "replace"), secret.encode("latin-1", "replace")}):
        for before in range(3):
            encoded = base64.b64encode(bytes(before) + plain).decode()
            yield encoded[-(-8 * before // 6) : 8 * (before + len(plain)) // 6], True


def _forms_of(secret: str) -> Iterator[str]:
    """A pattern for each character, and one for each run of white space."""
    for run in re.findall(r"\s+|\S", secret):
        yield r"(?:[\s+\ufffd]|%(?:25)?20|%(?:25)?0[9ADad]|\\{1,4}[nrt]){1,8}" if run.isspace() else _form_of(run)


def _form_of(character: str) -> str:
    """As it is, as a URL writes it (once or twice), and as JSON, HTML, Python or a shell escape it."""
    if character.isascii() and (character.isalnum() or character in "-_.~"):
        return re.escape(character)
    code, point = ord(character), f"{ord(character):x}"
    forms = [rf"\\{{0,4}}{re.escape(character)}", rf"&#(?:{code}|x0?{point});", rf"\\{{1,4}}u0{{0,4}}{point}"]
    forms += [_percent(character.encode("utf-8", "replace"))]
    if code < 0x100:
        forms += [rf"\\{{1,4}}x{code:02x}", _percent(bytes([code]))]
    if code > 0xFFFF:
        high, low = 0xD800 + (code - 0x10000 >> 10), 0xDC00 + (code - 0x10000 & 0x3FF)
        forms += [rf"\\{{1,4}}u{high:x}\\{{1,4}}u{low:x}", rf"\\{{1,4}}U0{{0,4}}{point}"]
    if not character.isascii():  # read in another charset than it was written in
        misread = character.encode("utf-8", "replace").decode("latin-1")
        forms += [re.escape(misread), r"\ufffd{1,4}", r"\?"]
    if character in _HTML:
        forms.append(f"&{_HTML[character]};")
    ordered = sorted(set(forms), key=len, reverse=True)
    return f"(?:{'|'.join(f'(?i:{form})' for form in ordered)})"


_HTML = {"&": "amp", "<": "lt", ">": "gt", '"': "quot", "'": "apos"}


def _percent(encoded: bytes) -> str:
    return "".join(f"%(?:25){{0,2}}{byte:02x}" for byte in encoded)


def _form_of_base64(character: str) -> str:
    match character:
        case "+" | "-":
            return "(?:[+-]|(?i:%(?:25)?2b))"
        case "/" | "_":
            return r"(?:\\{0,4}[/_]|(?i:%(?:25)?2f))"
        case _:
            return re.escape(character)


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _between(text: str, spans: list[tuple[int, int]]) -> Iterator[str]:
    at = 0
    for start, end in spans:
        yield text[at:start]
        yield HIDDEN
        at = end
    yield text[at:]
