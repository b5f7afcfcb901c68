"""Random checkpoints in Meta's format, written by rules of their own: nothing of llama's loading is used here."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor

from llama.config import ModelArgs
from tests.models import BYTE_EOS

# 256 single bytes and Llama 3's 256 special tokens.
BYTE_VOCAB_SIZE = 512

# 16 heads for up to 16 ranks, 4 KV heads, 176 hidden features (not a multiple of 3 or 32).
TINY = ModelArgs(dim=64, n_layers=2, n_heads=16, n_kv_heads=4, vocab_size=BYTE_VOCAB_SIZE, multiple_of=16)


def write_byte_tokenizer(folder: Path) -> Path:
    """Llama 3's kind of tokenizer.model, whose ranks are the 256 bytes."""
    path = folder / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    return path


def random_state(args: ModelArgs, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Whole tensors under Meta's names, scaled so that activations and logits keep a size near 1."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)

    def norm() -> Tensor:
        return (1 + 0.1 * torch.randn(args.dim, generator=generator)).to(dtype)

    def feed_forward(prefix: str, hidden_dim: int) -> dict[str, Tensor]:
        if hidden_dim:
            return {
                f"{prefix}.w1.weight": matrix(hidden_dim, args.dim),
                f"{prefix}.w2.weight": matrix(args.dim, hidden_dim),
                f"{prefix}.w3.weight": matrix(hidden_dim, args.dim),
            }
        experts = args.experts
        assert experts is not None and experts.shared_hidden_dim is None and not experts.dense_layers
        found = {f"{prefix}.gate.weight": matrix(experts.n_experts, args.dim)}
        for number in range(experts.n_experts):
            found |= feed_forward(f"{prefix}.experts.{number}", experts.hidden_dim)
        return found

    q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    table = matrix(args.vocab_size, args.dim) * (1 if args.tied_embeddings else args.dim**0.5)
    state = {"tok_embeddings.weight": table, "norm.weight": norm()}
    for i in range(args.n_layers):
        state |= {
            f"layers.{i}.attention.wq.weight": matrix(q_dim, args.dim),
            f"layers.{i}.attention.wk.weight": matrix(kv_dim, args.dim),
            f"layers.{i}.attention.wv.weight": matrix(kv_dim, args.dim),
            f"layers.{i}.attention.wo.weight": matrix(args.dim, q_dim),
            **feed_forward(f"layers.{i}.feed_forward", args.hidden_dim if args.experts is None else 0),
            f"layers.{i}.attention_norm.weight": norm(),
            f"layers.{i}.ffn_norm.weight": norm(),
        }
    if not args.tied_embeddings:
        state["output.weight"] = matrix(args.vocab_size, args.dim)
    for name in list(state):
        if ("attention.w" in name and args.attention_bias) or ("feed_forward.w" in name and args.mlp_bias):
            bias = 0.5 * torch.randn(len(state[name]), generator=generator)
            state[name.replace(".weight", ".bias")] = bias.to(dtype)
    return state


def chain_state(args: ModelArgs, successors: dict[int, int]) -> dict[str, Tensor]:
    """Weights that make successors[token] follow token, whatever came before, with all but certainty."""
    state = random_state(args)
    for name in state:
        if name.endswith(("wo.weight", "w2.weight")):
            state[name] = torch.zeros_like(state[name])  # the final state is the last token's embedding
        if "norm" in name:
            state[name] = torch.ones_like(state[name])
    table = torch.nn.functional.normalize(state["tok_embeddings.weight"])
    output = torch.zeros_like(table)
    for token, successor in successors.items():
        output[successor] += 8 * table[token]  # a logit of 8 * sqrt(dim)
    return state | {"tok_embeddings.weight": table, "output.weight": output}


def split_state(
    state: dict[str, Tensor], args: ModelArgs, shards: int, embedding_dim: int = 0
) -> list[dict[str, Tensor]]:
    """The state as Meta's shards hold it; embedding_dim 1 is the layout of Llama 1 and 2."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for name, tensor in state.items():
        if "norm" in name:
            pieces = [tensor] * shards
        elif name.endswith(("wk.weight", "wv.weight")) and shards > args.n_kv_heads:
            heads = tensor.chunk(args.n_kv_heads)
            pieces = [heads[i * args.n_kv_heads // shards] for i in range(shards)]
        else:
            columns = name.endswith(("wo.weight", "w2.weight")) or (embedding_dim == 1 and "tok_emb" in name)
            pieces = list(tensor.chunk(shards, dim=1 if columns else 0))
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone()
    return parts


def write_meta(
    folder: Path,
    args: ModelArgs = TINY,
    shards: int = 1,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    embedding_dim: int = 0,
    state: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Write params.json, tokenizer.model and the shards of `state`, else of a random one; returns the whole tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    state = random_state(args, seed, dtype) if state is None else state
    for i, part in enumerate(split_state(state, args, shards, embedding_dim)):
        torch.save(part, folder / f"consolidated.{i:02d}.pth")
    kept = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps", "rope_theta"}
    params = {key: value for key, value in dataclasses.asdict(args).items() if key in kept}
    if args.use_scaled_rope:
        params["use_scaled_rope"] = True
    if args.head_dim != args.dim // args.n_heads:
        params["head_dim"] = args.head_dim
    (folder / "params.json").write_text(json.dumps(params))
    write_byte_tokenizer(folder)
    return state


def write_model_and_draft(top: Path) -> dict[str, Path]:
    """Folders of a model that goes in circles at times and ends at times, and of its first layer as its draft."""
    state = random_state(TINY)
    for name in state:
        if name.endswith(("wo.weight", "w2.weight")):
            state[name] *= 0.3  # the newest token says most of what follows
    state["output.weight"][BYTE_EOS] *= 1.5
    write_meta(top / "model", state=state)
    first = {name: weight for name, weight in state.items() if not name.startswith("layers.1.")}
    write_meta(top / "draft", dataclasses.replace(TINY, n_layers=1), state=first)
    return {"model": top / "model", "draft": top / "draft"}
