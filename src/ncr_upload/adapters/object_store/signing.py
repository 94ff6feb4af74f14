"""Sign requests without a body by AWS Signature Version 4, in headers.

A signature in headers lets the server say that the clock is off (`RequestTimeTooSkewed`); one in the URL would only be expired.
"""

from __future__ import annotations

import hashlib
import hmac
from datetime import UTC, datetime
from urllib.parse import parse_qsl, quote, unquote

EMPTY_SHA256 = hashlib.sha256().hexdigest()
_UNRESERVED = "-_.~"


class Signer:
    """Signs for one access key, region and service. Safe to use from several threads."""

    def __init__(self, access_key: str, secret_key: str, region: str) -> None:
        self._access_key = access_key
        self._secret_key = secret_key
        self._region = region
        self._daily: tuple[str, bytes] = ("", b"")

    def headers(self, method: str, host_header: str, path: str, now: datetime | None = None) -> dict[str, str]:
        """Return the headers to add to a request for `path` (query included) of a server called `host_header`."""
        time = (now or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
        signed = {"host": host_header, "x-amz-content-sha256": EMPTY_SHA256, "x-amz-date": time}
        raw_path, _, query = path.partition("?")
        names = "host;x-amz-content-sha256;x-amz-date"
        canonical = (
            f"{method}\n{quote(unquote(raw_path), safe='/' + _UNRESERVED)}\n{_canonical_query(query) if query else ''}\n"
            f"host:{host_header}\nx-amz-content-sha256:{EMPTY_SHA256}\nx-amz-date:{time}\n\n{names}\n{EMPTY_SHA256}"
        )
        scope = f"{time[:8]}/{self._region}/s3/aws4_request"
        to_sign = "\n".join(["AWS4-HMAC-SHA256", time, scope, hashlib.sha256(canonical.encode()).hexdigest()])
        signature = hmac.digest(self._key(time[:8]), to_sign.encode(), "sha256").hex()
        credential = f"AWS4-HMAC-SHA256 Credential={self._access_key}/{scope}"
        return {**signed, "authorization": f"{credential}, SignedHeaders={names}, Signature={signature}"}

    def _key(self, day: str) -> bytes:
        known_day, key = self._daily
        if known_day != day:
            key = f"AWS4{self._secret_key}".encode()
            for part in (day, self._region, "s3", "aws4_request"):
                key = hmac.digest(key, part.encode(), "sha256")
            self._daily = (day, key)
        return key


def _canonical_query(query: str) -> str:
    pairs = parse_qsl(query, keep_blank_values=True)
    return "&".join(sorted(f"{quote(name, safe=_UNRESERVED)}={quote(value, safe=_UNRESERVED)}" for name, value in pairs))
