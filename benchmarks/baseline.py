"""The plain way, as a baseline: one thing after the other with the usual libraries, as a script of an afternoon would.

boto3 fetches each file to disk, zipfile deflates them, requests posts the zip to the validator, paramiko puts each file. No
ledger, no resume, no staging, no hashes. Reads where everything is as JSON from standard input, prints {"wall_seconds",
"cpu_seconds"} of the job itself: its imports are not counted.
"""

from __future__ import annotations

import json
import os
import posixpath
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import boto3
import paramiko
import requests
from botocore.config import Config


def deliver(place: dict[str, Any], folder: Path) -> None:
    store = boto3.client(
        "s3",
        endpoint_url=place["s3_endpoint"],
        region_name="us-east-1",
        aws_access_key_id=place["access_key"],
        aws_secret_access_key=place["secret_key"],
        config=Config(s3={"addressing_style": "path"}),
    )
    for key in place["keys"]:
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        store.download_file(place["bucket"], key, str(path))
    archive = folder / "package.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for key in place["keys"]:
            file.write(folder / key, key)
    with archive.open("rb") as body:
        answer = requests.post(place["validator_url"], files={"zip_file": body}, timeout=600)
    assert answer.json()["data"][0]["result"] == "Valid"
    upload(place, folder)


def upload(place: dict[str, Any], folder: Path) -> None:
    with paramiko.SSHClient() as connection:
        connection.load_host_keys(place["known_hosts"])
        connection.connect(
            place["sftp_host"],
            place["sftp_port"],
            place["username"],
            key_filename=place["key_file"],
            look_for_keys=False,
            allow_agent=False,
        )
        with connection.open_sftp() as sftp:
            made: set[str] = set()
            for key in place["keys"]:
                target = posixpath.join(place["into"], key)
                for parent in reversed(Path(target).relative_to(place["base_dir"]).parents[:-1]):
                    full = posixpath.join(place["base_dir"], str(parent))
                    if full not in made:
                        sftp.mkdir(full)
                        made.add(full)
                sftp.put(str(folder / key), target)


def main() -> None:
    place = json.load(sys.stdin)
    os.environ["NO_PROXY"] = "127.0.0.1,localhost"
    with tempfile.TemporaryDirectory(dir=place["work_dir"]) as folder:
        began, used = time.perf_counter(), time.process_time()
        deliver(place, Path(folder))
        print(json.dumps({"wall_seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}))


if __name__ == "__main__":
    main()
