"""One process, torchrun's ranks, or the ranks of two agents: the same text."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from llama.backends.cpu.build import library
from tests.e2e.conftest import Jobs, RunJobs
from tests.e2e.processes import (
    COMPLETION,
    TIMEOUT,
    Finished,
    prompts,
    python,
    started,
    torchrun,
    torchrun_command,
)

pytestmark = pytest.mark.slow

TEXTS = ["The capital of France is", "def fibonacci(n):\n", "Water boils at"]
# For five tokens, the best logit leads by 0.8 or more. bf16 tells logits of 16 to 32 apart by 0.125, and rounds sums
# in each rank, so that no two numbers of ranks need agree on a lead of 0.07, as there is after "Water boils at 100".
CLEAR = {"prompts": [TEXTS[0], "1, 2, 3, 4, 5, 6, 7, 8,", "a b c d e f g"], "temperature": 0, "max_gen_len": 5}
GREEDY = {"prompts": TEXTS, "temperature": 0, "max_gen_len": 6}
SAMPLED = {"prompts": TEXTS, "temperature": 0.8, "max_gen_len": 6}


@pytest.fixture(scope="module")
def one_process(demo_model: Path, run_jobs: RunJobs) -> Jobs:
    """What plain python generates: greedily in fp32 and in the default dtype, and sampled in fp32."""
    sampled = [SAMPLED | {"seed": seed} for seed in (7, 7, 8)]
    jobs: Jobs = [
        {"ckpt_dir": demo_model, "dtype": "float32", "calls": [GREEDY, *sampled]},
        {"ckpt_dir": demo_model, "calls": [CLEAR]},
    ]
    return run_jobs(0, jobs)


@pytest.mark.parametrize("ranks", [3, 9])
def test_the_demo_model_generates_the_same_on_any_ranks(
    ranks: int, demo_model: Path, one_process: Jobs, run_jobs: RunJobs
) -> None:
    """9 heads and 3 KV heads; hidden and vocabulary sizes that 9 ranks cannot share evenly are padded."""
    sampled = [SAMPLED | {"seed": 7}] if ranks == 3 else []
    jobs: Jobs = [
        {"ckpt_dir": demo_model, "dtype": "float32", "calls": [GREEDY, *sampled]},
        {"ckpt_dir": demo_model, "calls": [CLEAR]},
    ]
    float32, default = run_jobs(ranks, jobs)
    assert float32["answers"] == one_process[0]["answers"][: len(float32["answers"])]
    assert default["answers"] == one_process[1]["answers"]


def test_a_seed_repeats_a_sampled_text_and_another_seed_changes_it(one_process: Jobs) -> None:
    greedy, first, again, other = one_process[0]["answers"]
    assert first == again
    texts = [[answer["generation"] for answer in answers] for answers in (greedy, first, other)]
    assert texts[0] != texts[1] != texts[2]


def test_the_example_samples_by_its_seed(tiny_folder: Path) -> None:
    def generations(seed: int) -> list[str]:
        flags = ["--ckpt_dir", tiny_folder, "--temperature", "0.8", "--seed", seed, "--max_gen_len", "16", "--json"]
        return [answer["tokens"] for answer in python(COMPLETION, *flags).json_lines]

    assert generations(5) == generations(5) != generations(6)


def test_the_readme_command_prints_the_same_on_three_ranks_as_on_one(demo_model: Path) -> None:
    """Every rank once printed its own copy."""
    flags = ["--prompt", TEXTS[0], "--temperature", "0", "--max_gen_len", "8", "--json"]
    three = torchrun(3, COMPLETION, *flags)
    assert three.json_lines == python(COMPLETION, *flags).json_lines
    assert three.stderr.count("loaded /") == three.stderr.count("prefill ") == 1
    if library() is not None:  # a third of the file's blocks
        assert "3 ranks of 0.03 GB" in three.stderr


@pytest.fixture(scope="module")
def eight_shards_flags(eight_shards: Path) -> list[Any]:
    texts = prompts(["Hello", "a longer prompt than the first", "x"])
    flags = ["--temperature", "0", "--max_gen_len", "24", "--dtype", "float32", "--logprobs", "--json"]
    return ["--ckpt_dir", eight_shards, *texts, *flags]


@pytest.fixture(scope="module")
def eight_shards_on_one(eight_shards_flags: list[Any]) -> list[dict[str, Any]]:
    return python(COMPLETION, *eight_shards_flags).json_lines


def check_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same texts token by token, and log-probabilities as near as sums in another order come."""
    for answer, other in zip(found, expected, strict=True):
        assert answer["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)
        assert {**answer, "logprobs": None} == {**other, "logprobs": None}


@pytest.mark.parametrize("ranks", [2, 4])
def test_eight_shards_generate_the_same_on_any_ranks(
    ranks: int, eight_shards_flags: list[Any], eight_shards_on_one: list[dict[str, Any]]
) -> None:
    """Shards once had to be as many as ranks. More ranks than KV heads, and 16, are in tests/parity."""
    check_same(torchrun(ranks, COMPLETION, *eight_shards_flags).json_lines, eight_shards_on_one)


def test_two_hosts_generate_the_same_as_one(
    eight_shards_flags: list[Any], eight_shards_on_one: list[dict[str, Any]]
) -> None:
    """Two torchrun agents on this machine, who meet on the loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["--nnodes", 2, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "e2e"]
    command = torchrun_command(2, COMPLETION, *eight_shards_flags, launcher=launcher)
    with contextlib.ExitStack() as stack:
        agents = [stack.enter_context(started(command)) for _ in range(2)]
        hosts = [Finished(agent.wait(TIMEOUT), *agent.communicate()) for agent in agents]
    first, second = sorted(hosts, key=lambda host: len(host.stdout), reverse=True)
    check_same(first.json_lines, eight_shards_on_one)
    assert "4 ranks" in first.stderr
    assert second.json_lines == []
    assert "loaded /" not in second.stderr


def test_a_process_group_that_the_user_made_is_used(
    eight_shards: Path, eight_shards_on_one: list[dict[str, Any]], run_jobs: RunJobs
) -> None:
    """And building twice in a process works, and a prompt's error on all ranks leaves them able to go on."""
    too_long = {"prompts": ["x" * 200], "temperature": 0}
    greedy = {"prompts": ["Hello"], "temperature": 0, "max_gen_len": 24}
    job = {"ckpt_dir": eight_shards, "dtype": "float32", "calls": [too_long, greedy]}
    first, second = run_jobs(2, [job | {"init_process_group": True}, job])
    assert first == second
    message, (answer,) = first["answers"]
    assert message == "prompt 0 has 201 tokens, max_seq_len is 128: raise it or shorten the prompt"
    assert answer["tokens"] == eight_shards_on_one[0]["tokens"]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.mark.parametrize(("chosen", "threads"), [(None, max(1, cores() // 2)), ("1", 1), (str(cores()), cores())])
def test_ranks_share_the_cores_unless_the_user_chose(
    chosen: str | None, threads: int, eight_shards: Path, run_jobs: RunJobs
) -> None:
    """torchrun sets OMP_NUM_THREADS to 1 for each of several ranks, whatever the number of cores."""
    jobs: Jobs = [{"ckpt_dir": eight_shards, "calls": []}]
    (result,) = run_jobs(2, jobs, env={} if chosen is None else {"OMP_NUM_THREADS": chosen})
    assert result["threads"] == threads


def test_the_load_line_tells_the_threads(eight_shards: Path) -> None:
    done = torchrun(2, COMPLETION, "--ckpt_dir", eight_shards, "--max_gen_len", "1", env={"OMP_NUM_THREADS": "1"})
    assert re.search(r"2 ranks of .*, computing in float32 on cpu by .*, threads: 1$", done.stderr, re.MULTILINE), (
        done.stderr
    )


def test_ranks_beyond_the_model_parallel_size_hold_replicas(
    eight_shards_flags: list[Any], eight_shards_on_one: list[dict[str, Any]]
) -> None:
    done = torchrun(4, COMPLETION, *eight_shards_flags, "--model_parallel_size", 2)
    check_same(done.json_lines, eight_shards_on_one)
    assert "2 ranks of" in done.stderr
    done = torchrun(3, COMPLETION, *eight_shards_flags, "--model_parallel_size", 2)
    assert done.returncode == 1
    assert done.errors == ["error: model_parallel_size must divide the 3 ranks of this job, got 2"]
