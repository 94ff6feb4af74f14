"""Where a redirect of the storage may lead."""

from __future__ import annotations

import pytest

from ncr_upload.domain.redirects import (
    MAX_REDIRECTS,
    RedirectRefused,
    RedirectRules,
    Target,
    parse_allowed_host,
    parse_origin,
)

ENDPOINT = "https://s3.example.com"


def follow(location: str, *, endpoint: str = ENDPOINT, allowed: str = "", so_far: int = 0) -> str:
    """Return the URL that is asked next."""
    origin = parse_origin(endpoint)
    rules = RedirectRules(origin, [parse_allowed_host(entry) for entry in allowed.split(",") if entry])
    target = rules.next_target(location, Target(origin, "/studio/a/b.glb?x=1"), so_far)
    return f"{target.origin}{target.path}"


@pytest.mark.parametrize(
    ("location", "asked"),
    [
        ("https://s3.example.com/other", "https://s3.example.com/other"),
        ("https://S3.Example.COM./other", "https://s3.example.com/other"),
        ("https://s3.example.com:443/other", "https://s3.example.com/other"),
        ("https://studio.s3.example.com/a/b.glb", "https://studio.s3.example.com/a/b.glb"),
        ("https://a.b.s3.example.com", "https://a.b.s3.example.com/"),
        ("//studio.s3.example.com/x", "https://studio.s3.example.com/x"),
        ("/other?y=2", "https://s3.example.com/other?y=2"),
        ("c.glb", "https://s3.example.com/studio/a/c.glb"),
        ("?y=2", "https://s3.example.com/studio/a/b.glb?y=2"),
        ("/\xfc", "https://s3.example.com/%FC"),
    ],
)
def test_the_own_host_and_its_subdomains_are_followed(location: str, asked: str) -> None:
    assert follow(location) == asked


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://elsewhere.example.org/x", "elsewhere.example.org"),
        ("https://evil-s3.example.com/x", "evil-s3.example.com"),
        ("https://evils3.example.com/x", "evils3.example.com"),
        ("https://s3.example.com.evil.org/x", "s3.example.com.evil.org"),
        ("https://example.com/x", "example.com"),
        ("https://s3.example.com@evil.org/x", "evil.org"),
        ("https://key:secret@s3.example.com/x", "s3.example.com"),
        ("http://s3.example.com/x", "s3.example.com"),
        ("http://studio.s3.example.com/x", "studio.s3.example.com"),
        ("https://s3.example.com:8443/x", "s3.example.com:8443"),
        ("https://studio.s3.example.com:22/x", "studio.s3.example.com:22"),
        ("https://127.0.0.1/x", "127.0.0.1"),
        ("http://169.254.169.254/latest/meta-data", "169.254.169.254"),
        ("https://[::1]/x", "::1"),
        ("https://[fe80::1%25eth0]/x", "fe80::1%25eth0"),
        ("https://[::ffff:127.0.0.1]/x", "::ffff:127.0.0.1"),
        ("https://2130706433/x", "2130706433"),
        ("https://0x7f.1/x", "0x7f.1"),
        ("ftp://s3.example.com/x", "s3.example.com"),
        ("file:///etc/passwd", ""),
        ("https://s3.example.com\\@evil.org/x", ""),
        ("https://s3.example.com\t/x", ""),
        ("https://s3.example.com:99999/x", ""),
        ("https://[/x", ""),
        (f"https://{'a' * 300}/x", "a" * 120),
    ],
)
def test_every_other_place_is_refused_by_name(location: str, shown: str) -> None:
    with pytest.raises(RedirectRefused) as caught:
        follow(location)
    assert caught.value.pointed_to == shown
    assert caught.value.reason


def test_an_address_has_no_subdomains() -> None:
    assert follow("/x", endpoint="http://10.0.0.5:9000") == "http://10.0.0.5:9000/x"
    for host in ("evil.10.0.0.5:9000", "10.0.0.6:9000", "10.0.0.5", "10.0.0.5:9001"):
        with pytest.raises(RedirectRefused):
            follow(f"http://{host}/x", endpoint="http://10.0.0.5:9000")


def test_an_ipv6_endpoint_is_compared_by_its_address() -> None:
    assert follow("http://[0:0:0::1]:9000/x", endpoint="http://[::1]:9000") == "http://[::1]:9000/x"


def test_the_own_host_may_move_from_http_to_https() -> None:
    assert follow("https://s3.example.com/x", endpoint="http://s3.example.com") == "https://s3.example.com/x"
    with pytest.raises(RedirectRefused):
        follow("https://s3.example.com/x", endpoint="http://s3.example.com:9000")


@pytest.mark.parametrize(
    ("allowed", "location"),
    [
        ("cdn.example.org", "https://cdn.example.org:8443/x"),
        ("cdn.example.org:8443", "https://cdn.example.org:8443/x"),
        ("CDN.Example.org.", "https://cdn.example.org/x"),
        ("*.example.org", "https://node-7.example.org/x"),
        ("a.example,cdn.example.org", "https://cdn.example.org/x"),
        ("[::1]:9000", "https://[::1]:9000/x"),
        ("::1", "https://[::1]/x"),
        ("s3.example.com", "https://s3.example.com:8443/x"),
    ],
)
def test_a_host_that_the_settings_name_is_followed(allowed: str, location: str) -> None:
    assert follow(location, allowed=allowed) == location


@pytest.mark.parametrize(
    ("allowed", "location"),
    [
        ("cdn.example.org", "http://cdn.example.org/x"),
        ("cdn.example.org", "https://a.cdn.example.org/x"),
        ("cdn.example.org:8443", "https://cdn.example.org/x"),
        ("*.example.org", "https://example.org/x"),
        ("*.example.org", "https://evilexample.org/x"),
    ],
)
def test_a_named_host_allows_neither_others_nor_plain_http_after_https(allowed: str, location: str) -> None:
    with pytest.raises(RedirectRefused):
        follow(location, allowed=allowed)


def test_redirects_end() -> None:
    assert follow("/x", so_far=MAX_REDIRECTS - 1)
    with pytest.raises(RedirectRefused) as caught:
        follow("/x", so_far=MAX_REDIRECTS)
    assert str(MAX_REDIRECTS) in caught.value.reason


def test_only_the_endpoint_is_given_a_signature() -> None:
    rules = RedirectRules(parse_origin(ENDPOINT), [parse_allowed_host("cdn.example.org")])
    assert rules.is_endpoint(parse_origin("https://s3.example.com:443/x"))
    for url in ("https://studio.s3.example.com", "https://cdn.example.org", "https://s3.example.com:8443"):
        assert not rules.is_endpoint(parse_origin(url))


@pytest.mark.parametrize(
    "entry",
    [
        "https://cdn.example.org",
        "cdn.example.org/path",
        "*",
        "*.",
        "a b",
        "user@host",
        "host:0",
        "host:port",
        "a..b",
        "-",
        "*.10.0.0.1",
        "x" * 300,
    ],
)
def test_what_is_no_host_is_refused_when_the_settings_are_read(entry: str) -> None:
    with pytest.raises(ValueError, match="is not a valid host"):
        parse_allowed_host(entry)
