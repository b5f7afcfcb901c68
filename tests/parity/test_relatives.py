"""Families that are a Llama inside, from their own folders and GGUF files, give transformers' logits."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ApertusConfig,
    ArceeConfig,
    AutoModelForCausalLM,
    CwmConfig,
    Ernie4_5Config,
    GraniteConfig,
    HeliumConfig,
    InternLM3Config,
    IQuestCoderConfig,
    Ministral3Config,
    MinistralConfig,
    NemotronConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    SeedOssConfig,
    StableLmConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama.checkpoint import open_checkpoint
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.rope import scaled_frequencies
from tests.checkpoints import BYTE_VOCAB_SIZE, write_byte_tokenizer
from tests.gguf_files import write_gguf
from tests.hugging_face import check_conversion, opened
from tests.models import one_pass, random_tokens

VOCAB_SIZE = 101
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 96, "intermediate_size": 144, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 2, "pad_token_id": None}
WIDE = {**SIZES, "head_dim": 24}
THETA = {"rope_type": "default", "rope_theta": 5000.0}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SCALES = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 0.6,
    "rms_norm_eps": 1e-2,  # so that its share in folding shows
}


def long_rope(pairs: int, original: int) -> dict[str, Any]:
    short, long = ([base + 0.1 * i for i in range(pairs)] for base in (1.0, 3.0))
    settings = {"rope_type": "longrope", "rope_theta": 5000.0, "short_factor": short, "long_factor": long}
    return {"rope_parameters": settings, "original_max_position_embeddings": original, "max_position_embeddings": 256}


# Name: the configuration, its settings, and how many tokens are compared.
RELATIVES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "qwen2": (Qwen2Config, {**SIZES, "rope_parameters": THETA}, 40),
    "qwen2, tied, yarn": (Qwen2Config, {**SIZES, "tie_word_embeddings": True, "rope_parameters": YARN}, 100),
    "qwen2, window": (
        Qwen2Config,
        {**SIZES, "use_sliding_window": True, "sliding_window": 10, "max_window_layers": 0},
        60,
    ),
    "seed_oss": (SeedOssConfig, {**WIDE, "residual_dropout": 0.0, "attention_dropout": 0.0}, 40),
    "seed_oss, all biases": (SeedOssConfig, {**WIDE, "attention_out_bias": True, "mlp_bias": True}, 40),
    "granite": (GraniteConfig, {**SIZES, **SCALES}, 40),
    "granite, tied": (GraniteConfig, {**SIZES, **SCALES, "tie_word_embeddings": True}, 40),
    "granite, biases": (GraniteConfig, {**SIZES, **SCALES, "attention_bias": True, "mlp_bias": True}, 40),
    "minicpm": (GraniteConfig, {**SIZES, **SCALES, "attention_multiplier": 0.25}, 40),
    "phi3": (Phi3Config, {**SIZES, "rope_parameters": THETA}, 40),
    "phi3, window": (Phi3Config, {**SIZES, "sliding_window": 10}, 60),
    "phi3, long, within": (Phi3Config, {**SIZES, **long_rope(8, 64)}, 60),
    "phi3, long, beyond": (Phi3Config, {**SIZES, **long_rope(8, 64)}, 100),
    "phi4 mini": (
        Phi3Config,
        {**SIZES, "tie_word_embeddings": True, "rope_parameters": {**THETA, "partial_rotary_factor": 0.75}},
        40,
    ),
    "internlm3": (InternLM3Config, {**WIDE, "rope_parameters": THETA}, 40),
    "internlm3, biases": (InternLM3Config, {**WIDE, "attention_bias": True, "mlp_bias": True}, 40),
    "ernie4_5": (Ernie4_5Config, {**WIDE, "tie_word_embeddings": True}, 40),
    "ernie4_5, biases": (Ernie4_5Config, {**WIDE, "use_bias": True, "tie_word_embeddings": False}, 40),
    "helium": (HeliumConfig, {**SIZES, "head_dim": 16}, 40),
    "ministral": (MinistralConfig, {**WIDE, "sliding_window": 10}, 60),
    "ministral3": (
        Ministral3Config,
        {**WIDE, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.0}},
        100,
    ),
    "cwm": (CwmConfig, {**WIDE, "sliding_window": 512, "max_position_embeddings": 256, "rope_parameters": LLAMA3}, 100),
    "iquestcoder": (IQuestCoderConfig, {**WIDE, "rope_parameters": THETA}, 40),
    "arcee": (ArceeConfig, {**SIZES, "rope_parameters": YARN}, 100),
    "arcee, biases": (ArceeConfig, {**SIZES, "attention_bias": True, "mlp_bias": True}, 40),
    "nemotron": (NemotronConfig, {**WIDE, "norm_eps": 1e-2, "rope_parameters": THETA}, 40),
    "nemotron, biases": (
        NemotronConfig,
        {**SIZES, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        40,
    ),
    "apertus": (ApertusConfig, {**SIZES, "rope_parameters": LLAMA3}, 100),
    "apertus, biases": (
        ApertusConfig,
        {**SIZES, "attention_bias": True, "tie_word_embeddings": True, "rope_parameters": THETA},
        40,
    ),
    "stablelm": (StableLmConfig, {**SIZES, "use_qkv_bias": True, "layer_norm_eps": 1e-2}, 40),
    "stablelm, no biases": (
        StableLmConfig,
        {**SIZES, "hidden_size": 192, "rope_parameters": {**THETA, "partial_rotary_factor": 0.5}},
        40,
    ),
}


def made(name: str, **changes: Any) -> PreTrainedModel:
    """A model with random weights, of which no two parts are alike; norms and biases too."""
    config_cls, settings, _ = RELATIVES[name]
    return of_config(config_cls(**copy.deepcopy(settings | changes)))  # transformers writes into dictionaries


def of_config(config: Any) -> Any:
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    for key, weight in model.named_parameters():
        if weight.dim() == 2:
            spread = 1.0 if "embed" in key else weight.shape[1] ** -0.5
            weight.data.normal_(std=spread, generator=generator)
        else:
            weight.data.normal_(mean=0.0 if key.endswith("bias") else 1.0, std=0.1, generator=generator)
    return model.eval().requires_grad_(False)


def assert_same(path: Path, theirs: PreTrainedModel, seqlen: int) -> None:
    tokens = random_tokens(2, seqlen, vocab_size=VOCAB_SIZE)
    expected = theirs(tokens).logits
    assert expected.std() > 0.3  # else a wrong model would be close, too
    torch.testing.assert_close(one_pass(opened(path), tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", RELATIVES)
@torch.inference_mode()
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    theirs = made(name)
    theirs.save_pretrained(tmp_path)
    assert_same(tmp_path, theirs, RELATIVES[name][2])


@pytest.mark.parametrize("name", ["arcee", "nemotron", "apertus", "stablelm"])
@torch.inference_mode()
def test_what_a_config_leaves_out_is_as_transformers_has_it(tmp_path: Path, name: str) -> None:
    """Files of older versions, and by hand, say less than transformers writes."""
    config_cls, _, _ = RELATIVES[name]
    theirs = of_config(config_cls(**SIZES, max_position_embeddings=16384))
    theirs.save_pretrained(tmp_path)
    said = {**SIZES, "model_type": name, "max_position_embeddings": 16384}
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert_same(tmp_path, theirs, 40)
    # Beyond the original context, where long wavelengths show.
    args, expected = open_checkpoint(tmp_path).args, theirs.model.rotary_emb.inv_freq
    assert 2 * len(expected) == (args.rotary_dim or args.head_dim)
    torch.testing.assert_close(scaled_frequencies(2 * len(expected), args.rope_theta, args.rope_scaling), expected)


def relabelled(folder: Path, names: dict[str, str], **config: Any) -> None:
    """Give a saved folder's tensors other names, part by part, and its config.json other keys; None leaves one out."""
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for part, other in names.items():
            name = name.replace(part, other)
        state[name] = tensor
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text()) | config
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


# As the authors' own code on the hub has them; transformers has no class for these families.
EXAONE_NAMES = {
    "model.layers.": "transformer.h.",
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "self_attn.o_proj": "attn.attention.out_proj",
    "self_attn": "attn.attention",
    "mlp.gate_proj": "mlp.c_fc_0",
    "mlp.up_proj": "mlp.c_fc_1",
    "mlp.down_proj": "mlp.c_proj",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
}
EXAONE_KEYS = {"architectures": ["ExaoneForCausalLM"], "model_type": "exaone", "num_layers": 2}
EXAONE_KEYS |= {"num_hidden_layers": None, "rms_norm_eps": None, "layer_norm_epsilon": 1e-5}
EXAONE_KEYS |= {"hidden_act": None, "activation_function": "silu"}


@torch.inference_mode()
def test_exaone_is_llama_under_other_names(tmp_path: Path) -> None:
    theirs = made("iquestcoder", rms_norm_eps=1e-5, rope_parameters=LLAMA3)
    theirs.save_pretrained(tmp_path)
    relabelled(tmp_path, EXAONE_NAMES, **EXAONE_KEYS)
    assert_same(tmp_path, theirs, 100)


@torch.inference_mode()
def test_minicpm_is_granite_with_multipliers_that_follow_from_sizes(tmp_path: Path) -> None:
    """Its config.json says a depth and a base width, from which two of its three multipliers follow."""
    scales = {"embedding_multiplier": 12.0, "residual_multiplier": 1.4 / math.sqrt(2), "logits_scaling": 96 / 32}
    theirs = made("minicpm", **scales, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    said = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 32, **dict.fromkeys(SCALES)}
    minicpm = {"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", **said, "rms_norm_eps": 1e-2}
    relabelled(tmp_path, {}, **minicpm)
    assert_same(tmp_path, theirs, 40)


@torch.inference_mode()
def test_telechat3_is_llama_under_another_name(tmp_path: Path) -> None:
    theirs = made("iquestcoder")
    theirs.save_pretrained(tmp_path)
    relabelled(tmp_path, {}, architectures=["TeleChat3ForCausalLM"], model_type="telechat3")
    assert_same(tmp_path, theirs, 40)


def rotated_as_neighbours(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """As llama.cpp's converter reorders Q and K of architectures that rotate neighbours."""
    return rows.reshape(n_heads, 2, len(rows) // n_heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


# Architectures whose queries and keys llama.cpp rotates as neighbours, as Meta's code does.
NEIGHBOURS = ("llama", "granite", "minicpm", "smollm3", "mistral3", "arcee")
F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0


def write_as_gguf(
    path: Path, theirs: PreTrainedModel, arch: str, kind: gguf.GGMLQuantizationType = F32, **keys: Any
) -> None:
    """A model of transformers as llama.cpp's converter writes it: names and keys from the gguf library's tables."""
    config: Any = theirs.config
    names = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), config.num_hidden_layers
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    keys = xielu_keys(theirs) | keys if arch == "apertus" else keys
    metadata = {
        "general.architecture": arch,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        **eps_keys(config, arch),
        f"{arch}.rope.freq_base": float(rope["rope_theta"]),
        f"{arch}.rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "tokenizer.ggml.tokens": [f"token {i}" for i in range(config.vocab_size)],
        **{key.format(arch=arch): value for key, value in keys.items() if not key.endswith(".weight")},
    }
    if head_dim * config.num_attention_heads != config.hidden_size:
        metadata |= {f"{arch}.attention.key_length": head_dim, f"{arch}.attention.value_length": head_dim}
    tensors = {name: (np.array(value, np.float32), F32) for name, value in keys.items() if name.endswith(".weight")}
    for name, tensor in theirs.state_dict().items():
        if (name == "lm_head.weight" and config.tie_word_embeddings) or "act_fn" in name:
            continue
        own = kind if tensor.dim() == 2 else F32
        stored = gguf.quantize(np.ascontiguousarray(tensor.numpy()), own)
        tensor.copy_(torch.from_numpy(np.array(gguf.dequantize(stored, own))).view(tensor.shape))
        if arch == "nemotron" and name.endswith("norm.weight"):
            stored = stored + np.float32(1)
        if arch in NEIGHBOURS and ("q_proj" in name or "k_proj" in name):
            n_heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            stored = rotated_as_neighbours(stored, n_heads)
        tensors[names.get_name(name, (".weight", ".bias")) or name] = stored, own
    write_gguf(path, metadata, tensors)


def eps_keys(config: Any, arch: str) -> dict[str, float]:
    keys = {"rms_norm_eps": "rms_epsilon", "norm_eps": "epsilon", "layer_norm_eps": "epsilon"}
    return {
        f"{arch}.attention.layer_norm_{key}": getattr(config, own) for own, key in keys.items() if hasattr(config, own)
    }


def llama3_tensors(config: Any) -> dict[str, Any]:
    """The factors of wavelengths that llama.cpp's converter works out for Llama 3.1's rule."""
    plain, scaled = 5000.0 ** (-torch.arange(0, 16, 2) / 16), ROPE_INIT_FUNCTIONS["llama3"](config)[0]
    return {"rope_freqs.weight": (plain / scaled).numpy()}


def xielu_keys(model: Any) -> dict[str, Any]:
    """Of each layer, as the tensors have them: llama.cpp computes softplus itself."""
    parts = ("alpha_p", "alpha_n", "beta", "eps")
    return {f"xielu.{part}": [float(getattr(layer.mlp.act_fn, part)) for layer in model.model.layers] for part in parts}


def long_tensors(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return {
        "rope_factors_short.weight": rope["short_factor"],
        "rope_factors_long.weight": rope["long_factor"],
        "{arch}.rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "{arch}.rope.scaling.attn_factor": math.sqrt(1 + math.log(256 / 64) / math.log(64)),
    }


def scale_keys(config: Any) -> dict[str, Any]:
    return {
        "{arch}.embedding_scale": config.embedding_multiplier,
        "{arch}.residual_scale": config.residual_multiplier,
        "{arch}.logit_scale": config.logits_scaling,
        "{arch}.attention.scale": config.attention_multiplier,
    }


def no_keys(config: Any) -> dict[str, Any]:
    return {}


def yarn_keys(config: Any) -> dict[str, Any]:
    return {
        "{arch}.rope.scaling.type": "yarn",
        "{arch}.rope.scaling.factor": 4.0,
        "{arch}.rope.scaling.original_context_length": 32,
    }


# Name: its architecture in GGUF, and what that has beside the usual keys.
GGUFS: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "qwen2": ("qwen2", no_keys),
    "qwen2, tied, yarn": ("qwen2", yarn_keys),
    "seed_oss": ("seed_oss", no_keys),
    "granite": ("granite", scale_keys),
    "granite, tied": ("granite", scale_keys),
    "phi3": ("phi3", no_keys),
    "phi3, window": ("phi3", lambda config: {"phi3.attention.sliding_window": 10}),
    "phi3, long, beyond": ("phi3", long_tensors),
    "phi4 mini": ("phi3", no_keys),
    "ernie4_5": ("ernie4_5", no_keys),
    "internlm3": ("llama", no_keys),
    "iquestcoder": ("exaone", no_keys),  # the same weights under EXAONE's name
    "arcee": ("arcee", yarn_keys),
    "nemotron": ("nemotron", lambda config: {"{arch}.rope.scaling.type": "none"}),
    "nemotron, biases": ("nemotron", no_keys),
    "apertus": ("apertus", llama3_tensors),
    "apertus, biases": ("apertus", lambda config: {"xielu.beta": 0.5, "xielu.eps": -1e-6}),  # of all layers
    "stablelm": ("stablelm", lambda config: {"{arch}.use_parallel_residual": True}),  # which llama.cpp does not read
    "stablelm, no biases": ("stablelm", no_keys),
    # MiniCPM's keys are Granite's, but for the scale of scores, which it has not.
    "minicpm": ("minicpm", lambda config: scale_keys(config) | {"{arch}.attention.scale": None}),
}


@pytest.mark.parametrize("name", GGUFS)
@torch.inference_mode()
def test_gguf_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    theirs = made(name)
    arch, keys = GGUFS[name]
    write_as_gguf(tmp_path / "m.gguf", theirs, arch, **keys(theirs.config))
    assert_same(tmp_path / "m.gguf", theirs, RELATIVES[name][2])


@pytest.mark.parametrize(
    ("name", "changes", "keys", "said"),
    [
        ("stablelm", {"use_parallel_residual": True}, {}, "attention beside the feed-forward is not supported"),
        ("apertus", {}, {"xielu.beta": [0.5]}, r"xielu\.beta must be a number, or 2 numbers, found \[0\.5\]"),
        ("apertus", {}, {"xielu.alpha_n": None}, r"xielu\.alpha_n must be a number"),
        (
            "nemotron",
            {},
            {"nemotron.attention.layer_norm_epsilon": None},
            r"nemotron\.attention\.layer_norm_epsilon must be of type float",
        ),
    ],
)
def test_a_gguf_file_that_is_refused_says_why(
    tmp_path: Path, name: str, changes: dict[str, Any], keys: dict[str, Any], said: str
) -> None:
    theirs = made(name, **changes)
    with torch.inference_mode():
        write_as_gguf(tmp_path / "m.gguf", theirs, GGUFS[name][0], **keys)
    with pytest.raises(ValueError, match=said) as caught:
        open_checkpoint(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "qwen2",
        "seed_oss",
        "granite, tied",
        "phi3",
        "phi4 mini",
        "internlm3",
        "ernie4_5",
        "arcee",
        "nemotron, biases",
        "apertus",
        "stablelm",
    ],
)
@torch.inference_mode()
def test_blocks_stay_blocks(tmp_path: Path, name: str) -> None:
    """Rows in another order, fused tensors and multipliers do not cost the blocks of any matrix of a layer."""
    theirs = made(name, **whole_blocks(RELATIVES[name][1]))
    assert_blocks_stay(tmp_path, theirs, *GGUFS[name], RELATIVES[name][2])


def whole_blocks(settings: dict[str, Any]) -> dict[str, int]:
    """Sizes with which rows of all matrices are whole blocks."""
    return {"intermediate_size": 160} | ({"head_dim": 32} if "head_dim" in settings else {})


def assert_blocks_stay(
    folder: Path, theirs: PreTrainedModel, arch: str, keys: Callable[[Any], dict[str, Any]], seqlen: int
) -> None:
    write_as_gguf(folder / "m.gguf", theirs, arch, Q8_0, **keys(theirs.config))
    assert_same(folder / "m.gguf", theirs, seqlen)
    checkpoint = open_checkpoint(folder / "m.gguf")
    floats = [
        each for each in checkpoint.names() if len(checkpoint.shape(each)) > 1 and not checkpoint.block_type(each)
    ]
    assert floats == (["tok_embeddings.weight"] if arch == "granite" else [])


@pytest.mark.parametrize(
    "name",
    [
        "qwen2",
        "granite, tied",
        "phi3, long, beyond",
        "ernie4_5",
        "arcee",
        "nemotron, biases",
        "apertus",
        "apertus, biases",
        "stablelm",
    ],
)
@torch.inference_mode()
def test_conversion_writes_a_folder_that_transformers_reads(tmp_path: Path, name: str) -> None:
    """As a Llama with biases that are zeros, as a Granite where scores have another scale, or as what it was."""
    check_conversion(made(name, vocab_size=BYTE_VOCAB_SIZE, eos_token_id=257), tmp_path, RELATIVES[name][2])


# The architecture that each is written under: its own, but where llama.cpp's has no such biases, or no window.
WRITTEN = {
    "qwen2": "qwen2",
    "qwen2, tied, yarn": "qwen2",
    "qwen2, window": "llama",
    "seed_oss": "seed_oss",
    "seed_oss, all biases": "llama",
    "granite, tied": "granite",
    "granite, biases": "granite",
    "phi3": "phi3",
    "phi3, long, beyond": "phi3",
    "phi4 mini": "phi3",
    "internlm3, biases": "llama",
    "ernie4_5": "ernie4_5",
    "helium": "llama",
    "ministral": "llama",
    "ministral3": "mistral3",
    "iquestcoder": "llama",
    "arcee": "arcee",
    "nemotron, biases": "nemotron",
    "apertus": "apertus",
    "apertus, biases": "apertus",
    "stablelm": "stablelm",
}


@pytest.mark.parametrize("name", WRITTEN)
@torch.inference_mode()
def test_conversion_writes_gguf_under_an_architecture_that_says_the_same(tmp_path: Path, name: str) -> None:
    """With the same weights and keys, llama.cpp gave the same logits, but for windows, which it leaves out."""
    theirs = made(name, vocab_size=BYTE_VOCAB_SIZE, eos_token_id=257)
    assert_written(tmp_path, theirs, RELATIVES[name][2], WRITTEN[name])


def assert_written(folder: Path, theirs: PreTrainedModel, seqlen: int, arch: str) -> None:
    """A folder becomes a GGUF file of the architecture, which computes the same."""
    theirs.save_pretrained(folder / "own")
    write_byte_tokenizer(folder / "own")
    checkpoint = open_checkpoint(folder / "own")
    path = folder / "m.gguf"
    write_checkpoint(writer(checkpoint, tokenizer_source(checkpoint), "gguf"), path, lambda n_bytes: None)
    assert gguf.GGUFReader(path).fields["general.architecture"].contents() == arch
    tokens = random_tokens(2, seqlen, vocab_size=BYTE_VOCAB_SIZE)
    torch.testing.assert_close(one_pass(opened(path), tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-4)


def test_what_a_format_cannot_say_is_not_converted(tmp_path: Path) -> None:
    made("phi4 mini", vocab_size=BYTE_VOCAB_SIZE).save_pretrained(tmp_path)
    write_byte_tokenizer(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    for form in ("hf", "meta"):
        with pytest.raises(ValueError, match=r"rotary_dim 12|12 of them"):
            writer(checkpoint, tokenizer_source(checkpoint), form)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("ministral", {"layer_types": ["full_attention"]}, "layer_types must be a list of 2"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier must be a positive number"),
        ("granite", {"model_type": "granitemoeshared"}, "which is a mixture of experts"),
        ("minicpm", {"model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"]}, "scale_emb is missing"),
        ("phi3", {"num_attention_heads": 4, "head_dim": 16}, r"qkv_proj\.weight has shape .* asks for 128 rows"),
        ("phi3", {"rope_scaling": {**THETA, "partial_rotary_factor": "half"}}, "must be a positive number"),
        ("phi3, long, within", {"rope_scaling": {"type": "su", "short_factor": 1.0}}, "short_factor must be a list"),
        (
            "phi3",
            {"rope_scaling": {**long_rope(8, 64)["rope_parameters"], "partial_rotary_factor": 0.5}},
            "8 rope factors do not fit head_dim 8",
        ),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual True is not supported: only attention"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm True is not supported"),
        ("arcee", {"hidden_act": "silu"}, "hidden_act 'silu': only 'relu2' is supported"),
        ("nemotron", {"norm_eps": 0}, "norm_eps must be a positive number"),
        ("apertus", {"num_hidden_layers": 3}, r"layers\.2\.mlp\.act_fn\.alpha_p must be a number, but is missing"),
        ("internlm3", {"bias": "no"}, "bias must be true or false"),
        ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"]}, "only llama, mistral"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    made(name).save_pretrained(tmp_path)
    relabelled(tmp_path, {}, **changes)
    with pytest.raises(ValueError, match=said) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
