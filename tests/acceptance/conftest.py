"""The whole stack, started as a person would, once for each module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from running_stack import RunningStack, run_stack


@pytest.fixture(scope="module")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """Run `ncr dev` with the module's `STACK_ENVIRONMENT`, in which `{folder}` is the stack's folder, and `STACK_ENV_FILE`."""
    folder = tmp_path_factory.mktemp("stack")
    settings: dict[str, str] = getattr(request.module, "STACK_ENVIRONMENT", {})
    if hasattr(request.module, "STACK_ENV_FILE"):
        (folder / ".env").write_text(request.module.STACK_ENV_FILE)
    with run_stack(folder, environment={name: value.format(folder=folder) for name, value in settings.items()}) as started:
        yield started
