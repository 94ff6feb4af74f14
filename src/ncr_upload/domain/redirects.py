"""Decide whether a redirect of the storage may be followed: pure rules on URLs, nothing is resolved or connected.

A host is compared by its name, not by its address, which may change between the check and the connection.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

MAX_REDIRECTS = 5
SHOWN_CHARACTERS = 120
DEFAULT_PORTS = {"http": 80, "https": 443}
_HOST_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*", re.ASCII)
_UNSAFE = re.compile(r"[\x00-\x20\x7f\\]")


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port of a URL; the host in lower case, an IPv6 address without brackets."""

    scheme: str
    host: str
    port: int

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host_header}"


@dataclass(frozen=True, slots=True)
class Target:
    """One request's address. `path` includes the query."""

    origin: Origin
    path: str


class RedirectRefused(Exception):
    """A redirect that must not be followed. `pointed_to` is its host, bounded and printable; empty when it has none."""

    def __init__(self, reason: str, pointed_to: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.pointed_to = pointed_to


@dataclass(frozen=True, slots=True)
class AllowedHost:
    """An entry of S3_REDIRECT_HOSTS. Without a port every port is allowed."""

    host: str
    port: int | None = None
    with_subdomains: bool = False

    def matches(self, origin: Origin) -> bool:
        if self.port is not None and self.port != origin.port:
            return False
        if self.with_subdomains:
            return is_subdomain(origin.host, self.host)
        return origin.host == self.host


def parse_allowed_host(entry: str) -> AllowedHost:
    """Read one entry of S3_REDIRECT_HOSTS: `host`, `host:port` or `*.host`. Raises `ValueError`."""
    with_subdomains = entry.startswith("*.")
    text = entry[2:] if with_subdomains else entry
    try:
        if _UNSAFE.search(text) or any(mark in text for mark in "/@?#*"):
            raise ValueError
        if text.count(":") > 1 and not text.startswith("["):
            text = f"[{text}]"
        parts = urlsplit(f"//{text}")
        host, port = normalize_host(parts.hostname or ""), parts.port
        if port == 0 or (with_subdomains and _is_address(host)):
            raise ValueError
    except ValueError:
        example = "write a host name, host:port or *.host, such as objects.example.com"
        raise ValueError(f"'{entry[:SHOWN_CHARACTERS]}' is not a valid host: {example}") from None
    return AllowedHost(host, port, with_subdomains)


class RedirectRules:
    """Allow the endpoint's own host and its subdomains, at the endpoint's port, and the `allowed` hosts. Never from https to
    http. The own host is allowed to move from http at port 80 to https at port 443."""

    def __init__(self, endpoint: Origin, allowed: Iterable[AllowedHost] = ()) -> None:
        self._endpoint = endpoint
        self._allowed = tuple(allowed)

    def next_target(self, location: str, current: Target, redirects_so_far: int) -> Target:
        """Resolve a Location against the URL that answered it. Raises `RedirectRefused`."""
        target, shown = _parse_location(location, current)
        if redirects_so_far >= MAX_REDIRECTS:
            raise RedirectRefused(f"it redirects more than {MAX_REDIRECTS} times", shown)
        if current.origin.scheme == "https" and target.origin.scheme != "https":
            raise RedirectRefused("the redirect leaves https", shown)
        if not self._allows(target.origin):
            raise RedirectRefused("the redirect leads to another host", shown)
        return target

    def is_endpoint(self, origin: Origin) -> bool:
        """Return whether requests to this origin may be signed with the access key."""
        return origin.host == self._endpoint.host and self._has_own_port(origin)

    def _allows(self, origin: Origin) -> bool:
        if any(allowed.matches(origin) for allowed in self._allowed):
            return True
        is_own = origin.host == self._endpoint.host or is_subdomain(origin.host, self._endpoint.host)
        return is_own and self._has_own_port(origin)

    def _has_own_port(self, origin: Origin) -> bool:
        own = self._endpoint
        is_upgrade = (own.scheme, own.port, origin.scheme, origin.port) == ("http", 80, "https", 443)
        return (origin.scheme, origin.port) == (own.scheme, own.port) or is_upgrade


def is_subdomain(host: str, parent: str) -> bool:
    return not _is_address(parent) and host.endswith(f".{parent}")


def parse_origin(url: str) -> Origin:
    """Return scheme, host and port of a full URL. Raises `ValueError`."""
    return _origin_of(urlsplit(url))


def normalize_host(host: str) -> str:
    """Return the host in lower case, without the trailing dot; an address in its canonical form. Raises `ValueError`."""
    host = host.lower().removesuffix(".")
    if ":" in host:
        return str(ipaddress.IPv6Address(host)) if "%" not in host else _refuse_host()
    if not _HOST_NAME.fullmatch(host):
        _refuse_host()
    return host


def _refuse_host() -> str:
    raise ValueError("not a valid host")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _origin_of(parts: SplitResult) -> Origin:
    if parts.scheme not in DEFAULT_PORTS:
        raise ValueError("neither http nor https")
    port = parts.port
    return Origin(parts.scheme, normalize_host(parts.hostname or ""), DEFAULT_PORTS[parts.scheme] if port is None else port)


def _parse_location(location: str, current: Target) -> tuple[Target, str]:
    """Return the target and its host as it may be shown."""
    if _UNSAFE.search(location):
        raise RedirectRefused("the redirect's address is not a valid URL")
    url = quote(location, safe="%/:=&?~#+!$,;'@()*[]", encoding="latin-1", errors="replace")
    try:
        parts = urlsplit(urljoin(f"{current.origin}{current.path}", url))
        shown = (parts.hostname or "")[:SHOWN_CHARACTERS]
        if parts.port is not None:
            shown += f":{parts.port}"
    except ValueError:
        raise RedirectRefused("the redirect's address is not a valid URL") from None
    if "@" in parts.netloc:
        raise RedirectRefused("the redirect's address holds a login", shown)
    try:
        origin = _origin_of(parts)
    except ValueError:
        raise RedirectRefused("the redirect's address is not a valid http URL", shown) from None
    return Target(origin, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")), shown
