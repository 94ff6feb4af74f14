"""What a running stack tells the outside: where each part is, how to log in, and its process id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from ncr_upload.entrypoints.embedded.credentials import write_private
from ncr_upload.entrypoints.embedded.parts import BUCKET, PART_NAMES, SFTP_USERNAME, Site
from ncr_upload.entrypoints.embedded.sockets import LOOPBACK


class Located(TypedDict):
    url: str


class Keyed(TypedDict):
    url: str
    key: str


class Bucket(TypedDict):
    endpoint: str
    access_key: str
    secret_key: str
    bucket: str


class Login(TypedDict):
    """`root` is the local folder that the login sees as `/`."""

    host: str
    port: int
    username: str
    password: str
    host_key: str
    root: str


class Endpoints(TypedDict):
    """Wire format: the JSON of `ncr dev --endpoints`."""

    api: Keyed
    database: Located
    redis: Located
    s3: Bucket
    sftp: Login
    validator: Keyed
    pids: dict[str, int]


def locate_bucket(site: Site) -> Bucket:
    return {
        "endpoint": site.url("s3"),
        "access_key": site.credentials.s3_access_key,
        "secret_key": site.credentials.s3_secret_key,
        "bucket": BUCKET,
    }


def describe(site: Site, pids: Mapping[str, int]) -> Endpoints:
    secret = site.credentials
    return {
        "api": {"url": site.url("api"), "key": secret.api_key},
        "database": {"url": site.database_url},
        "redis": {"url": f"redis://:{secret.redis_password}@{LOOPBACK}:{site.ports['redis']}/0"},
        "s3": locate_bucket(site),
        "sftp": {
            "host": LOOPBACK,
            "port": site.ports["sftp"],
            "username": SFTP_USERNAME,
            "password": secret.sftp_password,
            "host_key": site.host_key,
            "root": str(site.sftp_root),
        },
        "validator": {"url": f"{site.url('validator')}/validate", "key": secret.validator_key},
        "pids": {name: pids[name] for name in PART_NAMES},
    }


def write_endpoints(path: Path, endpoints: Endpoints) -> None:
    """Replace the file at once (mode 0600: it holds every secret of the stack)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_private(path, json.dumps(endpoints, indent=2) + "\n")


def read_endpoints(path: Path) -> Endpoints:
    endpoints: Endpoints = json.loads(path.read_text())
    return endpoints
