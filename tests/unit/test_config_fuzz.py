"""Whatever a params.json holds, reading it ends in ModelArgs or in a ValueError that names the file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from llama.config import ModelArgs, read_params

BASE = {
    "dim": 2048,
    "n_layers": 16,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "multiple_of": 256,
    "ffn_dim_multiplier": 1.5,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "rope_scaling_factor": 32.0,
    "head_dim": 64,
}
NUMBERS = [0, -1, 1, 2, 3, 7, 10**6, 2**31, 2**63, 10**400, 0.0, -0.5, 1e-320, 1e308, float("nan"), float("inf")]
VALUES: list[Any] = [*NUMBERS, None, True, False, "", "8", "x" * 1000, [], [1], {}, {"a": {"b": []}}]


def read(path: Path) -> ModelArgs | None:
    try:
        args = read_params(path)
    except ValueError as error:
        assert str(path) in str(error)
        return None
    assert all(
        type(getattr(args, name)) is int
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim")
    )
    assert args.n_heads % args.n_kv_heads == 0
    return args


def test_mutated_values_end_in_args_or_a_value_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "params.json"
    accepted = 0
    for _ in range(600):
        params: dict[str, Any] = dict(BASE)
        for _ in range(rng.randint(1, 3)):
            key = rng.choice([*BASE, "hidden_dim", "rope_scaling", "rope_high_freq_factor", "tied_embeddings", "zzz"])
            if rng.random() < 0.15:
                params.pop(key, None)
            else:
                params[key] = rng.choice(VALUES)
        path.write_text(json.dumps(params))
        accepted += read(path) is not None
    assert 20 < accepted < 500, "the mutations are too harmless or too harmful to mean anything"


def test_mutated_bytes_end_in_args_or_a_value_error(tmp_path: Path) -> None:
    rng = random.Random(1)
    path = tmp_path / "params.json"
    original = json.dumps(BASE).encode()
    for _ in range(600):
        data = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            if rng.random() < 0.5:
                data[at] = rng.choice(b'0123456789eE.-+{}[]",: \x00\xff\xc3')
            else:
                del data[at : at + rng.randint(1, 8)]
        path.write_bytes(data)
        read(path)


def test_every_truncation_is_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    original = json.dumps(BASE).encode()
    for length in range(len(original)):
        path.write_bytes(original[:length])
        assert read(path) is None, length
