"""Asks the outside parts whether they work, for `/health?deep=true` and `ncr doctor`. Each answers within its time and leaves
nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx

from ncr_upload.application.api_ports import Probe
from ncr_upload.application.ports import Dropoff, ObjectStore
from ncr_upload.domain.errors import Rejected, Unavailable

PROBE_SECONDS = 2.0
PROBE_KEY = ".ncr-probe"
T = TypeVar("T")


def probe_store(store: ObjectStore, seconds: float = PROBE_SECONDS) -> Probe:
    """Asks for an object that need not exist: a denied or missing bucket shows all the same."""

    async def ask() -> None:
        try:
            await store.stat(PROBE_KEY)
        except Rejected as answer:
            if answer.code != "object_missing":
                raise

    return bounded("s3", ask, seconds)


def probe_dropoff(dropoff: Dropoff) -> Probe:
    """Logs in, with the host key pinned, and out again."""

    async def ask() -> None:
        async with dropoff.session():
            pass

    return bounded("sftp", ask)


def probe_validator(url: str, headers: dict[str, str] | None = None, seconds: float = PROBE_SECONDS) -> Callable[[], int]:
    """Whether anything speaks HTTP there; no package is sent. With `headers` (the key) it is asked to judge nothing, which
    tells whether it takes the key: the answer is its HTTP status."""

    async def ask() -> int:
        try:
            async with httpx.AsyncClient(timeout=seconds, trust_env=False) as client:
                answer = await (client.post(f"{url.rstrip('/')}/ncr-doctor", headers=headers) if headers else client.head(url))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(
                "validator_unreachable",
                f"the validator does not answer: {type(error).__name__}",
                "Check VALIDATOR_API_URL and that the validator runs.",
            ) from error
        return answer.status_code

    return bounded("validator", ask, seconds)


def bounded(part: str, ask: Callable[[], Awaitable[T]], seconds: float = PROBE_SECONDS) -> Callable[[], T]:
    """A blocking call of `ask` that takes no longer than that. Raises `Unavailable` when it would."""

    def probe() -> T:
        async def within() -> T:
            return await asyncio.wait_for(ask(), seconds)

        try:
            return asyncio.run(within())
        except TimeoutError as error:
            raise Unavailable(
                f"{part}_timeout",
                f"{part} did not answer within {seconds:g} s",
                f"Check that {part} runs and is reachable.",
            ) from error

    return probe
