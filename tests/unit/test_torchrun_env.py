"""What the variables of launchers say of a process: one rule, and one line where they contradict each other."""

from __future__ import annotations

import pytest
import torch

from llama.distributed.torchrun_env import TorchrunEnv, read_torchrun_env
from llama.engine.options import BuildOptions
from llama.errors import error_line, is_caused_by_user

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def variables(words: str) -> dict[str, str]:
    return dict(word.split("=") for word in words.split())


@pytest.mark.parametrize(
    "words",
    [
        "",
        "RANK=0 WORLD_SIZE=1 MASTER_ADDR=node1 MASTER_PORT=29500 LOCAL_RANK=0",
        "SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=1",
        "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 MASTER_ADDR=node1 MASTER_PORT=29500",
    ],
)
def test_a_process_that_nobody_started_with_others_is_alone(words: str) -> None:
    assert read_torchrun_env(variables(words)) == TorchrunEnv()


@pytest.mark.parametrize("words", ["RANK=1", "WORLD_SIZE=2 MASTER_ADDR=node1 MASTER_PORT=1", "LOCAL_WORLD_SIZE=0"])
def test_what_is_left_over_is_ignored_and_told(words: str) -> None:
    env = read_torchrun_env(variables(words))
    assert (env.rank, env.world_size, env.local_world_size) == (0, 1, 1)
    assert env.ignored.startswith(words.split()[0])


def test_a_launchers_ranks_are_as_it_says() -> None:
    found = read_torchrun_env(TORCHRUN | variables("RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4"))
    assert found == TorchrunEnv(rank=5, world_size=8, local_rank=1, local_world_size=4, torchrun=True)
    by_hand = variables("RANK=1 WORLD_SIZE=2 MASTER_ADDR=node1 MASTER_PORT=29500")
    assert read_torchrun_env(by_hand) == TorchrunEnv(rank=1, world_size=2)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("RANK=2 WORLD_SIZE=2", "RANK=2 WORLD_SIZE=2 contradict each other, as RANK counts from 0"),
        ("RANK=0 WORLD_SIZE=two", "WORLD_SIZE must be an integer of at least 1, got 'two'"),
        ("RANK=-1 WORLD_SIZE=2", "RANK must be an integer of at least 0, got '-1'"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=0", "LOCAL_WORLD_SIZE must be an integer of at least 1, got '0'"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=1", "LOCAL_RANK counts from 0"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=3", "a host has a part of the ranks"),
    ],
)
def test_variables_that_contradict_each_other_are_named(words: str, error: str) -> None:
    with pytest.raises(ValueError, match="start all ranks with torchrun, or unset RANK, WORLD_SIZE") as raised:
        read_torchrun_env(TORCHRUN | variables(words))
    assert error in str(raised.value)


def test_ranks_without_a_place_to_meet_are_told_what_is_missing() -> None:
    with pytest.raises(ValueError, match="are set, but not MASTER_ADDR and MASTER_PORT"):
        read_torchrun_env(variables("RANK=0 WORLD_SIZE=2"))


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "600"])
def test_a_timeout_is_a_number_of_seconds(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout must be a number of seconds"):
        BuildOptions("model", timeout=timeout)


def test_what_the_system_refuses_is_told_with_its_fix() -> None:
    """torch's RuntimeError of a lack of memory (`ulimit -v`) or of file descriptors was a traceback."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_caused_by_user(raised.value)
    assert error_line(raised.value).startswith(
        "Cannot allocate memory (1152921504.61 GB): give a smaller --max_seq_len"
    )
    socket = RuntimeError("[enforce fail at socket.cc:24] rv != -1. socket: Too many open files")
    assert error_line(socket) == "Too many open files: raise the limit of this shell, as by ulimit -n 1024"
    assert error_line(FileNotFoundError("no x, give y")) == "no x, give y"
    assert not is_caused_by_user(RuntimeError("shapes differ"))
