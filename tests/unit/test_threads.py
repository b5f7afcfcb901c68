"""A rank computes with physical cores, which is what the host's topology says and not how many it can count."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from llama.distributed.threads import physical_cores

ALLOWED = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def write_topology(folder: Path, siblings: dict[int, str]) -> None:
    for cpu, text in siblings.items():
        topology = folder / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{text}\n")


def test_each_thread_of_its_own_core_counts(tmp_path: Path) -> None:
    write_topology(tmp_path, {cpu: str(cpu) for cpu in [*ALLOWED, 9001]})  # and not those of other processes
    assert physical_cores(tmp_path) == len(ALLOWED)


@pytest.mark.parametrize("together", [2, 4])
def test_threads_of_one_core_count_once(tmp_path: Path, together: int) -> None:
    groups = [ALLOWED[first : first + together] for first in range(0, len(ALLOWED), together)]
    write_topology(tmp_path, {cpu: ",".join(map(str, [*group, 9001])) for group in groups for cpu in group})
    assert physical_cores(tmp_path) == len(groups) == -(-len(ALLOWED) // together)


def test_without_a_topology_torchs_own_choice_is_the_limit(tmp_path: Path) -> None:
    assert physical_cores(tmp_path) == min(len(ALLOWED), torch.get_num_threads())
