"""Work captured as CUDA graphs: the host launches all of it at once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


class CudaGraphs:
    """Captures work as CUDA graphs, which share one pool of memory: no two of them run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            stream, current = _side_stream(self._device), torch.cuda.current_stream()
            # Compiles kernels, and lets libraries allocate what they keep: neither may happen during a capture.
            stream.wait_stream(current)
            try:
                with torch.cuda.stream(stream):
                    run()
            finally:
                current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls are watched: those of others, NCCL's watchdog for one, may do what they like.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                run()
        return graph.replay


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all captures: libraries keep a workspace for each stream that they have seen."""
    return torch.cuda.Stream(device)
