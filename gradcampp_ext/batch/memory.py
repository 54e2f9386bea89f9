"""The allocator of processes that explain on the CPU."""

from __future__ import annotations

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that were freed.

    By default each forward pass gets its activations from the kernel anew, page by page, which is
    a third of the time of inference on a CPU. A process of one's own may choose otherwise. Threads
    share one arena, since those of their own give freed memory back in any case.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option in (trim_threshold, mmap_threshold):
            mallopt(option, 2**31 - 1)
        mallopt(arena_max, 1)
