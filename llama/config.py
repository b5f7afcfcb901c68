"""The architecture of a LLaMA model as one frozen dataclass, and the reader of Meta's `params.json`.

Knows nothing of files that hold weights, of devices or of ranks.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from llama.checks import check_int, check_number
from llama.files import check_content
from llama.rope_scaling import (
    DynamicScaling,
    FactorScaling,
    Llama3Scaling,
    LongRopeScaling,
    QueryScaling,
    RopeScaling,
    YarnScaling,
)

# Keys of released params.json files that say nothing about the computation.
HARMLESS_KEYS = {
    "max_seq_len", "max_batch_size", "model_parallel_size", "dtype", "name", "_name_or_path", "max_position_embeddings",
}  # fmt: skip

# Keys about the form of the weights, which llama.checkpoint.meta_releases reads.
RELEASE_KEYS = {"quantization_args", "lora_args"}

# Keys that matter to it; the other fields of ModelArgs come from other formats.
USED_KEYS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "head_dim", "hidden_dim", "sliding_window",
}  # fmt: skip

_VISION = "a vision model: only text models are supported"
# Keys that mean another architecture or another kind of weights, and why they are refused.
REFUSED_KEYS = {
    "vision_args": _VISION,
    "vision_chunk_size": _VISION,
    "vision_max_num_chunks": _VISION,
    "vision_num_cross_attention_layers": _VISION,
    "moe_args": "a mixture-of-experts model (Llama 4): only dense LLaMA models are supported",
}

# Keys of params.json about scaled RoPE, and the fields of Llama3Scaling that they set.
ROPE_KEYS = {"rope_scaling_factor": "factor", "rope_high_freq_factor": "high_freq_factor"}
# (dim, n_layers) of the models whose scaled RoPE has factor 32: see D13.
SCALED_BY_32 = {(2048, 16), (3072, 28)}  # Llama 3.2 1B and 3B


# What other families compute otherwise than Llama.
_BEYOND_LLAMA = (
    "attention_chunk", "full_layers", "unrotated_layers", "window_rope_theta", "query_scaling", "qk_norm",
    "output_norms", "layer_norms", "activation",
)  # fmt: skip
_FLAGS = ("use_scaled_rope", "tied_embeddings", "attention_bias", "mlp_bias", "output_norms", "layer_norms")
MAX_LAYERS = 1 << 12  # more than any model has, so that a corrupt file cannot ask for terabytes

# What is normalised of queries and keys: each head before its rotation, each head after it, all heads together before
# it, or each head without a weight, in layers that rotate alone.
QkNorm = Literal["head", "rotated head", "all heads", "unit"]
# Of feed-forwards. SiLU is of a gate, and multiplies; the others are of what goes up, and there is no gate.
Activation = Literal["silu", "relu2", "xielu"]


@dataclass(frozen=True)
class Sight:
    """Which earlier tokens a layer's tokens attend to: those of a window that ends with them, and those of a chunk.

    window: tokens, the last itself included; chunk: tokens from one multiple of it to the next; None: all.
    """

    window: int | None = None
    chunk: int | None = None

    def reaches(self, length: int) -> bool:
        """Tell whether the last of `length` tokens attends to the first, and so do all between."""
        return min(self.window or length, self.chunk or length) >= length


@dataclass(frozen=True)
class ModelArgs:
    """The architecture, under the names of Meta's params.json; wrong values raise ValueError.

    n_kv_heads, head_dim and hidden_dim (rows of w1 and w3) follow from the other fields when left out. vocab_size
    -1 means "ask the tokenizer". max_seq_len and max_batch_size limit a run and shape no weight.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = None  # type: ignore[assignment]  # resolved below, as are all that start as None
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    use_scaled_rope: bool = False
    max_batch_size: int = 32
    max_seq_len: int = 2048
    head_dim: int = None  # type: ignore[assignment]
    hidden_dim: int = None  # type: ignore[assignment]
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False  # the output projection is the embedding table
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None  # tokens that a token attends to, itself included; None: all
    rotary_dim: int | None = None  # leading dimensions of a head that are rotated; None: all
    score_factor: float = 1.0  # of attention's scores, beside 1 / sqrt(head_dim)
    attention_chunk: int | None = None  # tokens attend to those of their chunk of so many; None: to all
    full_layers: tuple[int, ...] = ()  # which have neither a window nor chunks
    unrotated_layers: tuple[int, ...] = ()
    window_rope_theta: float | None = None  # of layers with a window, whose RoPE is not scaled; None: as in the others
    query_scaling: QueryScaling | None = None  # of unrotated layers; of all, where all are rotated
    qk_norm: QkNorm | None = None
    output_norms: bool = False  # norms are of what attention and feed-forward add, not of what they are given
    layer_norms: bool = False  # norms have a mean and a bias, too
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        def resolve(name: str, value: Any) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        check_int("n_layers", self.n_layers, most=MAX_LAYERS)
        for name in ("dim", "n_heads", "multiple_of", "max_batch_size", "max_seq_len"):
            check_int(name, getattr(self, name))
        for name in ("norm_eps", "rope_theta", "score_factor"):
            check_number(name, getattr(self, name))
        for name in _FLAGS:
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            raise ValueError(f"rope_scaling must be one of the scaling classes, got {self.rope_scaling!r}")
        if self.vocab_size != -1:
            check_int("vocab_size", self.vocab_size)
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        resolve("n_kv_heads", self.n_heads)
        resolve("head_dim", self.dim // self.n_heads)
        resolve("hidden_dim", _ffn_hidden_dim(self.dim, self.ffn_dim_multiplier, self.multiple_of))
        if self.use_scaled_rope:
            resolve("rope_scaling", Llama3Scaling(32.0 if (self.dim, self.n_layers) in SCALED_BY_32 else 8.0))
        for name in ("n_kv_heads", "head_dim", "hidden_dim"):
            check_int(name, getattr(self, name))
        for name in ("sliding_window", "attention_chunk", "rotary_dim"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name))
        for name in ("full_layers", "unrotated_layers"):
            layers = getattr(self, name)
            if not isinstance(layers, tuple) or any(type(i) is not int or not 0 <= i < self.n_layers for i in layers):
                raise ValueError(f"{name} must be numbers of layers below {self.n_layers}, got {layers!r}")
        if self.window_rope_theta is not None:
            check_number("window_rope_theta", self.window_rope_theta)
        if self.query_scaling is not None and not isinstance(self.query_scaling, QueryScaling):
            raise ValueError(f"query_scaling must be a QueryScaling, got {self.query_scaling!r}")
        for name, known in (("qk_norm", (None, *get_args(QkNorm))), ("activation", get_args(Activation))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if self.rotary_dim == self.head_dim:
            object.__setattr__(self, "rotary_dim", None)
        for factors in _factors_of_pairs(self.rope_scaling):
            if len(factors) != (self.rotary_dim or self.head_dim) // 2:
                raise ValueError(f"{len(factors)} rope factors do not fit head_dim {self.rotary_dim or self.head_dim}")
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1:
            raise ValueError(f"YaRN needs a rope_theta above 1, got {self.rope_theta}")
        if isinstance(self.rope_scaling, DynamicScaling) and self.head_dim <= 2:
            raise ValueError(f"dynamic RoPE scaling needs a head_dim above 2, got {self.head_dim}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embeddings rotate pairs")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            raise ValueError(f"rotary_dim {self.rotary_dim} must be even, and at most head_dim {self.head_dim}")

    @property
    def is_plain(self) -> bool:
        """Whether every layer computes what Llama's do."""
        fields = ModelArgs.__dataclass_fields__
        return all(getattr(self, name) == fields[name].default for name in _BEYOND_LLAMA)

    @property
    def is_gated(self) -> bool:
        """Whether feed-forwards have w1, a gate."""
        return self.activation == "silu"

    def sight(self, layer: int) -> Sight:
        """Return which earlier tokens those of a layer attend to."""
        return Sight() if layer in self.full_layers else Sight(self.sliding_window, self.attention_chunk)

    def norms_heads(self, layer: int) -> bool:
        """Tell whether a layer normalises its queries and keys."""
        return self.qk_norm is not None and (self.qk_norm != "unit" or layer not in self.unrotated_layers)


def read_params(path: Path) -> ModelArgs:
    """Read Meta's or Mistral's params.json; raise ValueError for a key that is neither used nor known to be harmless.

    A key of null means the same as none.
    """
    params = {key: value for key, value in read_json_object(path).items() if value is not None}
    for key in params.keys() & REFUSED_KEYS:
        raise ValueError(f"{path} has {key!r}: {REFUSED_KEYS[key]}")
    fields = {key: value for key, value in params.items() if key not in HARMLESS_KEYS | RELEASE_KEYS}
    factors = {name: fields.pop(key) for key, name in ROPE_KEYS.items() if key in fields}
    unknown = sorted(fields.keys() - USED_KEYS)
    if unknown:
        raise ValueError(f"{path} has unknown keys {', '.join(unknown)}: this architecture is not supported")
    try:
        args = ModelArgs(**fields)
        if args.rope_scaling is None:
            return args
        return dataclasses.replace(args, rope_scaling=dataclasses.replace(args.rope_scaling, **factors))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; raise ValueError that names the file and where it is broken."""
    check_content(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def with_keys_of_file(error: ValueError, keys: Mapping[str, str]) -> str:
    """Return what an error of ModelArgs says, with the keys of a file in place of the fields that they set."""
    return re.sub(r"\w+", lambda word: keys.get(word[0], word[0]), str(error))


def _factors_of_pairs(scaling: RopeScaling | None) -> tuple[tuple[float, ...], ...]:
    """Return the lists of factors, one for each rotated pair, that a scaling has."""
    if isinstance(scaling, LongRopeScaling):
        return scaling.short_factors, scaling.long_factors
    return (scaling.factors,) if isinstance(scaling, FactorScaling) else ()


def _ffn_hidden_dim(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """Return 2/3 of 4 * dim, times the multiplier, rounded up to multiple_of (the rule of Meta's FeedForward)."""
    hidden_dim = 2 * (4 * dim) // 3
    if multiplier is not None:
        check_number("ffn_dim_multiplier", multiplier)
        hidden_dim = int(multiplier * hidden_dim)
    return multiple_of * math.ceil(hidden_dim / multiple_of)
