"""What torchrun's environment says of this process, whoever set it: the one place that reads its variables.

Imports no torch, as the command line asks before anything is computed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

# The least value that each may have, and the variable that says how many there are.
VARIABLES = {
    "RANK": (0, "WORLD_SIZE"),
    "WORLD_SIZE": (1, None),
    "LOCAL_RANK": (0, "LOCAL_WORLD_SIZE"),
    "LOCAL_WORLD_SIZE": (1, None),
}
MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")
FIX = "start all ranks with torchrun, or unset {} to run one process alone"


@dataclass(frozen=True)
class TorchrunEnv:
    """This process among those of its job and of its host; by default it is alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    torchrun: bool = False  # whether torchrun started it, and ends all ranks when one ends
    ignored: str = ""  # what is set, but without what a launcher sets beside it


def read_torchrun_env(environ: Mapping[str, str] = os.environ) -> TorchrunEnv:
    """Return what the environment says; raise ValueError where variables contradict each other.

    There are ranks where both RANK and WORLD_SIZE are set, as torchrun, accelerate and DeepSpeed do, and scripts for
    Slurm. One of them alone is left over from something else, and says nothing; so is WORLD_SIZE=1, whoever set it.
    """
    found = {name: environ[name] for name in VARIABLES if environ.get(name)}
    if not {"RANK", "WORLD_SIZE"} <= found.keys():
        missing = [name for name in ("RANK", "WORLD_SIZE") if name not in found]
        return TorchrunEnv(ignored=f"{_words(found)} set without {' and '.join(missing)}" if found else "")
    unset = FIX.format(", ".join(found))
    numbers: dict[str, int] = {}
    for name, value in found.items():
        least, _ = VARIABLES[name]
        if not value.isascii() or not value.isdigit() or int(value) < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}: {unset}")
        numbers[name] = int(value)
    for name, (_, total) in VARIABLES.items():
        if total is not None and numbers.get(name, 0) >= numbers.get(total, numbers["WORLD_SIZE"]):
            raise ValueError(f"{_words(found)} contradict each other, as {name} counts from 0: {unset}")
    if numbers.get("LOCAL_WORLD_SIZE", 1) > numbers["WORLD_SIZE"]:
        raise ValueError(f"{_words(found)} contradict each other, as a host has a part of the ranks: {unset}")
    if numbers["WORLD_SIZE"] > 1 and not all(map(environ.get, MEETING_POINT)):
        raise ValueError(
            f"{_words(found)} are set, but not {' and '.join(MEETING_POINT)}, where the ranks meet: {unset}"
        )
    return TorchrunEnv(
        rank=numbers["RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_rank=numbers.get("LOCAL_RANK", 0),
        local_world_size=numbers.get("LOCAL_WORLD_SIZE", 1),
        torchrun="TORCHELASTIC_RUN_ID" in environ,
    )


def meeting_point() -> tuple[str, int]:
    """Return the host and port where the ranks of a job meet; raise ValueError for what is no port."""
    host, port = (os.environ[name] for name in MEETING_POINT)
    if not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"MASTER_PORT must be a port from 1 to 65535, got {port!r}")
    return host, int(port)


def _words(variables: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in variables.items())
