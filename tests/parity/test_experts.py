"""Models with experts give transformers' logits: folders that it wrote, in one pass, in chunks and on several ranks."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from llama.checkpoint import open_checkpoint
from llama.checkpoint.base import Checkpoint
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from tests.checkpoints import write_byte_tokenizer
from tests.gguf_files import write_gguf
from tests.hugging_face import opened
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
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
        "original_max_position_embeddings": 32,
    },
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager",
}  # fmt: skip
MIXTRAL = {**SMALL, "num_hidden_layers": 2, "num_local_experts": 5, "num_experts_per_tok": 2}
EIGHT = {**SMALL, "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 3}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (MixtralConfig, MixtralForCausalLM, MIXTRAL),
    "mixtral, beyond its window": (MixtralConfig, MixtralForCausalLM, {**MIXTRAL, "sliding_window": 10}),
    "llama 4 scout": (Llama4TextConfig, Llama4ForCausalLM, {**LLAMA4, "num_experts_per_tok": 1}),
    "llama 4 maverick": (
        Llama4TextConfig,
        Llama4ForCausalLM,
        {**LLAMA4, "num_experts_per_tok": 2, "interleave_moe_layer_step": 2, "use_qk_norm": False},
    ),
    "qwen3 moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {**EIGHT, "head_dim": 24, "moe_intermediate_size": 40, "norm_topk_prob": True},
    ),
    "qwen3 moe, dense layers": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {**EIGHT, "head_dim": 24, "moe_intermediate_size": 40, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    ),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, EIGHT),
    "granite moe": (
        GraniteMoeConfig,
        GraniteMoeForCausalLM,
        {
            **MIXTRAL,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.1,
            "logits_scaling": 0.5,
        },
    ),
}
SEQLEN = 70  # three chunks, and seven steps of the scale of queries


def made(name: str, **changes: Any) -> PreTrainedModel:
    """A model with random weights, of which no two parts are alike; norms, too."""
    torch.manual_seed(7)
    config, model_cls, settings = MODELS[name]
    model: Any = model_cls(config(**settings | changes))
    for key, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.data.normal_(mean=1.0, std=0.1)
        else:
            in_features = weight.shape[-2 if weight.dim() == 3 and name.startswith("llama 4") else -1]
            weight.data.normal_(std=in_features**-0.5 if "embed" not in key else 1.0)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    theirs = made(name)
    theirs.save_pretrained(tmp_path)
    tokens = random_tokens(2, SEQLEN, vocab_size=VOCAB_SIZE)
    expected = theirs(tokens).logits
    assert expected.std() > 0.3  # else a wrong model would be close, too
    torch.testing.assert_close(one_pass(opened(tmp_path), tokens), expected, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_the_text_model_beside_one_that_sees_pictures_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As Llama 4 is released: the text model's settings are within others, and its names are longer."""
    theirs = made("llama 4 scout")
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    renamed = {f"language_model.{name}": tensor for name, tensor in state.items()}
    pictures = {
        "vision_model.class_embedding": torch.zeros(3),
        "multi_modal_projector.linear_1.weight": torch.ones(2, 2),
    }
    save_file(renamed | pictures, tmp_path / "model.safetensors")
    text = json.loads((tmp_path / "config.json").read_text())
    del text["architectures"]
    config = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_config": {"hidden_size": 8}}))
    tokens = random_tokens(1, SEQLEN, vocab_size=VOCAB_SIZE)
    with caplog.at_level(logging.INFO, "llama"):
        found = one_pass(opened(tmp_path), tokens)
    torch.testing.assert_close(found, theirs(tokens).logits, rtol=0, atol=1e-4)
    assert "has tensors that are not used" in caplog.text and "vision_model.class_embedding" in caplog.text
    assert open_checkpoint(tmp_path).context_len == 256


@torch.inference_mode()
def test_mixtral_with_all_experts_in_a_tensor_equals_transformers(tmp_path: Path) -> None:
    """As transformers 5 has them in memory, and some folders on disk."""
    theirs = made("mixtral")
    theirs.save_pretrained(tmp_path)
    own = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in own
    save_file(own, tmp_path / "model.safetensors")
    tokens = random_tokens(1, 20, vocab_size=VOCAB_SIZE)
    torch.testing.assert_close(one_pass(opened(tmp_path), tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_local_experts", 4, "not matrices of 4 experts"),
        ("num_local_experts", 0, "num_experts"),
        ("num_experts_per_tok", 6, "num_experts_per_tok"),
        ("num_experts_per_tok", None, "num_experts_per_tok is missing"),
        ("intermediate_size", 80, "has shape"),
    ],
)
def test_experts_that_do_not_fit_are_named(tmp_path: Path, key: str, value: object, said: str) -> None:
    theirs = made("mixtral")
    theirs.save_pretrained(tmp_path)
    save_file({name: t.contiguous() for name, t in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=said):
        opened(tmp_path)


def write_as_gguf(path: Path, theirs: PreTrainedModel, arch: str, stacked: bool = True, **metadata: Any) -> None:
    """A model of transformers as llama.cpp's converter writes it, now, and once: a tensor for each expert."""
    config: Any = theirs.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    is_llama4 = arch == "llama4"
    keys = {
        "general.architecture": arch,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "feed_forward_length": config.intermediate_size_mlp if is_llama4 else config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": head_dim,
        "expert_count": getattr(config, "num_local_experts", None) or config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
    }
    if is_llama4:
        keys |= {
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "expert_feed_forward_length": config.intermediate_size,
            "interleave_moe_layer_step": config.interleave_moe_layer_step,
        }
    if arch == "qwen3moe":
        keys |= {"expert_feed_forward_length": config.moe_intermediate_size, "attention.key_length": head_dim}
        keys |= {"attention.value_length": head_dim}
    if arch == "granitemoe":
        keys |= {
            "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier,
            "attention.scale": config.attention_multiplier,
            "logit_scale": config.logits_scaling,
        }
    names = gguf.get_tensor_name_map(next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), 9)
    tensors: dict[str, Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        if ".experts." in name:
            layer, kind = name.split(".")[2], name.split(".")[-1]
            each = tensor.transpose(1, 2) if is_llama4 else tensor  # (n_experts, out, in)
            parts = each.chunk(2, dim=1) if kind == "gate_up_proj" else (each,)
            for part, to in zip(parts, ("gate", "up") if len(parts) == 2 else ("down",), strict=True):
                whole = {f"blk.{layer}.ffn_{to}_exps.weight": part}
                tensors |= whole if stacked else {f"blk.{layer}.ffn_{to}.{i}.weight": w for i, w in enumerate(part)}
            continue
        name = name.replace("block_sparse_moe.router.weight", "mlp.gate.weight")
        name = name.replace("feed_forward.gate_proj", "mlp.gate_proj").replace("feed_forward.up_proj", "mlp.up_proj")
        name = name.replace("feed_forward.down_proj", "mlp.down_proj")
        if arch in ("llama", "granitemoe") and ("q_proj" in name or "k_proj" in name):
            n_heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        stored_as = names.get_name(name, (".weight",))
        assert stored_as is not None, name
        tensors[stored_as] = tensor
    vocabulary = {"tokenizer.ggml.tokens": [f"token {i}" for i in range(config.vocab_size)]}
    own = {key if "general" in key else f"{arch}.{key}": value for key, value in keys.items()}
    arrays = {name: (tensor.contiguous().numpy(), gguf.GGMLQuantizationType.F32) for name, tensor in tensors.items()}
    write_gguf(path, own | vocabulary | metadata, arrays)


@pytest.mark.parametrize(
    ("name", "arch"), [("qwen3 moe", "qwen3moe"), ("olmoe", "olmoe"), ("granite moe", "granitemoe")]
)
@torch.inference_mode()
def test_other_families_in_gguf_equal_transformers(tmp_path: Path, name: str, arch: str) -> None:
    theirs = made(name)
    write_as_gguf(tmp_path / "model.gguf", theirs, arch)
    tokens = random_tokens(2, 20, vocab_size=VOCAB_SIZE)
    torch.testing.assert_close(
        one_pass(opened(tmp_path / "model.gguf"), tokens), theirs(tokens).logits, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("stacked", [True, False], ids=["all experts in a tensor", "a tensor for each"])
@torch.inference_mode()
def test_mixtral_in_gguf_equals_transformers(tmp_path: Path, stacked: bool) -> None:
    theirs = made("mixtral")
    write_as_gguf(tmp_path / "model.gguf", theirs, "llama", stacked)
    tokens = random_tokens(2, 20, vocab_size=VOCAB_SIZE)
    torch.testing.assert_close(
        one_pass(opened(tmp_path / "model.gguf"), tokens), theirs(tokens).logits, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", ["llama 4 scout", "llama 4 maverick"])
@torch.inference_mode()
def test_llama_4_in_gguf_equals_transformers(tmp_path: Path, name: str) -> None:
    """llama.cpp tells from the number of experts whether queries and keys are normalised."""
    n_experts = 128 if name == "llama 4 maverick" else 16
    sizes = {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1, "num_local_experts": n_experts}
    theirs = made(name, **sizes, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    write_as_gguf(tmp_path / "model.gguf", theirs, "llama4")
    tokens = random_tokens(2, 20, vocab_size=VOCAB_SIZE)
    torch.testing.assert_close(
        one_pass(opened(tmp_path / "model.gguf"), tokens), theirs(tokens).logits, rtol=0, atol=1e-4
    )


def meta_shards(theirs: PreTrainedModel, shards: int) -> list[dict[str, Tensor]]:
    """A Llama 4 of transformers as Meta released it: fused, stacked, and split over the shards."""
    config: Any = theirs.config
    state = theirs.state_dict()
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]

    def put(name: str, pieces: Sequence[Tensor]) -> None:
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone().contiguous()

    put("tok_embeddings.weight", state["model.embed_tokens.weight"].chunk(shards))
    put("output.weight", state["lm_head.weight"].chunk(shards))
    put("norm.weight", [state["model.norm.weight"]] * shards)
    for i in range(config.num_hidden_layers):
        old, new = f"model.layers.{i}.", f"layers.{i}."
        attention = [state[f"{old}self_attn.{name}_proj.weight"].chunk(shards) for name in ("q", "k", "v")]
        put(f"{new}attention.wqkv.weight", [torch.cat(three) for three in zip(*attention, strict=True)])
        put(f"{new}attention.wo.weight", state[f"{old}self_attn.o_proj.weight"].chunk(shards, 1))
        put(f"{new}attention.wqkv.layer_norm_weight", [state[f"{old}input_layernorm.weight"]] * shards)
        norm = [state[f"{old}post_attention_layernorm.weight"]] * shards
        ffn_old, ffn_new = f"{old}feed_forward.", f"{new}feed_forward."
        if f"{ffn_old}router.weight" not in state:
            up = [state[f"{ffn_old}{name}_proj.weight"].chunk(shards) for name in ("gate", "up")]
            put(f"{ffn_new}mlp.fc1_weight", [torch.cat(two) for two in zip(*up, strict=True)])
            put(f"{ffn_new}mlp.fc2_weight", state[f"{ffn_old}down_proj.weight"].chunk(shards, 1))
            put(f"{ffn_new}mlp.layer_norm_weight", norm)
            continue
        put(f"{ffn_new}norm.weight", norm)
        put(f"{ffn_new}router_DE", [state[f"{ffn_old}router.weight"].t()] * shards)
        shared = f"{ffn_old}shared_expert."
        put(f"{ffn_new}w_in_shared_FD.weight", state[f"{shared}gate_proj.weight"].chunk(shards))
        put(f"{ffn_new}w_swiglu_FD.weight", state[f"{shared}up_proj.weight"].chunk(shards))
        put(f"{ffn_new}w_out_shared_DF.weight", state[f"{shared}down_proj.weight"].chunk(shards, 1))
        gate, up_all = state[f"{ffn_old}experts.gate_up_proj"].chunk(2, dim=2)  # (n_experts, dim, hidden)
        put(f"{ffn_new}experts.moe_w_in_eD_F", [piece.flatten(0, 1) for piece in gate.chunk(shards, 2)])
        put(f"{ffn_new}experts.moe_w_swiglu_eD_F", [piece.flatten(0, 1) for piece in up_all.chunk(shards, 2)])
        down = state[f"{ffn_old}experts.down_proj"].chunk(shards, 1)
        put(f"{ffn_new}experts.moe_w_out_eF_D", [piece.flatten(0, 1) for piece in down])
    for part in parts:
        part["vision_embeddings.conv._linear.weight"] = torch.zeros(3, 3)
        part["layers.0.attention.wo._extra_state"] = torch.zeros(1)
    return parts


@pytest.mark.parametrize("name", ["llama 4 scout", "llama 4 maverick"])
@torch.inference_mode()
def test_metas_own_llama_4_equals_transformers(tmp_path: Path, name: str) -> None:
    """Experts are stacked and transposed, shard by shard, and the factors of RoPE are not those of Llama 3."""
    sizes = {"intermediate_size": 96, "intermediate_size_mlp": 192, "num_local_experts": 4, "vocab_size": 102}
    rope = {**LLAMA4["rope_parameters"], "factor": 16.0, "original_max_position_embeddings": 8192}
    theirs = made(name, **sizes, rope_parameters=rope)
    config: Any = theirs.config
    for i, part in enumerate(meta_shards(theirs, 2)):
        torch.save(part, tmp_path / f"consolidated.{i:02d}.pth")
    # 2/3 of 4 * 96, by 0.75: 192, and of experts half of it.
    params = {
        "dim": 96, "n_layers": 5, "n_heads": 6, "n_kv_heads": 2, "vocab_size": 102, "multiple_of": 8,
        "ffn_dim_multiplier": 0.75, "ffn_exp": 4.0, "norm_eps": config.rms_norm_eps, "rope_theta": 5000.0,
        "use_scaled_rope": True, "attention_chunk_size": 24, "nope_layer_interval": 4, "floor_scale": 10.0,
        "use_qk_norm": config.use_qk_norm, "attn_temperature_tuning": True, "attn_scale": 0.4,
        "vision_args": {"dim": 8},
        "moe_args": {
            "num_experts": 4, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": config.num_experts_per_tok,
            "interleave_moe_layer_step": config.interleave_moe_layer_step,
        },
    }  # fmt: skip
    (tmp_path / "params.json").write_text(json.dumps(params))
    tokens = random_tokens(2, SEQLEN, vocab_size=VOCAB_SIZE)
    torch.testing.assert_close(one_pass(opened(tmp_path), tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_mistrals_own_mixtral_equals_transformers(tmp_path: Path) -> None:
    theirs = made("mixtral")
    config: Any = theirs.config
    write_as_gguf(tmp_path / "names.gguf", theirs, "llama", stacked=False)  # rows of Q and K in that order, too
    checkpoint = open_checkpoint(tmp_path / "names.gguf")
    state = {name: checkpoint.read(name).contiguous() for name in checkpoint.names()}
    assert "layers.1.feed_forward.experts.4.w2.weight" in state
    save_file(state, tmp_path / "consolidated.safetensors")
    params = {
        "dim": 96, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "vocab_size": VOCAB_SIZE, "hidden_dim": 72,
        "head_dim": 16, "norm_eps": config.rms_norm_eps, "rope_theta": config.rope_parameters["rope_theta"],
        "moe": {"num_experts": 5, "num_experts_per_tok": 2},
    }  # fmt: skip
    (tmp_path / "params.json").write_text(json.dumps(params))
    tokens = random_tokens(2, 20, vocab_size=VOCAB_SIZE)
    torch.testing.assert_close(one_pass(opened(tmp_path), tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def rewritten(source: Path, target: Path, format: str, **options: Any) -> Checkpoint:
    checkpoint = open_checkpoint(source)
    tokenizer = tokenizer_source(checkpoint if source.is_dir() else open_checkpoint(source.parent / "a"))
    made = writer(checkpoint, tokenizer, format, **options)
    write_checkpoint(made, target, lambda n_bytes: None)
    return open_checkpoint(target)


def with_tokenizer(folder: Path, theirs: PreTrainedModel) -> Path:
    theirs.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", ["mixtral", "mixtral, beyond its window", "qwen3 moe, dense layers", "olmoe"])
@torch.inference_mode()
def test_a_folder_that_is_written_is_transformers(tmp_path: Path, name: str) -> None:
    """Names of the family, and which layers have no experts; converting refused all mixtures once."""
    theirs = made(name, vocab_size=512)
    source = open_checkpoint(with_tokenizer(tmp_path / "a", theirs))
    again = rewritten(tmp_path / "a", tmp_path / "b", "hf")
    assert again.args == source.args and set(again.names()) == set(source.names())
    assert all(torch.equal(again.read(each), source.read(each)) for each in source.names())
    tokens = random_tokens(2, SEQLEN, vocab_size=512)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    torch.testing.assert_close(read(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe", "olmoe"])
def test_gguf_has_the_experts_of_a_layer_in_a_tensor(tmp_path: Path, name: str) -> None:
    """As llama.cpp wants them, in fp32 what chooses them; blocks stay blocks, expert by expert, on the way back."""
    source = open_checkpoint(with_tokenizer(tmp_path / "a", made(name, vocab_size=512)))
    again = rewritten(tmp_path / "a", tmp_path / "a.gguf", "gguf")
    assert set(again.names()) == set(source.names())
    assert again.args.experts == source.args.experts
    assert all(torch.equal(again.read(each), source.read(each)) for each in source.names())
    blocks = rewritten(tmp_path / "a", tmp_path / "blocks.gguf", "gguf", dtype="q8_0")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "blocks.gguf").tensors}
    assert source.args.experts is not None
    n, hidden = source.args.experts.n_experts, source.args.experts.hidden_dim
    assert list(found["blk.1.ffn_up_exps.weight"].shape) == [96, hidden, n]
    assert found["blk.1.ffn_up_exps.weight"].tensor_type.name == "Q8_0"
    assert found["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"
    same = rewritten(tmp_path / "blocks.gguf", tmp_path / "same.gguf", "gguf")
    assert all(torch.equal(same.read(each), blocks.read(each)) for each in blocks.names())


def test_a_llama_4_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a Llama 4, which cannot be written: use its files"):
        rewritten(with_tokenizer(tmp_path / "a", made("llama 4 scout", vocab_size=512)), tmp_path / "b", "hf")


def test_metas_format_has_no_experts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Meta's format cannot express a mixture of experts: use --format hf"):
        rewritten(with_tokenizer(tmp_path / "a", made("mixtral", vocab_size=512)), tmp_path / "b", "meta")
