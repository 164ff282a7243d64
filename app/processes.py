"""A child process that ends with its parent, however that ends (PR_SET_PDEATHSIG, Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def dying_with(parent: int) -> Callable[[], None] | None:
    """What a child runs before its program, so that it is killed when `parent` ends; None where no kernel can.

    `parent` is the caller's own id. The child dies with the *thread* that starts it, so start it from one that
    lives as long.
    """
    if _LIBC is None:
        return None
    libc = _LIBC

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return die_with_parent
