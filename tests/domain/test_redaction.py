"""A secret is found in every form in which a part may send it back, and what is not free text stays exact."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterator
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import Problem
from ncr_upload.domain.redaction import HIDDEN, NO_SECRETS, Redactor
from ncr_upload.domain.text import MESSAGE, Limit, bound_text

SECRETS = (
    "plainsecret0001",
    'wJalr/XUtn+FEMI"K7MDENG',
    "p@ss#w?rd/%x y&z",
    "back\\slash'quote<tag>",
    "schlüssel-é-😀-ende",
    "12345678",
    "abababab",
)
CHARACTERS = st.sampled_from("abXY019-_.~@:/?#%&+=!\\\"'<> é😀")


def forms_of(secret: str) -> Iterator[str]:
    yield secret
    for escaped in (quote(secret), quote(secret, safe=""), quote_plus(secret), quote(quote(secret, safe=""), safe="")):
        yield escaped
        yield re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), escaped)
    yield from (json.dumps(secret), json.dumps(secret, ensure_ascii=False), json.dumps(json.dumps(secret)), repr(secret))
    yield html.escape(secret)
    yield secret.encode().decode("latin-1")
    for before in ("", "u", "us", "user:"):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            for encoded in (
                encode(f"{before}{secret}".encode()).decode(),
                encode(f"{before}{secret}, and more".encode()).decode(),
            ):
                yield encoded
                yield encoded.rstrip("=")
                yield quote(encoded, safe="")


@pytest.mark.parametrize("secret", SECRETS)
def test_every_form_of_a_secret_is_hidden(secret: str) -> None:
    redactor = Redactor(SECRETS)
    for form in forms_of(secret):
        shown = redactor.redact(f"it said ({form})!")
        assert HIDDEN in shown, form
        assert secret not in shown
        assert form not in shown
        assert not any(secret[at : at + 6] in shown for at in range(len(secret) - 5))


@given(st.text(CHARACTERS, min_size=8, max_size=40).filter(lambda s: len(s.strip()) >= 8), st.data())
def test_no_secret_is_left_wherever_it_stands(secret: str, data: st.DataObject) -> None:
    secret = secret.strip()
    form = data.draw(st.sampled_from(list(forms_of(secret))))
    before, after = data.draw(st.text(CHARACTERS, max_size=30)), data.draw(st.text(CHARACTERS, max_size=30))
    redactor = Redactor([secret])
    shown = redactor.redact(f"{before} {form} {after}")
    assert secret not in shown
    assert form not in shown
    assert redactor.redact(shown) == shown


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_that_a_cut_goes_through_is_not_shown_in_part(secret: str) -> None:
    redactor = Redactor(SECRETS)
    for characters in range(40, 120):
        text = "x" * 50 + secret + "y" * 1_000_000
        for shown in (
            redactor.redact(bound_text(text, Limit(characters, 4 * characters))),
            redactor.bound(text, Limit(characters, 4 * characters)),
        ):
            assert secret[:4] not in shown, (characters, shown)


@given(st.text(CHARACTERS, max_size=200), st.integers(1, 60), st.sampled_from(SECRETS))
def test_bounding_with_secrets_keeps_to_the_limit_and_shows_none(text: str, characters: int, secret: str) -> None:
    limit = Limit(characters, 2 * characters + 4)
    shown = Redactor(SECRETS).bound(text + secret + text, limit)
    assert len(shown) <= limit.characters
    assert len(shown.encode()) <= limit.bytes
    assert secret[:8] not in shown


@given(st.text(max_size=300))
def test_without_secrets_nothing_changes(text: str) -> None:
    assert NO_SECRETS.redact(text) == text
    assert Redactor(["short", "", "       "]).redact(text) == text


def test_of_megabytes_only_the_beginning_is_searched() -> None:
    class Counting(str):
        asked = 0

        def __getitem__(self, key: object) -> str:
            assert isinstance(key, slice)
            Counting.asked = max(Counting.asked, key.stop)
            return super().__getitem__(key)

    redactor = Redactor(SECRETS)
    shown = redactor.bound(Counting("plainsecret0001 " * 500_000), MESSAGE)
    assert Counting.asked < 3 * MESSAGE.characters
    assert "plain" not in shown
    assert shown.endswith("(8,000,000 characters in all)")


def test_a_place_is_looked_at_once_also_where_every_place_looks_like_a_secret() -> None:
    """The search goes on behind each place that was looked at, and no pattern repeats without a bound: so it is linear."""
    for form in Redactor(SECRETS)._forms:
        plain = re.sub(r"\\.|\[[^\]]*\]", "", form._whole.pattern)
        assert not re.search(r"[*+]|,\}", plain), plain


def test_json_keeps_its_form() -> None:
    answer = {"key plainsecret0001": ["12345678", 12345678, True, None, 1.5], "result": "Valid"}
    assert Redactor(SECRETS).redact_json(answer) == {"key ***": ["***", "***", True, None, 1.5], "result": "Valid"}


def test_the_words_of_a_problem_are_redacted_and_its_code_is_not() -> None:
    redactor = Redactor(["object_missing"])
    problem = redactor.redact_problem(Problem("object_missing", "rejected", "it said object_missing", "ask for object_missing"))
    assert (problem.code, problem.message, problem.next_step) == ("object_missing", "it said ***", "ask for ***")
    error = redactor.redact_error(Unavailable("object_missing", "it said object_missing", "none"))
    assert (error.code, error.message, error.args) == ("object_missing", "it said ***", ("it said ***",))
