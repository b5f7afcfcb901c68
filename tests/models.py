"""Models for tests: in fp32 on the CPU, from tensors or from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama import Llama
from llama.config import ModelArgs
from llama.model import Transformer

BYTE_BOS, BYTE_EOS = 256, 257  # of tests.checkpoints.write_byte_tokenizer


def transformer(args: ModelArgs, state: dict[str, Tensor]) -> Transformer:
    """A model on whole tensors, without any of llama's loading."""
    model = Transformer(args)
    if args.tied_embeddings:
        state = state | {"output.weight": state["tok_embeddings.weight"]}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def one_pass(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits (bsz, seqlen, vocab_size) of tokens (bsz, seqlen), all rows from position 0."""
    bsz, seqlen = tokens.shape
    return model(tokens, torch.zeros(bsz, dtype=torch.long), model.new_cache(bsz, seqlen))


def build(folder: Path, **options: Any) -> Llama:
    return Llama.build(folder, **{"device": "cpu", "dtype": "float32", **options})


def random_tokens(*shape: int, vocab_size: int, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
