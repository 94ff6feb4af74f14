"""Runs a command so that it dies with the process that started it: ``python launch.py PARENT_PID COMMAND…``.

The command replaces this program, so its process id is the one the starter sees. The kernel's parent-death signal does
the work (Linux, prctl(2)); it outlives exec and cannot be missed, even when the starter is killed with SIGKILL. It is
tied to the *thread* that started this program. Elsewhere the command is just run.

This file is run by path and imports little: it is on the way of every start.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1
SIGKILL = 9


def main(arguments: list[str]) -> None:
    """Never returns."""
    parent_pid, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) != 0:
            sys.exit(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent_pid:  # it died before the signal was armed
        sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606 - the command is the stack's own


if __name__ == "__main__":
    main(sys.argv[1:])
