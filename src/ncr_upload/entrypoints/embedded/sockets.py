"""Ports on 127.0.0.1 for the parts."""

from __future__ import annotations

import random
import socket

LOOPBACK = "127.0.0.1"

# Below Linux's range for outgoing connections (32768 and up): while a killed part is being restarted,
# no outgoing connection of anyone can be given its port.
_CANDIDATES = range(20_000, 32_768)
_TRIES = 200


def is_free(port: int) -> bool:
    """Whether a server could listen on the port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def find_free_port(taken: set[int]) -> int:
    """A free port not among `taken`, and adds it to them."""
    for _ in range(_TRIES):
        port = random.choice(_CANDIDATES)
        if port not in taken and is_free(port):
            taken.add(port)
            return port
    raise OSError(f"no free port found on {LOOPBACK} in {_TRIES} tries between {_CANDIDATES.start} and {_CANDIDATES.stop}")
