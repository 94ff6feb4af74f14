"""How much freed memory the C library keeps."""

from __future__ import annotations

import ctypes

M_ARENA_MAX = -8  # malloc.h of glibc
ARENAS = 2


def share_arenas() -> None:
    """All threads of this process, and of those it forks, allocate from ARENAS arenas. By default glibc gives each of a dozen
    threads one of its own, which keeps what was freed there: tens of megabytes of a worker that moves chunks of one. Other C
    libraries have no such setting and are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, ARENAS)
