"""One small architecture for each way in which LLaMAs differ; sizes are chosen so that no two can be mistaken."""

from __future__ import annotations

from llama.config import ModelArgs
from llama.rope_scaling import Llama3Scaling

ARCHITECTURES = {
    "multi_head": ModelArgs(dim=40, n_layers=2, n_heads=5, vocab_size=101, multiple_of=12),
    "grouped": ModelArgs(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=101, multiple_of=12),
    "one_kv_head": ModelArgs(dim=48, n_layers=2, n_heads=6, n_kv_heads=1, vocab_size=101, rope_theta=5e5),
    "tied": ModelArgs(dim=48, n_layers=2, n_heads=6, n_kv_heads=3, vocab_size=101, tied_embeddings=True),
    "wide_heads": ModelArgs(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=101, head_dim=14),
    # Wavelengths from 6 to 11,000 positions around a context of 32: kept, blended and stretched ones.
    "scaled_rope": ModelArgs(
        dim=96,
        n_layers=2,
        n_heads=6,
        n_kv_heads=2,
        vocab_size=101,
        rope_theta=5000.0,
        norm_eps=1e-6,
        rope_scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, old_context_len=32),
    ),
}
SEQLENS = {name: 48 if args.rope_scaling else 7 for name, args in ARCHITECTURES.items()}
