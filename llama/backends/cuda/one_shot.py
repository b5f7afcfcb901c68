"""Sums of small tensors over the GPUs of a host, which read each other's memory: one kernel instead of NCCL's hops.

It is tried once, when a model first computes, and what does not work or gives a wrong sum is left to NCCL.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger("llama")


class OneShot:
    """Sums fp32 tensors of up to `numel` values over a group, each of whose ranks has a GPU that all can read."""

    def __init__(self, group: dist.ProcessGroup, numel: int, device: torch.device) -> None:
        """Opens the ranks' memory to each other, on all of them at once; whatever torch raises where it cannot."""
        import torch.distributed._symmetric_memory as symmetric_memory

        self._name = group.group_name
        self._shared = symmetric_memory.empty(numel, dtype=torch.float32, device=device)
        symmetric_memory.rendezvous(self._shared, group)

    def takes(self, x: Tensor) -> bool:
        """Whether x can be summed so: vectors of 16 bytes, and no more of them than there is room for."""
        return x.dtype == torch.float32 and x.numel() <= self._shared.numel() and x.numel() % 4 == 0

    def __call__(self, x: Tensor) -> Tensor:
        shared = self._shared[: x.numel()]
        shared.copy_(x.flatten())
        return torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", self._name).view_as(x)


def open_one_shot(group: dist.ProcessGroup, numel: int, device: torch.device, local_ranks: int) -> OneShot | None:
    """A OneShot that was seen to work on every rank of the group, or None; every rank gets the same answer.

    local_ranks: how many ranks of the job each host runs.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    peers = [peer for peer in range(torch.cuda.device_count()) if peer != device.index]
    reach = local_ranks % size == 0 and all(torch.cuda.can_device_access_peer(device, peer) for peer in peers)
    if not _all_agree(group, reach, device):
        return None
    try:
        one_shot = OneShot(group, numel, device)
        numbers = torch.arange(numel, device=device, dtype=torch.float32) % 1000
        works = torch.equal(one_shot(numbers + rank), numbers * size + sum(range(size)))
    except Exception as error:  # of a torch, a driver or a machine that has no such memory
        log.debug("no shared memory between GPUs: %s", error)
        works = False
    return one_shot if _all_agree(group, works, device) else None


def _all_agree(group: dist.ProcessGroup, value: bool, device: torch.device) -> bool:
    votes = torch.tensor([int(value)], device=device)
    dist.all_reduce(votes, dist.ReduceOp.MIN, group=group)
    return bool(votes)
