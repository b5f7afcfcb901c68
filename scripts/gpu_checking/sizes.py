"""Which shapes are checked and measured; those of "tiny" are for Triton's interpreter, on a CPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llama.config import ModelArgs
from llama.testing.model_presets import PRESETS

FLOATS = "floats"  # weights in the dtype that is computed in


@dataclass(frozen=True)
class Size:
    """Lengths are in tokens."""

    args: ModelArgs  # of the model that is measured
    checked: ModelArgs  # of the model whose logits and tokens are checked
    forms: tuple[str, ...]  # what weights are held in, the most important first
    vocab_sizes: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]  # prefills that are measured
    steps: int  # of decoding that are measured
    peer_steps: int  # of a run that peers are compared by
    repeats: int  # of what is measured alone
    copied: int  # bytes of a buffer that is larger than any cache


FORMS = (FLOATS, "int4", "int8", "Q4_K", "fp8", "Q6_K")
LLAMA_8B, LLAMA_1B = (PRESETS[name].args for name in ("llama-3.1-8b", "llama-3.2-1b"))
# Three heads to a KV head, and rows of whole groups of 32.
TINY = ModelArgs(dim=96, n_layers=2, n_heads=6, n_kv_heads=2, hidden_dim=160, vocab_size=300)

_LARGE = Size(
    args=LLAMA_8B,
    checked=LLAMA_1B,
    forms=FORMS,
    vocab_sizes=(128256,),
    batches=(1, 8, 64),
    contexts=(128, 4096, 32768),
    prompts=(512, 2048, 8192),
    steps=12,
    peer_steps=96,
    repeats=7,
    copied=2 << 30,
)
SIZES = {
    "8b": _LARGE,
    "1b": dataclasses.replace(_LARGE, args=LLAMA_1B),
    "tiny": Size(
        args=TINY,
        checked=dataclasses.replace(TINY, tied_embeddings=True),  # as Llama 3.2 1B
        forms=(FLOATS, "int4"),  # blocks of 256 values are longer than its rows
        vocab_sizes=(300,),
        batches=(1, 2),
        contexts=(16,),
        prompts=(12,),
        steps=1,
        peer_steps=1,
        repeats=1,
        copied=1 << 20,
    ),
}
