"""Families compute transformers' logits on several ranks, and the ranks the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoints import BYTE_VOCAB_SIZE, write_byte_tokenizer
from tests.models import random_tokens
from tests.parity import test_experts, test_layer_families, test_relatives

pytestmark = pytest.mark.slow

# Biases of some modules, folds, fused tensors, rows that are in Meta's order, heads that are rotated in part.
RELATIVES = ("qwen2", "seed_oss", "granite, tied", "phi3", "phi4 mini", "internlm3", "ernie4_5, biases", "helium")
# Norms of all heads, where two ranks share one of three KV heads, which counts once; norms of a head, which are whole.
LAYERED = ("olmo3", "exaone4")
# Layers that are not rotated, norms behind the rotation, queries scaled by position, windows in some layers.
TWO_RANKS = ("qwen3", "hunyuan", "smollm3", "ministral3", "cwm")
# Layer norms and their biases, feed-forwards without a gate, an activation with numbers of its own.
UNGATED = ("nemotron, biases", "apertus")
# Ranks have a part of each expert.
EXPERTS = ("mixtral", "llama 4 scout", "qwen3 moe", "olmoe", "granite moe")
CASES = [(name, size) for name in RELATIVES for size in (1, 2, 3)]
CASES += [(name, size) for name in LAYERED + UNGATED for size in (2, 3)]
CASES += [(name, 2) for name in TWO_RANKS + EXPERTS + ("arcee", "stablelm")]
MAKERS = dict.fromkeys(LAYERED + TWO_RANKS, test_layer_families.made) | dict.fromkeys(EXPERTS, test_experts.made)


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Tensor, list[Any]]]:
    """Transformers' logits, and what every rank of each job computed."""
    folder, jobs, expected = tmp_path_factory.mktemp("ranks"), list[dict[str, Any]](), dict[str, Tensor]()
    tokens = random_tokens(2, 20, vocab_size=BYTE_VOCAB_SIZE)
    for name in dict(CASES):
        theirs = MAKERS.get(name, test_relatives.made)(name, vocab_size=BYTE_VOCAB_SIZE)
        theirs.save_pretrained(folder / name)
        write_byte_tokenizer(folder / name)
        with torch.inference_mode():
            expected[name] = theirs(tokens).logits
    for name, size in CASES:
        job = {"folder": str(folder / name), "tokens": tokens.tolist(), "prompts": [[1, 2], [3]], "size": size}
        jobs.append({**job, "out": str(folder / f"{name}.{size}")})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    worker = [sys.executable, "-m", "tests.parity.ranks_worker", str(folder / "jobs.json")]
    done = subprocess.run(worker, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {
        (name, size): (expected[name], [torch.load(folder / f"{name}.{size}.{rank}") for rank in range(size)])
        for name, size in CASES
    }


@pytest.mark.parametrize(("name", "size"), CASES)
def test_ranks_compute_what_transformers_does(
    of_ranks: dict[tuple[str, int], tuple[Tensor, list[Any]]], name: str, size: int
) -> None:
    expected, found = of_ranks[name, size]
    for rank in found:
        torch.testing.assert_close(rank["logits"], expected, rtol=1e-5, atol=1e-4)
    assert len({str(rank["greedy"][0]) for rank in found}) == 1
