"""List released architectures by name, the kind of tokenizer each came with, and the context it was trained for."""

from __future__ import annotations

from typing import Literal, NamedTuple

from llama.config import ModelArgs
from llama.rope_scaling import YarnScaling

TokenizerKind = Literal["sentencepiece", "code_llama", "llama3", "smollm", "qwen2", "olmo2"]


class Preset(NamedTuple):
    """Describe one architecture, with its kind of tokenizer and its context in tokens."""

    args: ModelArgs
    tokenizer: TokenizerKind
    context_len: int


def _llama2(dim: int, n_layers: int, n_heads: int, **rest: int | float) -> Preset:
    return Preset(ModelArgs(dim, n_layers, n_heads, vocab_size=32000, **rest), "sentencepiece", 4096)  # type: ignore[arg-type]


def _llama3(dim: int, n_layers: int, n_heads: int, multiple_of: int, multiplier: float, scaled: bool) -> Preset:
    args = ModelArgs(
        dim,
        n_layers,
        n_heads,
        n_kv_heads=8,
        vocab_size=128256,
        multiple_of=multiple_of,
        ffn_dim_multiplier=multiplier,
        rope_theta=500000.0,
        use_scaled_rope=scaled,
        tied_embeddings=dim < 4096,  # Llama 3.2
    )
    return Preset(args, "llama3", 131072 if scaled else 8192)


def _qwen3(dim: int, n_layers: int, n_heads: int, hidden_dim: int) -> Preset:
    args = ModelArgs(
        dim,
        n_layers,
        n_heads,
        n_kv_heads=8,
        vocab_size=151936,
        norm_eps=1e-6,
        rope_theta=1000000.0,
        head_dim=128,
        hidden_dim=hidden_dim,
        tied_embeddings=dim < 4096,
        qk_norm="head",
    )
    return Preset(args, "qwen2", 40960)


PRESETS = {
    # 8 heads and 4 KV heads for up to 8 shards; rows of whole blocks for every type of GGUF.
    "tiny": Preset(
        ModelArgs(64, 2, 8, n_kv_heads=4, vocab_size=512, multiple_of=64),
        "sentencepiece",
        2048,
    ),
    "smollm2-135m": Preset(
        ModelArgs(
            576, 30, 9, n_kv_heads=3, vocab_size=49152, hidden_dim=1536, rope_theta=100000.0, tied_embeddings=True
        ),
        "smollm",
        8192,
    ),
    "tinyllama-1.1b": Preset(
        ModelArgs(2048, 22, 32, n_kv_heads=4, vocab_size=32000, hidden_dim=5632), "sentencepiece", 2048
    ),
    "mistral-7b": Preset(
        ModelArgs(4096, 32, 32, n_kv_heads=8, vocab_size=32000, hidden_dim=14336, sliding_window=4096),
        "sentencepiece",
        32768,
    ),
    "llama-2-7b": _llama2(4096, 32, 32),
    "llama-2-13b": _llama2(5120, 40, 40),
    "llama-2-70b": _llama2(8192, 80, 64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3),
    "codellama-7b": Preset(ModelArgs(4096, 32, 32, vocab_size=32016, rope_theta=1000000.0), "code_llama", 16384),
    "llama-3-8b": _llama3(4096, 32, 32, 1024, 1.3, False),
    "llama-3.1-8b": _llama3(4096, 32, 32, 1024, 1.3, True),
    "llama-3.1-70b": _llama3(8192, 80, 64, 4096, 1.3, True),
    "llama-3.1-405b": _llama3(16384, 126, 128, 4096, 1.2, True),
    "llama-3.2-1b": _llama3(2048, 16, 32, 256, 1.5, True),
    "llama-3.2-3b": _llama3(3072, 28, 24, 256, 1.0, True),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288),
    "olmo2-7b": Preset(
        ModelArgs(
            4096,
            32,
            32,
            vocab_size=100352,
            norm_eps=1e-6,
            rope_theta=500000.0,
            hidden_dim=11008,
            qk_norm="all heads",
            output_norms=True,
        ),
        "olmo2",
        4096,
    ),
    "smollm3-3b": Preset(
        ModelArgs(
            2048,
            36,
            16,
            n_kv_heads=4,
            vocab_size=128256,
            norm_eps=1e-6,
            rope_theta=5000000.0,
            hidden_dim=11008,
            tied_embeddings=True,
            unrotated_layers=tuple(range(3, 36, 4)),
        ),
        "llama3",
        65536,
    ),
    "arcee-4.5b": Preset(
        ModelArgs(
            2560,
            36,
            20,
            n_kv_heads=4,
            vocab_size=128004,
            hidden_dim=18432,
            rope_scaling=YarnScaling(20.0, 4096),
            activation="relu2",
        ),
        "llama3",
        65536,
    ),
}
