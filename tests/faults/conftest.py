"""The parts that are not ours, for each module of faults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from installation import Outside, start_outside


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    with start_outside(tmp_path_factory.mktemp("outside")) as started:
        yield started
