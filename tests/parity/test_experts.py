"""Models with experts give transformers' logits: folders that it wrote, in one pass, in chunks and on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from llama.checkpoint import load_weights, open_checkpoint
from llama.checkpoint.load import WeightFormat
from llama.model import Transformer
from tests.models import one_pass, random_tokens

VOCAB_SIZE = 101
SMALL = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 96, "intermediate_size": 72, "num_attention_heads": 6,
    "num_key_value_heads": 2,
}  # fmt: skip
LLAMA4 = {
    **SMALL, "intermediate_size_mlp": 80, "num_hidden_layers": 5, "head_dim": 16, "num_local_experts": 5,
    "attention_chunk_size": 24, "floor_scale": 10, "attn_scale": 0.4, "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
}  # fmt: skip
MIXTRAL = {**SMALL, "num_hidden_layers": 2, "num_local_experts": 5, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (MixtralConfig, MixtralForCausalLM, MIXTRAL),
    "mixtral, beyond its window": (MixtralConfig, MixtralForCausalLM, {**MIXTRAL, "sliding_window": 10}),
    "llama 4 scout": (Llama4TextConfig, Llama4ForCausalLM, {**LLAMA4, "num_experts_per_tok": 1}),
    "llama 4 maverick": (
        Llama4TextConfig,
        Llama4ForCausalLM,
        {**LLAMA4, "num_experts_per_tok": 2, "interleave_moe_layer_step": 2, "use_qk_norm": False},
    ),
}
SEQLEN = 70  # three chunks, and seven steps of the scale of queries


def made(name: str) -> PreTrainedModel:
    """A model with random weights, of which no two parts are alike; norms, too."""
    torch.manual_seed(7)
    config, model_cls, settings = MODELS[name]
    model: Any = model_cls(config(**settings))
    for key, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.data.normal_(mean=1.0, std=0.1)
        else:
            in_features = weight.shape[-2 if weight.dim() == 3 and name.startswith("llama 4") else -1]
            weight.data.normal_(std=in_features**-0.5 if "embed" not in key else 1.0)
    return model.eval().requires_grad_(False)


def opened(folder: Path) -> Transformer:
    checkpoint = open_checkpoint(folder)
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    load_weights(model, checkpoint, torch.device("cpu"), WeightFormat(torch.float32))
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    theirs = made(name)
    theirs.save_pretrained(tmp_path)
    tokens = random_tokens(2, SEQLEN, vocab_size=VOCAB_SIZE)
    expected = theirs(tokens).logits
    assert expected.std() > 0.3  # else a wrong model would be close, too
    torch.testing.assert_close(one_pass(opened(tmp_path), tokens), expected, rtol=0, atol=1e-4)
