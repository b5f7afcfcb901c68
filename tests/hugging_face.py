"""Models of transformers as the oracle: the same weights there, and their folders, tokens and conversions here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llama.checkpoint import load_weights, open_checkpoint
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.checkpoint.load import WeightFormat
from llama.config import ModelArgs
from llama.model import Transformer
from tests.checkpoints import BYTE_VOCAB_SIZE, write_byte_tokenizer
from tests.models import build, one_pass, random_tokens

NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}


def half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Rows, or bias, of Q or K for transformers, which rotates i with i + head_dim / 2, not adjacent pairs."""
    rows = []
    for head in weight.split(head_dim):
        rows += [head[i] for i in range(0, head_dim, 2)] + [head[i] for i in range(1, head_dim, 2)]
    return weight.new_tensor([row.tolist() for row in rows])


def hugging_face_state(state: dict[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        *parts, kind = name.split(".")  # a weight or a bias
        prefix = f"model.layers.{parts[1]}." if parts[0] == "layers" else ""
        base = ".".join(parts[2:]) if prefix else parts[0]
        permuted = base in ("attention.wq", "attention.wk")
        renamed[f"{prefix}{NAMES[base]}.{kind}"] = half_split(tensor, head_dim) if permuted else tensor
    return renamed


def hugging_face_model(args: ModelArgs, state: dict[str, Tensor]) -> LlamaForCausalLM:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": args.rope_scaling.factor,
            "low_freq_factor": args.rope_scaling.low_freq_factor,
            "high_freq_factor": args.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": args.rope_scaling.old_context_len,
        }
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=state["layers.0.feed_forward.w1.weight"].shape[0],
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        rms_norm_eps=args.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=args.tied_embeddings,
        attention_bias=args.attention_bias,
        mlp_bias=args.mlp_bias,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    missing, unexpected = model.load_state_dict(hugging_face_state(state, args.head_dim), strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if args.tied_embeddings else set())
    return model


def opened(folder: Path) -> Transformer:
    """Load a folder in fp32, run by torch's operations."""
    checkpoint = open_checkpoint(folder)
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    load_weights(model, checkpoint, torch.device("cpu"), WeightFormat(torch.float32))
    return model


def check_greedy_tokens(theirs: Any, folder: Path) -> None:
    """Save a model of transformers, with a vocabulary of bytes, and compare its greedy tokens with the engine's."""
    theirs.save_pretrained(folder)
    write_byte_tokenizer(folder)
    llm = build(folder, max_seq_len=64)
    llm.tokenizer.stop_tokens = frozenset()
    tokens = random_tokens(2, 30, vocab_size=BYTE_VOCAB_SIZE)
    expected = theirs.generate(tokens, max_new_tokens=30, min_new_tokens=30, do_sample=False, eos_token_id=None)
    assert llm.generate(tokens.tolist(), 30, temperature=0)[0] == expected[:, 30:].tolist()


def check_conversion(theirs: Any, folder: Path, seqlen: int) -> str:
    """Save a model of transformers, convert it to such a folder again, compare logits, and return its model_type."""
    theirs.save_pretrained(folder / "own")
    write_byte_tokenizer(folder / "own")
    checkpoint = open_checkpoint(folder / "own")
    write_checkpoint(writer(checkpoint, tokenizer_source(checkpoint), "hf"), folder / "hf", lambda n_bytes: None)
    tokens = random_tokens(2, seqlen, vocab_size=BYTE_VOCAB_SIZE)
    converted = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    for logits in (converted(tokens).logits, one_pass(opened(folder / "hf"), tokens)):
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=1e-5, atol=1e-4)
    return str(converted.config.model_type)
