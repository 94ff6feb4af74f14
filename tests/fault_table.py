"""The marker that says which fault a test makes and which promises it holds; docs/reliability.md is drawn from it."""

from __future__ import annotations

import pytest

INVARIANTS = {
    "L": "every accepted job ends, once, within a bound",
    "O": "published once, recorded once",
    "P": "the destination never shows a part of a package",
    "S": "SQL is the truth; Redis may be wiped",
    "K": "the previous delivery stays until the new one is seen complete",
    "R": "nothing is left behind",
    "A": "the API answers within 3 s",
    "H": "the history says what happened",
    "B": "what comes from outside is bounded, and holds no secret of ours once it is kept or shown",
}


def fault(name: str, *, injector: str, invariants: str, outcome: str) -> pytest.MarkDecorator:
    """`name`: part and fault (`Redis: frozen`). `injector`: how it is made (`SIGSTOP`). `invariants`: letters of
    `INVARIANTS`. `outcome`: what happens instead of harm, in a few words."""
    if not invariants or not set(invariants) <= set(INVARIANTS):
        raise ValueError(f"{name}: {invariants!r} are not letters of {''.join(INVARIANTS)}")
    return pytest.mark.fault(name, injector=injector, invariants=invariants, outcome=outcome)
