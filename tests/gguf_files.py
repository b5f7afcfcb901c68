"""GGUF files written by the gguf library, with tensor names from its specification and not from llama/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from llama.config import ModelArgs

NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    *parts, kind = name.split(".")  # a weight or a bias
    if parts[-1] == "gate":
        return f"blk.{parts[1]}.ffn_gate_inp.{kind}"
    if "experts" in parts:
        return f"blk.{parts[1]}.{NAMES[f'feed_forward.{parts[-1]}']}.{parts[-2]}.{kind}"
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{NAMES['.'.join(parts[2:])]}.{kind}"
    return f"{NAMES[parts[0]]}.{kind}"


def metadata_of(args: ModelArgs) -> dict[str, Any]:
    """The architecture under GGUF's keys; a vocabulary without its tokenizer."""
    return {
        "general.architecture": "llama",
        "llama.embedding_length": args.dim,
        "llama.block_count": args.n_layers,
        "llama.feed_forward_length": args.hidden_dim,
        "llama.attention.head_count": args.n_heads,
        "llama.attention.head_count_kv": args.n_kv_heads,
        "llama.attention.key_length": args.head_dim,
        "llama.attention.layer_norm_rms_epsilon": args.norm_eps,
        "llama.rope.freq_base": args.rope_theta,
        "llama.rope.dimension_count": args.head_dim,
        "llama.vocab_size": args.vocab_size,
        "llama.expert_count": None if args.experts is None else args.experts.n_experts,
        "llama.expert_used_count": None if args.experts is None else args.experts.n_active,
        "llama.expert_feed_forward_length": None if args.experts is None else args.experts.hidden_dim,
        "tokenizer.ggml.tokens": [f"token {i}" for i in range(args.vocab_size)],
    }


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[np.ndarray, Any]]) -> Path:
    """tensors: arrays and their ggml types; an array of bytes is taken for blocks. A key of None is left out."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture" or value is None:
            continue  # the writer adds the first itself
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def encoded(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Blocks of the tensor's values or, of types that the library does not make, of others that spread as far."""
    try:
        return gguf.quantize(np.ascontiguousarray(tensor.float().numpy()), kind)
    except NotImplementedError:
        return random_blocks(tensor, kind)


# Where a block has its scales, each a half, and what the second is times the first so that random codes are centred.
SCALES_AT = {
    "Q4_0": {0: 1.0},
    "Q4_1": {0: 1.0, 2: -7.5},
    "Q5_0": {0: 1.0},
    "Q5_1": {0: 1.0, 2: -15.5},
    "Q8_0": {0: 1.0},
    "Q2_K": {80: 1.0, 82: 1.5},
    "Q3_K": {108: 1.0},
    "Q4_K": {0: 1.0, 2: 7.5},
    "Q5_K": {0: 1.0, 2: 15.5},
    "Q6_K": {208: 1.0},
    "IQ4_NL": {0: 1.0},
    "IQ4_XS": {0: 1.0},
}


def random_blocks(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Random codes, and scales that give the values about the tensor's standard deviation."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(int(tensor.float().abs().sum() * 1000))
    blocks = generator.integers(0, 256, (tensor.numel() // elements, size), np.uint8)
    spread = generator.uniform(0.5, 1.5, len(blocks))

    def set_scales(scales: np.ndarray) -> None:
        for at, factor in SCALES_AT[kind.name].items():
            blocks[:, at : at + 2] = (factor * scales).astype(np.float16)[:, None].view(np.uint8)

    set_scales(spread)
    set_scales(spread * float(tensor.std()) / float(gguf.dequantize(blocks, kind).std()))
    return blocks.reshape(len(tensor), -1)


def write_gguf_model(
    path: Path,
    args: ModelArgs,
    state: dict[str, Tensor],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    rope_factors: Tensor | None = None,
    **changes: Any,
) -> dict[str, Tensor]:
    """A whole model, its matrices of type `kind` and its norms in F32; returns the tensors as they are then."""
    tensors, stored = {}, {}
    for name, tensor in state.items():
        own = gguf.GGMLQuantizationType.F32 if tensor.dim() == 1 or ".gate." in name else kind
        array = encoded(tensor, own)
        tensors[gguf_name(name)] = array, own
        stored[name] = torch.from_numpy(np.array(gguf.dequantize(array, own))).view(tensor.shape)
    if rope_factors is not None:  # how llama.cpp stores Llama 3.1's scaling
        tensors["rope_freqs.weight"] = rope_factors.float().numpy(), gguf.GGMLQuantizationType.F32
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    write_gguf(path, metadata_of(args) | changed, tensors)
    return stored
