"""The C structures that kernels take, which mirror those of csrc/*.h field by field, and their numbers and sizes."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import get_args

import torch
from torch import Tensor

from llama.config import Activation, Router

# Most tokens that the kernels take at once, as in csrc/weights.h, and most for which they beat a matrix unit's
# products: see D32.
MAX_FEW_TOKENS = 64
FEW_TOKENS = 16
PAGE_SIZE = 16  # positions of a page of the cache, as in csrc/attention.h and cache.py
TILE_ROWS = 16  # rows of packed blocks that are stored together: see D31

# Parts of a layer, for `run_layers`.
PROJECTION, ATTENTION, FEED_FORWARD = 1, 2, 4

# What a chosen expert counts, as in csrc/experts.h.
ROUTER_IDS = {name: i for i, name in enumerate(get_args(Router))}
ACTIVATION_IDS = {name: i for i, name in enumerate(get_args(Activation))}
# HeadNorm in norms.h; "all heads" of several ranks is the caller's.
HEAD_NORM_IDS = {None: 0, "head": 1, "unit": 1, "rotated head": 2, "all heads": 3}
HEADS_OF_RANKS = 4
FLOAT_TYPE_IDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BLOCK_TYPE_IDS = {
    name: 3 + i
    for i, name in enumerate(
        ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q5_0", "Q5_1", "Q5_K", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS")
    )
}
# Values of a block, and the bytes of the heads and of the codes of 16 rows of one block each (blocks.h).
PACKED_SIZES = {
    "Q8_0": (32, 32, 512),
    "Q4_0": (32, 32, 256),
    "Q4_1": (32, 64, 256),
    "Q5_0": (32, 32, 320),
    "Q5_1": (32, 64, 320),
    "IQ4_NL": (32, 32, 256),
    "Q2_K": (256, 576, 1024),
    "Q3_K": (256, 288, 1536),
    "Q4_K": (256, 320, 2048),
    "Q5_K": (256, 320, 2560),
    "Q6_K": (256, 288, 3072),
    "IQ4_XS": (256, 160, 2048),
}


class WeightView(ctypes.Structure):
    """Weight in weights.h: a matrix (rows, columns), its bias, or null, and its LowRankView, or null."""

    _fields_ = [
        ("type", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("data", c_void_p),
        ("bias", c_void_p),
        ("low_rank", c_void_p),
    ]


class LowRankView(ctypes.Structure):
    """LowRank in weights.h: what adapters add to a matrix (rows, columns)."""

    _fields_ = [("a", WeightView), ("b", c_void_p)]
    tiles: Tensor  # (tiles of rows, r, TILE_ROWS), fp32: what b points at


class NormView(ctypes.Structure):
    """Norm in norms.h; by default none."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class SightView(ctypes.Structure):
    """Sight in attention.h; 0 is all."""

    _fields_ = [("window", c_int64), ("chunk", c_int64)]


class ActivationView(ctypes.Structure):
    """Activation in activations.h; by default SiLU, of a gate."""

    _fields_ = [("kind", c_int32), ("slopes", c_void_p)]


class Layer(ctypes.Structure):
    """Layer in plan.h."""

    _fields_ = [
        *((name, WeightView) for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")),
        *((name, NormView) for name in ("attention_norm", "ffn_norm", "attention_output_norm", "ffn_output_norm")),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("sight", SightView),
        *((name, c_int32) for name in ("head_norm", "q_rotation", "k_rotation")),
        ("activation", ActivationView),
        ("experts", c_void_p),
    ]


class Expert(ctypes.Structure):
    """Expert in experts.h."""

    _fields_ = [(name, WeightView) for name in ("w1", "w2", "w3")]


class ExpertsView(ctypes.Structure):
    """Experts in experts.h."""

    _fields_ = [
        ("gate", WeightView),
        ("experts", ctypes.POINTER(Expert)),
        *((name, c_int32) for name in ("n", "active", "router")),
    ]


class LayersInput(ctypes.Structure):
    """LayersInput in plan.h: what layers read and write beside their weights."""

    _fields_ = [
        *((name, c_int32) for name in ("n_tokens", "n_rows", "pages_per_row", "n_pages")),
        *((name, c_int32) for name in ("dim", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "cache_type")),
        *((name, c_void_p) for name in ("positions", "rows", "page_table", "rotations", "keys", "values")),
        *((name, c_void_p) for name in ("x", "q", "k", "out")),
        ("eps", c_float),
        ("threads", c_int32),
    ]
