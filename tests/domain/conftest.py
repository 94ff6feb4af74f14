"""Hypothesis without its deadline: the machine that runs the tests may be busy, and speed is measured elsewhere."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
