"""How a worker process learns that it is to be stopped and must hand its job over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Leaving:
    """Said once, for good. `say` may be called from a signal handler."""

    def __init__(self) -> None:
        self._said = False
        self._tell: Callable[[], None] = _nobody_listens

    @property
    def said(self) -> bool:
        """Whether no further job may be begun here."""
        return self._said

    def say(self) -> None:
        self._said = True
        self._tell()

    @contextmanager
    def heard_by(self, tell: Callable[[], None]) -> Iterator[None]:
        """Call `tell` when it is said, or at once if it has been."""
        self._tell = tell
        try:
            if self._said:
                tell()
            yield
        finally:
            self._tell = _nobody_listens


def _nobody_listens() -> None:
    """No job runs here now."""
