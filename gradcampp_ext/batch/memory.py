"""The allocator of processes that explain on the CPU."""

from __future__ import annotations

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that were freed.

    By default each forward pass gets its activations from the kernel anew, page by page, which is
    a third of the time of inference on a CPU. A process of one's own may choose otherwise.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option in (trim_threshold, mmap_threshold):
            mallopt(option, 2**31 - 1)
