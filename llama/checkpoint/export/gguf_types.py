"""Which type each tensor of a GGUF file gets: mixtures as llama.cpp's quantize makes them, so that sizes are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llama.checkpoint.base import WEIGHT_DTYPES
from llama.checkpoint.names import module_name
from llama.config import ModelArgs
from llama.quantization.gguf_blocks import BLOCK_TYPES

# Says of a layer whether its tensor gets a finer type.
Layers = Callable[[int, ModelArgs], bool]


def _all(layer: int, args: ModelArgs) -> bool:
    return True


def _where_shared(layer: int, args: ModelArgs) -> bool:
    """Tell whether 4 or more heads share their values, which are few then."""
    return args.n_heads // args.n_kv_heads >= 4


def _below(count: int) -> Layers:
    return lambda layer, args: layer < count


def _first(part: int) -> Layers:
    """Tell whether a layer is one of the first 1 / part of all."""
    return lambda layer, args: layer < args.n_layers // part


def _ends_and_every_third(layer: int, args: ModelArgs) -> bool:
    eighth = args.n_layers // 8
    return layer < eighth or layer >= 7 * args.n_layers // 8 or (layer - eighth) % 3 == 2


Finer = tuple[tuple[Layers, str], ...]  # the first that holds counts


@dataclass(frozen=True)
class Mixture:
    """What `--dtype` names: a type, what some modules have in its place, and the code of a file that has mostly it."""

    type: str
    code: int  # general.file_type
    finer: Mapping[str, Finer] = field(default_factory=dict)


_Q3_K_M = Mixture(
    "Q3_K",
    12,
    {
        "wv": ((_below(2), "Q5_K"), (_all, "Q4_K")),
        "w2": ((_first(16), "Q5_K"), (_all, "Q4_K")),
        "wo": ((_all, "Q4_K"),),
    },
)
_Q4_K_M = Mixture("Q4_K", 15, dict.fromkeys(("wv", "w2"), ((_ends_and_every_third, "Q6_K"),)))
_Q5_K_M = Mixture("Q5_K", 17, dict.fromkeys(("wv", "w2"), ((_ends_and_every_third, "Q6_K"),)))
_IQ4: Mapping[str, Finer] = {"wv": ((_where_shared, "Q5_K"),), "w2": ((_first(8), "Q5_K"),)}
GGUF_FILE_TYPES = {
    "float32": Mixture("F32", 0),
    "float16": Mixture("F16", 1),
    "bfloat16": Mixture("BF16", 32),
    "q4_0": Mixture("Q4_0", 2),
    "q4_1": Mixture("Q4_1", 3),
    "q5_0": Mixture("Q5_0", 8),
    "q5_1": Mixture("Q5_1", 9),
    "q8_0": Mixture("Q8_0", 7),
    "q2_k": Mixture(
        "Q2_K",
        10,
        {"wv": ((_where_shared, "Q4_K"), (_all, "Q3_K")), "w2": ((_all, "Q3_K"),), "wo": ((_all, "Q3_K"),)},
    ),
    "q3_k": _Q3_K_M,
    "q3_k_s": Mixture("Q3_K", 11),
    "q3_k_m": _Q3_K_M,
    "q3_k_l": Mixture("Q3_K", 13, dict.fromkeys(("wv", "w2", "wo"), ((_all, "Q5_K"),))),
    "q4_k": _Q4_K_M,
    "q4_k_s": Mixture("Q4_K", 14, {"wv": ((_below(4), "Q5_K"),), "w2": ((_first(8), "Q5_K"),)}),
    "q4_k_m": _Q4_K_M,
    "q5_k": _Q5_K_M,
    "q5_k_s": Mixture("Q5_K", 16),
    "q5_k_m": _Q5_K_M,
    "q6_k": Mixture("Q6_K", 18),
    "iq4_nl": Mixture("IQ4_NL", 25, _IQ4),
    "iq4_xs": Mixture("IQ4_XS", 30, _IQ4),
}
# What takes the place of a type of 256 values where rows are not whole blocks of it.
FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}
LAYERS_OF_70B = 80
# Of mixtures of so many experts, wk and wv are Q8_0, and wo is Q5_K in files of these codes.
MIXTRALS_EXPERTS = 8
FINER_IN_MIXTRAL = {
    GGUF_FILE_TYPES[name].code for name in ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs")
}


def type_of(mixture: Mixture, name: str, shape: tuple[int, ...], args: ModelArgs, is_pure: bool = False) -> str:
    """Return the ggml type of a tensor: that of the mixture, what its module has instead, or what its rows fit.

    is_pure: whether all matrices get the mixture's own type. Norms and biases stay in fp32, as llama.cpp asks for.
    """
    if len(shape) < 2 or module_name(name) == "gate":  # what chooses experts, too
        return "F32"
    if mixture.type in WEIGHT_DTYPES:
        return mixture.type
    return fitting(mixture.type if is_pure else _wanted(mixture, name, shape, args), shape[-1])


def fitting(type_name: str, columns: int) -> str:
    """Return a type, or what takes its place where rows are not whole blocks of it."""
    if type_name in WEIGHT_DTYPES or columns % BLOCK_TYPES[type_name].elements == 0:
        return type_name
    instead = FALLBACKS.get(type_name)
    return "F16" if instead is None or columns % BLOCK_TYPES[instead].elements else instead


def _wanted(mixture: Mixture, name: str, shape: tuple[int, ...], args: ModelArgs) -> str:
    module = module_name(name)
    if module == "output" or (module == "tok_embeddings" and args.tied_embeddings):
        is_whole = shape[-1] % BLOCK_TYPES[mixture.type].elements == 0
        return "Q6_K" if mixture.type != "Q8_0" and is_whole else "Q8_0"
    if not name.startswith("layers."):
        return mixture.type
    if args.experts is not None and args.experts.n_experts == MIXTRALS_EXPERTS:
        if module in ("wk", "wv"):
            return "Q8_0"
        if module == "wo":
            return "Q5_K" if mixture.code in FINER_IN_MIXTRAL else mixture.type
    layer = int(name.split(".")[1])
    rules = mixture.finer.get(module, ())
    found = next((type_name for holds, type_name in rules if holds(layer, args)), mixture.type)
    is_70b = args.n_layers == LAYERS_OF_70B and args.n_heads != args.n_kv_heads
    return "Q5_K" if is_70b and module == "wv" and found in ("Q3_K", "Q4_K") else found
