"""The architecture of a LLaMA model as one frozen dataclass.

Knows nothing of files that hold weights, of devices or of ranks.
"""

from __future__ import annotations

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

# (dim, n_layers) of the models whose scaled RoPE has factor 32: see D13.
SCALED_BY_32 = {(2048, 16), (3072, 28)}  # Llama 3.2 1B and 3B


# What other families compute otherwise than Llama.
_BEYOND_LLAMA = (
    "attention_chunk", "full_layers", "unrotated_layers", "window_rope_theta", "query_scaling", "qk_norm",
    "output_norms", "layer_norms", "activation",
)  # fmt: skip
_FLAGS = ("use_scaled_rope", "tied_embeddings", "attention_bias", "mlp_bias", "output_norms", "layer_norms")
# More than any model has, so that a corrupt file cannot ask for terabytes.
MAX_LAYERS = 1 << 12
MAX_EXPERTS = 1 << 10

# What is normalised of queries and keys: each head before its rotation, each head after it, all heads together before
# it, or each head without a weight, in layers that rotate alone.
QkNorm = Literal["head", "rotated head", "all heads", "unit"]
# Of feed-forwards. SiLU is of a gate, and multiplies; the others are of what goes up, and there is no gate.
Activation = Literal["silu", "relu2", "xielu"]
# What a chosen expert counts: the softmax of its score among those of the chosen, or among all, times its output; or
# the sigmoid of its score, times its input, as in Llama 4.
Router = Literal["softmax of chosen", "softmax", "sigmoid of input"]


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
class Experts:
    """The feed-forwards of a layer of which each token passes some, in place of one (arXiv:2101.03961, 2401.04088).

    hidden_dim: rows of w1 and w3 of each; shared_hidden_dim: those of one that every token passes beside them, if any.
    dense_layers: those that have one feed-forward, of ModelArgs.hidden_dim.
    """

    n_experts: int
    n_active: int  # that a token passes
    hidden_dim: int
    router: Router = "softmax of chosen"
    shared_hidden_dim: int | None = None
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_int("n_experts", self.n_experts, most=MAX_EXPERTS)
        check_int("n_active", self.n_active, most=self.n_experts)
        check_int("hidden_dim", self.hidden_dim)
        if self.shared_hidden_dim is not None:
            check_int("shared_hidden_dim", self.shared_hidden_dim)
        if self.router not in get_args(Router):
            raise ValueError(f"router must be one of {get_args(Router)}, got {self.router!r}")


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
    experts: Experts | None = None

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
        lists = {name: getattr(self, name) for name in ("full_layers", "unrotated_layers")}
        if self.experts is not None:
            lists["dense_layers"] = self.experts.dense_layers
            if not self.is_gated or self.mlp_bias:
                raise ValueError(f"experts need the activation silu and no mlp_bias, got {self.activation!r}")
        for name, layers in lists.items():
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
    def beyond_llama(self) -> dict[str, Any]:
        """The fields that say what layers compute otherwise than Llama's, with their values."""
        fields = ModelArgs.__dataclass_fields__
        found = {name: getattr(self, name) for name in _BEYOND_LLAMA}
        return {name: value for name, value in found.items() if value != fields[name].default}

    @property
    def is_plain(self) -> bool:
        """Whether every layer computes what Llama's do."""
        return not self.beyond_llama

    @property
    def is_gated(self) -> bool:
        """Whether feed-forwards have w1, a gate."""
        return self.activation == "silu"

    def sight(self, layer: int) -> Sight:
        """Return which earlier tokens those of a layer attend to."""
        return Sight() if layer in self.full_layers else Sight(self.sliding_window, self.attention_chunk)

    @property
    def sights(self) -> set[Sight]:
        """The different sights of layers."""
        return {self.sight(layer) for layer in range(self.n_layers)}

    def experts_of(self, layer: int) -> Experts | None:
        """Return the experts that a layer has; None where it has one feed-forward."""
        return None if self.experts is None or layer in self.experts.dense_layers else self.experts

    def norms_heads(self, layer: int) -> bool:
        """Tell whether a layer normalises its queries and keys."""
        return self.qk_norm is not None and (self.qk_norm != "unit" or layer not in self.unrotated_layers)


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
