"""Families whose layers differ from Llama's, or from each other, give transformers' logits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CwmConfig,
    Exaone4Config,
    HunYuanDenseV1Config,
    Ministral3Config,
    MinistralConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Olmo2Config,
    Olmo3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from llama.checkpoint import open_checkpoint
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import writer
from llama.model import Transformer
from tests.checkpoints import BYTE_VOCAB_SIZE, write_byte_tokenizer
from tests.hugging_face import check_conversion, check_greedy_tokens, opened
from tests.models import one_pass, random_tokens
from tests.parity.test_relatives import (
    LLAMA3,
    SIZES,
    THETA,
    VOCAB_SIZE,
    YARN,
    assert_blocks_stay,
    assert_same,
    assert_written,
    relabelled,
    whole_blocks,
    write_as_gguf,
)

SIZES = {**SIZES, "num_hidden_layers": 4, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {**SIZES, "head_dim": 24}
MANY_KV = {**SIZES, "num_key_value_heads": 3}
MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
SOME = {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2}
ALPHA = {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 1.0, "alpha": 50.0}
BY_POSITION = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4}

# Name: the configuration, its settings, and how many tokens are compared.
LAYERED: dict[str, tuple[Any, dict[str, Any], int]] = {
    "qwen3": (Qwen3Config, {**WIDE, "rope_parameters": THETA, "tie_word_embeddings": True}, 40),
    "qwen3, biases, yarn": (Qwen3Config, {**WIDE, "rope_parameters": YARN, "attention_bias": True}, 100),
    "qwen3, windows": (Qwen3Config, {**WIDE, **SOME}, 40),
    "qwen2, windows": (Qwen2Config, {**SIZES, **SOME}, 40),
    "qwen2, listed": (Qwen2Config, {**SIZES, **SOME, "layer_types": MIXED}, 40),
    "olmo2": (Olmo2Config, {**MANY_KV, "rope_parameters": THETA}, 40),
    "olmo2, biases": (Olmo2Config, {**SIZES, "attention_bias": True}, 40),
    "olmo3": (Olmo3Config, {**MANY_KV, "sliding_window": 10}, 40),
    "olmo3, yarn": (Olmo3Config, {**SIZES, "sliding_window": 10, "rope_parameters": {"full_attention": YARN}}, 100),
    "exaone4": (Exaone4Config, {**SIZES, "sliding_window": 10, "rope_parameters": LLAMA3}, 100),
    "exaone4, listed": (Exaone4Config, {**SIZES, "sliding_window": 10, "layer_types": MIXED}, 40),
    "exaone4, no window": (
        Exaone4Config,
        {**SIZES, "sliding_window": None, "layer_types": ["full_attention"] * 4, "tie_word_embeddings": True},
        40,
    ),
    "hunyuan": (HunYuanDenseV1Config, {**WIDE, "rope_parameters": ALPHA}, 40),
    "hunyuan, biases": (HunYuanDenseV1Config, {**WIDE, "attention_bias": True, "tie_word_embeddings": True}, 40),
    "smollm3": (SmolLM3Config, {**SIZES, "rope_parameters": YARN}, 100),
    "smollm3, listed": (SmolLM3Config, {**SIZES, "no_rope_layers": [1, 0, 0, 1], "tie_word_embeddings": False}, 40),
    "smollm3, windows": (
        SmolLM3Config,
        {**SIZES, "use_sliding_window": True, "sliding_window": 10, "no_rope_layer_interval": 2, "mlp_bias": True},
        40,
    ),
    "cwm": (CwmConfig, {**WIDE, "sliding_window": 10, "rope_parameters": LLAMA3}, 100),
    "ministral, listed": (MinistralConfig, {**WIDE, "sliding_window": 10, "layer_types": MIXED}, 40),
    "ministral3": (Ministral3Config, {**WIDE, "rope_parameters": BY_POSITION}, 100),
    "ministral3, window": (Ministral3Config, {**WIDE, "sliding_window": 10, "rope_parameters": BY_POSITION}, 100),
}


def made(name: str, **changes: Any) -> PreTrainedModel:
    """A model with random weights, of which no two parts are alike; norms and biases too."""
    config_cls, settings, _ = LAYERED[name]
    return randomised(
        AutoModelForCausalLM.from_config(config_cls(**copy.deepcopy(settings | changes)), dtype=torch.float32)
    )


def randomised(model: Any) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(7)
    for key, weight in model.named_parameters():
        if weight.dim() == 2:
            spread = 1.0 if "embed" in key else weight.shape[1] ** -0.5
            weight.data.normal_(std=spread, generator=generator)
        else:
            weight.data.normal_(mean=0.0 if key.endswith("bias") else 1.0, std=0.2, generator=generator)
    return model.eval().requires_grad_(False)


def in_chunks(model: Transformer, tokens: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Logits of tokens (bsz, seqlen) that are read in chunks of these sizes, over and over."""
    (bsz, seqlen), parts, start = tokens.shape, list[Tensor](), 0
    cache = model.new_cache(bsz, seqlen)
    while start < seqlen:
        size = sizes[len(parts) % len(sizes)]
        parts.append(model(tokens[:, start : start + size], torch.full((bsz,), start), cache))
        start += size
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", LAYERED)
@torch.inference_mode()
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    """At once, in chunks of a prompt and tokens between them: a mask of the first alone would not show it."""
    theirs, seqlen = made(name), LAYERED[name][2]
    theirs.save_pretrained(tmp_path)
    tokens = random_tokens(2, seqlen, vocab_size=VOCAB_SIZE)
    expected, model = theirs(tokens).logits, opened(tmp_path)
    assert expected.std() > 0.3  # else a wrong model would be close, too
    for found in (one_pass(model, tokens), in_chunks(model, tokens, (1, 7, 1, 1, 20))):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def by_layer(pattern: list[bool] | None = None, **keys: Any) -> Callable[[Any], dict[str, Any]]:
    """Keys of a window of 10 in the layers of a pattern, and others."""
    windows = {"{arch}.attention.sliding_window": 10, "{arch}.attention.sliding_window_pattern": pattern}
    others = {f"{{arch}}.{key}": value for key, value in keys.items()}
    return lambda config: (windows if pattern else {}) | others


YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
# Name: its architecture in GGUF, and what that has beside the usual keys.
GGUFS: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "qwen3": ("qwen3", by_layer()),
    "qwen3, biases, yarn": ("qwen3", by_layer(**YARN_KEYS)),
    "olmo2": ("olmo2", by_layer()),
    "olmo3": ("olmo2", by_layer([True, True, True, False])),
    "olmo3, yarn": ("olmo2", by_layer([True, True, True, False], **YARN_KEYS, **{"rope.freq_base_swa": 500000.0})),
    "exaone4, listed": ("exaone4", by_layer([True, False, False, True])),
    "exaone4, no window": ("exaone4", by_layer()),
    "hunyuan": (
        "hunyuan-dense",
        by_layer(**{"rope.freq_base": 5000.0 * 50.0 ** (24 / 22), "rope.scaling.type": "none"}),
    ),
    "smollm3": ("smollm3", by_layer(**YARN_KEYS)),
    "ministral3": (
        "mistral3",
        by_layer(**YARN_KEYS, **{"rope.scaling.yarn_log_multiplier": 1.0, "attention.temperature_scale": 0.4}),
    ),
}


@pytest.mark.parametrize("name", GGUFS)
@torch.inference_mode()
def test_gguf_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    theirs = made(name)
    arch, keys = GGUFS[name]
    write_as_gguf(tmp_path / "m.gguf", theirs, arch, **keys(theirs.config))
    assert_same(tmp_path / "m.gguf", theirs, LAYERED[name][2])


@pytest.mark.parametrize("name", ["qwen3", "olmo2", "olmo3", "exaone4, listed", "smollm3", "ministral3"])
@torch.inference_mode()
def test_blocks_stay_blocks(tmp_path: Path, name: str) -> None:
    theirs = made(name, **whole_blocks(LAYERED[name][1]))
    assert_blocks_stay(tmp_path, theirs, *GGUFS[name], LAYERED[name][2])


# Name: what it is written as.
CONVERTED = {
    "qwen3, biases, yarn": "qwen3",
    "qwen2, listed": "smollm3",
    "olmo3, yarn": "olmo3",
    "exaone4, listed": "exaone4",
    "hunyuan": "hunyuan_v1_dense",
    "smollm3, windows": "smollm3",
    "cwm": "ministral",
    "ministral3": "ministral3",
}


@pytest.mark.parametrize("name", CONVERTED)
@torch.inference_mode()
def test_conversion_writes_a_folder_that_transformers_reads(tmp_path: Path, name: str) -> None:
    """As the first family that means the same, with its names of tensors."""
    theirs = made(name, vocab_size=BYTE_VOCAB_SIZE)
    assert check_conversion(theirs, tmp_path, LAYERED[name][2]) == CONVERTED[name]


# Name: the architecture that it is written under.
WRITTEN = {
    "qwen3, biases, yarn": "qwen3",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "olmo3, yarn": "olmo2",
    "exaone4": "exaone4",
    "exaone4, listed": "exaone4",
    "hunyuan": "hunyuan-dense",
    "smollm3": "smollm3",
    "ministral3": "mistral3",
}


@pytest.mark.parametrize("name", WRITTEN)
@torch.inference_mode()
def test_conversion_writes_gguf_under_an_architecture_that_says_the_same(tmp_path: Path, name: str) -> None:
    """Windows of some layers and the scale of queries were once refused, though keys of these families say them."""
    assert_written(tmp_path, made(name, vocab_size=BYTE_VOCAB_SIZE), LAYERED[name][2], WRITTEN[name])


@pytest.mark.parametrize(
    ("name", "form", "said"),
    [
        ("qwen3", "meta", "Meta's format cannot express qk_norm 'head'"),
        ("cwm", "gguf", r"GGUF cannot express full_layers \(0,\)"),
        ("smollm3", "meta", r"cannot express unrotated_layers \(3,\)"),
    ],
)
def test_what_a_format_cannot_say_is_not_converted(tmp_path: Path, name: str, form: str, said: str) -> None:
    """Meta's code would read the weights, and compute something else with them."""
    made(name, vocab_size=BYTE_VOCAB_SIZE, rope_parameters=None).save_pretrained(tmp_path)
    write_byte_tokenizer(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=said):
        writer(checkpoint, tokenizer_source(checkpoint), form)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["olmo3", "exaone4", "ministral3"])
def test_greedy_tokens_equal_transformers(tmp_path: Path, name: str) -> None:
    """From the folder to the tokens, beyond the window and the original context, in the engine's pages."""
    check_greedy_tokens(made(name, vocab_size=BYTE_VOCAB_SIZE), tmp_path)


def with_eye(name: str) -> PreTrainedModel:
    """A model of text inside of one that sees pictures."""
    eye = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    eye |= {"num_attention_heads": 2, "head_dim": 8, "patch_size": 4, "image_size": 16}
    config_cls, settings, _ = LAYERED[name]
    config = Mistral3Config(text_config={**settings, "model_type": config_cls.model_type}, vision_config=eye)
    config.tie_word_embeddings = False
    return randomised(Mistral3ForConditionalGeneration(config).float())


@pytest.mark.parametrize(
    "prefixes", [{}, {"language_model.model.": "model.language_model.", "language_model.lm": "lm"}]
)
@torch.inference_mode()
def test_what_sees_pictures_is_left_out(
    tmp_path: Path, prefixes: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Ministral 3 is released inside of a model that sees pictures, whose tensors two versions of it call otherwise."""
    theirs = with_eye("ministral3")
    theirs.save_pretrained(tmp_path)
    relabelled(tmp_path, prefixes)
    caplog.set_level("INFO")
    assert_same(tmp_path, theirs, LAYERED["ministral3"][2])
    assert "has tensors that are not used: multi_modal_projector" in caplog.text


@torch.inference_mode()
def test_ministral_3_loads_as_it_is_released(tmp_path: Path) -> None:
    """Inside of a model that sees pictures, in FP8, with scales of activations, which were once unexpected tensors."""
    theirs: Any = with_eye("ministral3")
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in [name for name in stored if name.startswith("language_model.model.layers") and "proj" in name]:
        scale = (stored[name].abs().max() / 448).bfloat16()
        stored[name] = (stored[name] / scale).to(torch.float8_e4m3fn)
        module = name.removesuffix(".weight")
        stored |= {f"{module}.weight_scale_inv": scale, f"{module}.activation_scale": torch.tensor(1.0)}
        own = theirs.get_parameter(name.replace("language_model.model.", "model.language_model."))
        own.copy_(stored[name].float() * scale.float())
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    method = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    relabelled(
        tmp_path, {}, quantization_config={**method, "modules_to_not_convert": ["model.vision_tower", "lm_head"]}
    )
    assert_same(tmp_path, theirs, 40)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must be a list of 4, each 0 or 1"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval must be an integer"),
        ("exaone4", {"layer_types": None, "sliding_window_pattern": "LLX"}, "a number of layers or letters L and G"),
        ("qwen2, windows", {"layer_types": None, "max_window_layers": -1}, "max_window_layers must be an integer"),
        ("qwen2, windows", {"layer_types": ["sliding_attention"]}, "layer_types must be a list of 4"),
        ("olmo3", {"sliding_window": 0}, "sliding_window must be an integer from 1"),
        ("olmo3", {"rope_parameters": {"sliding_attention": YARN}}, "scaled RoPE in layers with a window"),
        ("olmo3", {"rope_parameters": {"sliding_attention": 5}}, "must be objects"),
        (
            "ministral3",
            {"rope_parameters": {**YARN, "llama_4_scaling_beta": "x"}},
            "llama_4_scaling_beta must be a pos",
        ),
        ("hunyuan", {"rope_parameters": {**ALPHA, "alpha": -1}}, "alpha must be a positive number"),
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
