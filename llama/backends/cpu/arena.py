"""Memory for packed weights.

Knows nothing of what they hold.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

CACHE_LINE = 64  # bytes
CHUNK_BYTES = 1 << 26  # of memory for packed weights, taken from the system at once; only what is written is used


class Arena:
    """Memory for weights, in huge pages where the system has them: kernels read a fourth faster from these.

    Small weights follow each other in chunks, as they are no multiple of a huge page. A chunk lives as long as one of
    them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: Callable[[], mmap.mmap | None] = lambda: None  # a weak reference to the newest
        self._used = 0  # bytes of the newest chunk

    def take(self, n_bytes: int) -> Tensor:
        """Return memory of n_bytes, uint8, that begins at a cache line."""
        if n_bytes > CHUNK_BYTES // 4:
            return torch.frombuffer(huge_pages(n_bytes), dtype=torch.uint8)
        with self._lock:
            chunk = self._chunk()
            if chunk is None or self._used + n_bytes > CHUNK_BYTES:
                chunk, self._used = huge_pages(CHUNK_BYTES), 0
                self._chunk = weakref.ref(chunk)
            at, self._used = self._used, self._used + -(-n_bytes // CACHE_LINE) * CACHE_LINE
        return torch.frombuffer(chunk, dtype=torch.uint8, count=n_bytes, offset=at)


def huge_pages(n_bytes: int) -> mmap.mmap:
    """Return zeroed memory that is taken from the system as it is written to."""
    memory = mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANON)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
