"""params.json of every released family is understood, and what is not understood is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama.checkpoint.params_json import HARMLESS_KEYS, REFUSED_KEYS, read_params
from llama.config import ModelArgs
from llama.rope_scaling import Llama3Scaling

# The released files, and the hidden size that the released weights have.
LLAMA1_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1}
LLAMA2_70B = {
    "dim": 8192,
    "multiple_of": 4096,
    "ffn_dim_multiplier": 1.3,
    "n_heads": 64,
    "n_kv_heads": 8,
    "n_layers": 80,
    "norm_eps": 1e-05,
    "vocab_size": -1,
}
LLAMA3_8B = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "multiple_of": 1024,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
}
LLAMA31 = {"use_scaled_rope": True}
LLAMA31_405B = LLAMA3_8B | LLAMA31 | {"dim": 16384, "n_layers": 126, "n_heads": 128, "multiple_of": 4096}
LLAMA32_1B = LLAMA3_8B | LLAMA31 | {"dim": 2048, "n_layers": 16, "multiple_of": 256, "ffn_dim_multiplier": 1.5}
LLAMA32_3B = LLAMA32_1B | {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0}
CODE_LLAMA_7B = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "multiple_of": 256,
    "ffn_dim_multiplier": 1.0,
    "norm_eps": 1e-5,
    "rope_theta": 1000000,
}
RELEASED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama 1 7B": (LLAMA1_7B, {"hidden_dim": 11008, "head_dim": 128, "n_kv_heads": 32, "vocab_size": -1}),
    "Llama 1 13B": (LLAMA1_7B | {"dim": 5120, "n_heads": 40, "n_layers": 40}, {"hidden_dim": 13824, "head_dim": 128}),
    "Llama 1 65B": (LLAMA1_7B | {"dim": 8192, "n_heads": 64, "n_layers": 80}, {"hidden_dim": 22016}),
    "Llama 2 7B": (LLAMA1_7B | {"norm_eps": 1e-05}, {"hidden_dim": 11008, "norm_eps": 1e-5, "rope_theta": 10000.0}),
    "Llama 2 70B": (LLAMA2_70B, {"hidden_dim": 28672, "head_dim": 128, "n_kv_heads": 8}),
    "Llama 3 8B": (LLAMA3_8B, {"hidden_dim": 14336, "rope_scaling": None, "rope_theta": 500000.0, "n_kv_heads": 8}),
    "Llama 3 70B": (
        LLAMA3_8B | {"dim": 8192, "n_heads": 64, "n_layers": 80, "multiple_of": 4096},
        {"hidden_dim": 28672},
    ),
    "Llama 3.1 8B": (LLAMA3_8B | LLAMA31, {"hidden_dim": 14336, "rope_scaling": Llama3Scaling(8.0, 1.0, 4.0, 8192)}),
    "Llama 3.1 405B": (
        LLAMA31_405B | {"ffn_dim_multiplier": 1.2},
        {"hidden_dim": 53248, "rope_scaling": Llama3Scaling(8.0)},
    ),
    "Llama 3.2 1B": (
        LLAMA32_1B,
        {"hidden_dim": 8192, "head_dim": 64, "rope_scaling": Llama3Scaling(32.0, 1.0, 4.0, 8192)},
    ),
    "Llama 3.2 3B": (LLAMA32_3B, {"hidden_dim": 8192, "head_dim": 128, "rope_scaling": Llama3Scaling(32.0)}),
    "Code Llama 7B": (CODE_LLAMA_7B, {"hidden_dim": 11008, "rope_theta": 1000000, "vocab_size": -1}),
    "Code Llama 34B": (
        CODE_LLAMA_7B | {"dim": 8192, "n_layers": 48, "n_heads": 64, "n_kv_heads": 8},
        {"hidden_dim": 22016},
    ),
}


def write(folder: Path, params: Any) -> Path:
    path = folder / "params.json"
    path.write_text(params if isinstance(params, str) else json.dumps(params))
    return path


@pytest.mark.parametrize("name", RELEASED)
def test_released_params_give_the_released_shapes(tmp_path: Path, name: str) -> None:
    params, expected = RELEASED[name]
    args = read_params(write(tmp_path, params))
    for key in params.keys() - expected.keys():
        assert getattr(args, key) == params[key], key
    for key, value in expected.items():
        assert getattr(args, key) == value, key


@pytest.mark.parametrize("key", sorted(HARMLESS_KEYS))
def test_harmless_keys_change_nothing(tmp_path: Path, key: str) -> None:
    """A max_seq_len of a released file once overrode the user's."""
    assert read_params(write(tmp_path, LLAMA3_8B | {key: 7})) == read_params(write(tmp_path, LLAMA3_8B))


@pytest.mark.parametrize("key", sorted(REFUSED_KEYS))
def test_other_architectures_are_refused_in_words_of_their_own(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}.*(quantized|vision|mixture)"):
        read_params(write(tmp_path, LLAMA3_8B | {key: {"scheme": "int4"}}))


def test_unknown_keys_are_named_all_at_once(tmp_path: Path) -> None:
    """A key dropped in silence is a wrong model that still talks."""
    with pytest.raises(ValueError, match=r"params\.json has unknown keys attention_bias, q_lora_rank"):
        read_params(write(tmp_path, LLAMA3_8B | {"q_lora_rank": 64, "attention_bias": True}))


def test_a_key_of_null_means_the_same_as_none(tmp_path: Path) -> None:
    """Mistral's files say null for what a model has not, and Python's writers for what was left out."""
    nulls = {"quantization_args": None, "moe": None, "sliding_window": None, "multiple_of": None}
    plain = {key: value for key, value in LLAMA3_8B.items() if key != "multiple_of"}
    assert read_params(write(tmp_path, plain | nulls)) == read_params(write(tmp_path, plain))


def test_the_factors_of_scaled_rope_can_be_given(tmp_path: Path) -> None:
    path = write(tmp_path, LLAMA3_8B | LLAMA31 | {"rope_scaling_factor": 16, "rope_high_freq_factor": 2})
    assert read_params(path).rope_scaling == Llama3Scaling(16, 1.0, 2, 8192)


def test_one_factor_of_scaled_rope_can_be_given_alone(tmp_path: Path) -> None:
    """rope_high_freq_factor alone was dropped in silence."""
    path = write(tmp_path, LLAMA32_1B | {"rope_high_freq_factor": 2})
    assert read_params(path).rope_scaling == Llama3Scaling(32.0, 1.0, 2, 8192)
    path = write(tmp_path, LLAMA32_1B | {"rope_scaling_factor": 16})
    assert read_params(path).rope_scaling == Llama3Scaling(16, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"x"', "{'dim': 1}", '{"dim": 1,}', "\x00" * 40, "[" * 100_000, "<html>", "﻿{}"],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_no_json_object_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    """100,000 brackets once ended in a RecursionError."""
    with pytest.raises(ValueError, match=r"params\.json"):
        read_params(write(tmp_path, text))


def test_bytes_that_are_no_text_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match=r"params\.json is not valid JSON"):
        read_params(tmp_path / "params.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dim", "4096"),
        ("dim", 4096.0),
        ("dim", True),
        ("dim", 0),
        ("dim", -4096),
        ("dim", 10**30),
        ("dim", [4096]),
        ("n_layers", 0),
        ("n_layers", 1 << 23),
        ("n_heads", {}),
        ("n_heads", 33),
        ("n_kv_heads", 7),
        ("n_kv_heads", 64),
        ("n_kv_heads", "8"),
        ("vocab_size", 0),
        ("vocab_size", -2),
        ("vocab_size", 1e5),
        ("multiple_of", 0),
        ("ffn_dim_multiplier", "1.3"),
        ("ffn_dim_multiplier", -1),
        ("ffn_dim_multiplier", 1e308),
        ("ffn_dim_multiplier", 10**400),
        ("ffn_dim_multiplier", float("nan")),
        ("norm_eps", 0),
        ("norm_eps", "1e-5"),
        ("norm_eps", float("inf")),
        ("rope_theta", -1.0),
        ("rope_theta", 10**400),
        ("rope_theta", False),
        ("use_scaled_rope", "no"),
        ("use_scaled_rope", 1),
        ("head_dim", 0),
        ("head_dim", 65),
        ("head_dim", 64.0),
        ("hidden_dim", -1),
        ("rope_scaling", {"factor": 8}),
        ("rope_scaling", 8),
        ("tied_embeddings", "yes"),
        ("rope_scaling_factor", "8"),
        ("rope_scaling_factor", 0),
        ("rope_high_freq_factor", 0.5),
        ("rope_high_freq_factor", []),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_wrong_values_are_errors_that_name_the_key(tmp_path: Path, key: str, value: Any) -> None:
    """Each of these once could reach the model, and ended there in a TypeError or an OverflowError."""
    path = write(tmp_path, LLAMA3_8B | LLAMA31 | {key: value})
    with pytest.raises(ValueError, match=rf"params\.json.*{MENTIONED_AS.get(key, key)}"):
        read_params(path)


MENTIONED_AS = {"rope_scaling_factor": "factor", "rope_high_freq_factor": "high_freq_factor"}


def test_args_are_frozen() -> None:
    with pytest.raises(AttributeError):
        ModelArgs().dim = 5  # type: ignore[misc]


def test_every_truncated_params_json_is_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    whole = json.dumps({"dim": 2048, "n_layers": 16, "n_heads": 32, "ffn_dim_multiplier": 1.5, "use_scaled_rope": True})
    for length in range(len(whole)):
        path.write_text(whole[:length])
        with pytest.raises(ValueError, match=r"params\.json"):
            read_params(path)
