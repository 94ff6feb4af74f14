"""Looks at a container from inside, with the standard library alone: `python -IS probe.py [role | get PATH | seen URL]`.

Without an argument the role is found in process 1's command line. Ends with 0 when that role works; else with 1, having said
why. `get PATH` prints the API's answer to GET PATH, asked with API_KEY. `seen URL` prints what HAProxy's statistics page (CSV)
says of each web server: address, state.

The first form runs every few seconds in every container, so it loads no HTTP library: that would be three quarters of its cost.
"""

import os
import socket
import sys
import time

SECONDS = 8
ALIVE_SECONDS = 30
ROLES = {"api": "api", "worker": "worker", "beat": "beat", "flower": "flower", "ncr_validator": "validator", "rclone": "s3"}
ROLES["ncr_upload.entrypoints.embedded.sftp_server"] = "sftp"


def find_role():
    with open("/proc/1/cmdline", encoding="utf-8", errors="replace") as file:
        words = [os.path.basename(word) for word in file.read().split("\0")]
    return next((ROLES[word] for word in words if word in ROLES), "none")


def fetch(url, headers=None):
    import urllib.error
    import urllib.request

    asked = urllib.request.Request(url, headers=headers or {})  # noqa: S310 - http, by our own callers
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=SECONDS) as answer:
            return answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as refused:
        return refused.read().decode("utf-8", "replace")


def answers(port, path, *statuses):
    with socket.create_connection(("127.0.0.1", port), SECONDS) as line:
        line.sendall(f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        head = b""
        while b"\n" not in head and (some := line.recv(4096)):
            head += some
    words = head.split(maxsplit=2)
    if len(words) < 2 or not words[1].isdigit() or int(words[1]) not in statuses:
        raise OSError(f"GET {path} answered {head[:60]!r}")


def is_fresh(path):
    age = time.time() - os.stat(path).st_mtime
    if age > ALIVE_SECONDS:
        raise OSError(f"the last sign of life is {age:.0f} s old")


def greets(port):
    with socket.create_connection(("127.0.0.1", port), SECONDS):
        pass


def probe(role):
    alive = os.environ.get("NCR_ALIVE_FILE", "/tmp/ncr.alive")
    checks = {
        "api": lambda: answers(int(os.environ.get("API_PORT") or 8001), "/readyz", 200),
        "worker": lambda: is_fresh(alive),
        "beat": lambda: is_fresh(alive),
        "flower": lambda: answers(int(os.environ.get("FLOWER_PORT") or 5555), "/healthcheck", 200, 401),
        "validator": lambda: answers(8010, "/healthz", 200),
        "s3": lambda: answers(9000, "/", 200, 400, 403),
        "sftp": lambda: greets(2222),
        "none": lambda: None,
    }
    checks[role]()


def show_seen(url):
    import csv

    for row in csv.DictReader(fetch(url).lstrip("# ").splitlines()):
        if row["pxname"] == "web" and row["svname"] not in ("FRONTEND", "BACKEND"):
            sys.stdout.write(f"{row['addr'].rsplit(':', 1)[0]} {row['status'].split()[0]}\n")


def main(arguments):
    try:
        if arguments[:1] == ["get"]:
            key = os.environ.get("API_KEY")
            port = int(os.environ.get("API_PORT") or 8001)
            sys.stdout.write(fetch(f"http://127.0.0.1:{port}{arguments[1]}", {"X-API-Key": key} if key else {}))
        elif arguments[:1] == ["seen"]:
            show_seen(arguments[1])
        else:
            probe(arguments[0] if arguments else find_role())
    except (OSError, KeyError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


main(sys.argv[1:])
