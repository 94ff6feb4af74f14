"""The peers: rclone copying from S3 to SFTP, OpenSSH's `sftp`, and the baseline. Each runs as its users run it, as a process
whose CPU time the kernel adds up."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import DataSet
from parts import require
from place import HERE, Cost, Place, Route

_names = itertools.count(1)


def run_measured(command: Sequence[str], environment: dict[str, str], given: str = "") -> Cost:
    """Wall time of the process, and the CPU time of it and of all it waited for. Raises `RuntimeError` when it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(given)
    process.stdin.close()
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}: {said[-1000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime)


def run_reporting(program: Path, told: dict[str, Any]) -> Cost:
    """Run a program of ours that takes JSON and prints its own cost. Raises `RuntimeError` when it fails."""
    environment = dict(os.environ) | {"NO_PROXY": "127.0.0.1,localhost"}
    done = subprocess.run(
        [sys.executable, str(program)], input=json.dumps(told), capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{program.name} ended with {done.returncode}: {done.stderr[-1000:]}")
    return Cost(**json.loads(done.stdout))


# --- rclone -----------------------------------------------------------------------------------------------------


def rclone_environment(place: Place, route: Route) -> dict[str, str]:
    """Its own defaults, but for what says where things are; and no `md5sum` by a shell at the destination, which a partner's
    SFTP account does not have. So it compares sizes after each file, as we do."""
    login = place.sftp.login
    settings = {
        "SRC_TYPE": "s3",
        "SRC_PROVIDER": "Other",
        "SRC_ENDPOINT": route.s3_endpoint,
        "SRC_ACCESS_KEY_ID": place.s3.access_key,
        "SRC_SECRET_ACCESS_KEY": place.s3.secret_key,
        "DST_TYPE": "sftp",
        "DST_HOST": "127.0.0.1",
        "DST_PORT": str(route.sftp_port),
        "DST_USER": login.username,
        "DST_KEY_FILE": str(login.private_key),
        "DST_KNOWN_HOSTS_FILE": str(write_known_hosts(place, route)),
        "DST_SHELL_TYPE": "none",
        "DST_DISABLE_HASHCHECK": "true",
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RCLONE_"))}
    return environment | {f"RCLONE_CONFIG_{name}": value for name, value in settings.items()} | {"NO_PROXY": "127.0.0.1"}


def write_known_hosts(place: Place, route: Route) -> Path:
    path = place.folder / f"known_hosts-{route.sftp_port}"
    path.write_text(f"[127.0.0.1]:{route.sftp_port} {place.sftp.login.host_key}\n")
    return path


def rclone_copy(place: Place, route: Route, data: DataSet) -> Cost:
    """The data set from the bucket to an empty folder at the destination."""
    into = f"rclone-{data.name}-{next(_names)}"
    source, target = f"src:{place.s3.bucket}/{data.sku}", f"dst:{place.sftp.base_dir}/{into}"
    cost = run_measured([find_rclone(), "copy", "--config", "", source, target], rclone_environment(place, route))
    place.check(into, data)
    place.clear(into)
    return cost


def rclone_upload(place: Place, route: Route, data: DataSet, folder: Path) -> Cost:
    """The same files from this disk."""
    into = f"rclone-{data.name}-{next(_names)}"
    command = [find_rclone(), "copy", "--config", "", str(folder), f"dst:{place.sftp.base_dir}/{into}"]
    cost = run_measured(command, rclone_environment(place, route))
    place.check(into, data)
    place.clear(into)
    return cost


def find_rclone() -> str:
    """Debian's package, or what NCR_BENCH_RCLONE names; else the one that the tests use."""
    return os.environ.get("NCR_BENCH_RCLONE") or shutil.which("rclone", path="/usr/bin:/usr/local/bin") or require("rclone")


def rclone_name() -> str:
    return f"rclone {rclone_version()} copy"


def rclone_version() -> str:
    said = subprocess.run([find_rclone(), "version"], capture_output=True, text=True, check=True).stdout
    return said.split()[1].removeprefix("v").removesuffix("-DEV")


# --- OpenSSH ----------------------------------------------------------------------------------------------------


def openssh_upload(place: Place, route: Route, data: DataSet, folder: Path) -> Cost:
    """`put -r` of the folder by `sftp -b`, with its defaults."""
    into, login = f"openssh-{data.name}-{next(_names)}", place.sftp.login
    batch = place.folder / "batch"
    batch.write_text(f"mkdir {place.sftp.base_dir}/{into}\nput -r {folder} {place.sftp.base_dir}/{into}\n")
    command = [require("sftp"), "-q", "-b", str(batch), "-i", str(login.private_key), "-P", str(route.sftp_port)]
    command += ["-o", f"UserKnownHostsFile={write_known_hosts(place, route)}", "-o", "IdentitiesOnly=yes"]
    cost = run_measured([*command, f"{login.username}@127.0.0.1"], dict(os.environ))
    place.check(into, data)
    place.clear(into)
    return cost


def openssh_name() -> str:
    return f"sftp -b, OpenSSH {openssh_version()}"


def openssh_version() -> str:
    said = subprocess.run([require("ssh"), "-V"], capture_output=True, text=True, check=True).stderr
    found = re.match(r"OpenSSH_(\S+?),? ", said)
    return found[1] if found else said.strip()


# --- the baseline -----------------------------------------------------------------------------------------------


def baseline(place: Place, route: Route, data: DataSet) -> Cost:
    """The whole job by `baseline.py`, without the time that it takes to import its libraries."""
    into, login = f"baseline-{data.name}-{next(_names)}", place.sftp.login
    told = {
        "s3_endpoint": route.s3_endpoint,
        "access_key": place.s3.access_key,
        "secret_key": place.s3.secret_key,
        "bucket": place.s3.bucket,
        "keys": data.keys,
        "validator_url": f"{route.validator_url}/{data.sku}",
        "known_hosts": str(write_known_hosts(place, route)),
        "sftp_host": "127.0.0.1",
        "sftp_port": route.sftp_port,
        "username": login.username,
        "key_file": str(login.private_key),
        "base_dir": place.sftp.base_dir,
        "into": f"{place.sftp.base_dir}/{into}",
        "work_dir": str(place.folder),
    }
    cost = run_reporting(HERE / "baseline.py", told)
    place.check(into, data)
    place.clear(into)
    return cost
