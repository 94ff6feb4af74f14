"""Asks the outside parts whether they work, for `/health?deep=true`. Each answers within a few seconds and moves nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx

from ncr_upload.application.api_ports import Probe
from ncr_upload.application.ports import Dropoff, ObjectStore
from ncr_upload.domain.errors import Rejected, Unavailable

PROBE_SECONDS = 2.0
PROBE_KEY = ".ncr-probe"


def probe_store(store: ObjectStore) -> Probe:
    """Asks for an object that need not exist: a denied or missing bucket shows all the same."""

    async def ask() -> None:
        try:
            await store.stat(PROBE_KEY)
        except Rejected as answer:
            if answer.code != "object_missing":
                raise

    return _bounded("s3", ask)


def probe_dropoff(dropoff: Dropoff) -> Probe:
    """Logs in, with the host key pinned, and out again."""

    async def ask() -> None:
        async with dropoff.session():
            pass

    return _bounded("sftp", ask)


def probe_validator(url: str) -> Probe:
    """Whether anything speaks HTTP there; no package is sent."""

    async def ask() -> None:
        try:
            async with httpx.AsyncClient(timeout=PROBE_SECONDS, trust_env=False) as client:
                await client.head(url)
        except httpx.HTTPError as error:
            raise Unavailable(
                "validator_unreachable",
                f"the validator does not answer: {type(error).__name__}",
                "Check VALIDATOR_API_URL and that the validator runs.",
            ) from error

    return _bounded("validator", ask)


def _bounded(part: str, ask: Callable[[], Awaitable[None]]) -> Probe:
    def probe() -> None:
        async def within() -> None:
            await asyncio.wait_for(ask(), PROBE_SECONDS)

        try:
            asyncio.run(within())
        except TimeoutError as error:
            raise Unavailable(
                f"{part}_timeout",
                f"{part} did not answer within {PROBE_SECONDS:g} s",
                f"Check that {part} runs and is reachable.",
            ) from error

    return probe
