"""Every format, of several families, on several numbers of ranks: the same logits and tokens from the same weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.config import ModelArgs
from llama.rope import scaled_frequencies
from tests.checkpoints import BYTE_VOCAB_SIZE, random_state, write_byte_tokenizer, write_meta
from tests.gguf_files import write_gguf_model
from tests.hugging_face import hugging_face_model
from tests.models import one_pass, random_tokens, transformer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TOKENS = random_tokens(3, 9, vocab_size=BYTE_VOCAB_SIZE)
PROMPTS = [TOKENS[0, :3].tolist(), TOKENS[1].tolist()]

FAMILIES = {
    "llama-2": ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=BYTE_VOCAB_SIZE, multiple_of=32),
    "llama-3.1": ModelArgs(
        dim=64,
        n_layers=2,
        n_heads=8,
        n_kv_heads=2,
        vocab_size=BYTE_VOCAB_SIZE,
        multiple_of=32,
        rope_theta=500000.0,
        use_scaled_rope=True,
    ),
    "smollm2": ModelArgs(
        dim=96, n_layers=2, n_heads=6, n_kv_heads=3, vocab_size=BYTE_VOCAB_SIZE, multiple_of=32, tied_embeddings=True
    ),
}
RANKS = {"llama-2": (1, 2, 4), "llama-3.1": (1, 4, 8), "smollm2": (1, 2, 3)}
FORMATS = ("meta", "safetensors", "bin", "gguf")
CASES = [(family, form, size) for family, sizes in RANKS.items() for form in FORMATS for size in sizes]


def write(form: str, folder: Path, args: ModelArgs) -> Path:
    """The family's weights in a format; the path to open."""
    state = random_state(args)
    if form == "meta":
        write_meta(folder, args, shards=2)
        return folder
    if form == "gguf":
        factors = None
        if args.rope_scaling is not None:
            frequencies = (
                scaled_frequencies(args.head_dim, args.rope_theta, each) for each in (None, args.rope_scaling)
            )
            factors = torch.div(*frequencies)
        write_gguf_model(folder.with_suffix(".gguf"), args, state, rope_factors=factors)
        return folder.with_suffix(".gguf")
    model = hugging_face_model(args, state)
    model.config.architectures = ["LlamaForCausalLM"]
    if form == "bin":
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], list[Any]]:
    """What every rank of every case computed."""
    root = tmp_path_factory.mktemp("matrix")
    tokenizer = write_byte_tokenizer(root)
    jobs = []
    for family, form in {case[:2]: None for case in CASES}:
        path = write(form, root / f"{family}.{form}", FAMILIES[family])
        for size in RANKS[family]:
            out = str(root / f"{family}.{form}.{size}")
            job = {"folder": str(path), "tokenizer": str(tokenizer), "size": size, "out": out}
            jobs.append({**job, "tokens": TOKENS.tolist(), "prompts": PROMPTS})
    (root / "jobs.json").write_text(json.dumps(jobs))
    worker = [sys.executable, "-m", "tests.parity.ranks_worker", str(root / "jobs.json")]
    done = subprocess.run(worker, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return {
        case: [torch.load(root / f"{'.'.join(map(str, case))}.{rank}") for rank in range(case[2])] for case in CASES
    }


@pytest.mark.parametrize(("family", "form", "size"), CASES)
def test_every_rank_computes_what_the_whole_weights_do(
    results: dict[tuple[str, str, int], list[Any]], family: str, form: str, size: int
) -> None:
    args = FAMILIES[family]
    with torch.inference_mode():
        expected = one_pass(transformer(args, random_state(args)), TOKENS)
    for rank in results[family, form, size]:
        torch.testing.assert_close(rank["logits"], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "form", "size"), CASES)
def test_tokens_do_not_depend_on_format_or_ranks(
    results: dict[tuple[str, str, int], list[Any]], family: str, form: str, size: int
) -> None:
    first = results[family, "meta", 1][0]
    for rank in results[family, form, size]:
        assert rank["greedy"][0] == first["greedy"][0]
        assert rank["sampled"] == first["sampled"]
