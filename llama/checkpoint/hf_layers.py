"""Read from a Hugging Face `config.json` what layers do otherwise than each other: windows, and rotations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama.checkpoint.family import Family
from llama.checkpoint.hf_rope import true_or_false
from llama.checks import check_int

LAYER_TYPES = {"full_attention", "sliding_attention"}


def read_layers(config: Mapping[str, Any], family: Family, n_layers: int) -> dict[str, Any]:
    """Return the fields of ModelArgs that say which layers have a sliding window, and which are not rotated."""
    is_rotated = _rotated(config, n_layers) if family.unrotated == "listed" else [True] * n_layers
    window = config.get("sliding_window")
    has_window = [False] * n_layers if window is None else _windowed(config, family, is_rotated)
    if family.unrotated == "without window" and window is not None:
        is_rotated = has_window
    layers = range(n_layers)
    return {
        "sliding_window": window if any(has_window) else None,
        "full_layers": tuple(i for i in layers if not has_window[i]) if any(has_window) else (),
        "unrotated_layers": tuple(i for i in layers if not is_rotated[i]),
    }


def _windowed(config: Mapping[str, Any], family: Family, is_rotated: list[bool]) -> list[bool]:
    """Tell of each layer whether a window counts in it. Llama's own code has none, whatever a file says."""
    n_layers, kinds = len(is_rotated), config.get("layer_types")
    layers = range(n_layers)
    if family.window in ("none", "all"):
        return [family.window == "all"] * n_layers
    if family.window == "if used" and not true_or_false(config, "use_sliding_window"):
        return [False] * n_layers
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != n_layers or not LAYER_TYPES.issuperset(map(str, kinds)):
            raise ValueError(f"layer_types must be a list of {n_layers}, each of {sorted(LAYER_TYPES)}, got {kinds!r}")
        return [kind == "sliding_attention" for kind in kinds]
    if family.window == "if used":
        full = config.get("max_window_layers", 28)  # the first layers
        check_int("max_window_layers", full + 1 if type(full) is int else full)
        return [i >= full for i in layers]
    if family.window == "unrotated if used":
        return [true_or_false(config, "use_sliding_window") and not rotated for rotated in is_rotated]
    if family.window == "pattern":
        return _by_pattern(config.get("sliding_window_pattern"), n_layers)
    if family.window == "after first of four":
        return [i % 4 != 0 for i in layers]
    return [family.window == "listed" or i % 4 != 3 for i in layers]


def _by_pattern(pattern: object, n_layers: int) -> list[bool]:
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:  # local and global
        return [pattern[i % len(pattern)] == "L" for i in range(n_layers)]
    if type(pattern) is not int or pattern < 1:
        raise ValueError(f"sliding_window_pattern must be a number of layers or letters L and G, got {pattern!r}")
    return [i % pattern != pattern - 1 for i in range(n_layers)]


def _rotated(config: Mapping[str, Any], n_layers: int) -> list[bool]:
    """Tell of each layer whether it is rotated: where no_rope_layers, despite its name, has a 1 for it."""
    rotates = config.get("no_rope_layers")
    if not rotates:
        step = config.get("no_rope_layer_interval", 4)
        check_int("no_rope_layer_interval", step)
        return [i % step != step - 1 for i in range(n_layers)]
    if not isinstance(rotates, list) or len(rotates) < n_layers or any(each not in (0, 1) for each in rotates):
        raise ValueError(f"no_rope_layers must be a list of {n_layers}, each 0 or 1, got {rotates!r}")
    return [each == 1 for each in rotates[:n_layers]]
