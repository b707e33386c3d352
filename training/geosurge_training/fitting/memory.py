"""Keeps freed memory in the process, which a training loop wants and a server does not."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
# mallopt takes an int and reads it as a size: -1 is the largest there is.
_NEVER = -1


def keep_freed_memory() -> None:
    """Tells glibc never to give memory back, nor to map large blocks one by one; does nothing elsewhere.

    Every training step frees and allocates the same hundreds of megabytes of activations. By default each block over
    32 MB is unmapped and mapped afresh, and the kernel zeroes its pages again: on a virtual machine that took over ten
    times as long as the arithmetic.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
    mallopt(_M_TOP_PAD, 256 * 2**20)
