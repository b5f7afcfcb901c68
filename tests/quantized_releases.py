"""Linears as GPTQ, AWQ, compressed-tensors, FP8 and bitsandbytes store them, by the formats' own descriptions.

Nothing of llama's is used, and codes are packed one by one. Each writer draws a matrix (out, in) and returns the
tensors of a linear, by the ends of their names, and the values that they stand for, in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from llama.config import ModelArgs
from tests.checkpoints import random_state, write_byte_tokenizer
from tests.hugging_face import NAMES, hugging_face_model

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}

LINEARS = tuple(name for name in NAMES if ".w" in name)


class Linear(NamedTuple):
    tensors: dict[str, Tensor]
    values: np.ndarray  # float64 (out, in)


Writer = Callable[[int, int, np.random.Generator], Linear]


def pack(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack codes (n, m) along their rows into 32-bit words, the first, or order's first, in the lowest bits."""
    per = 32 // bits
    padded = np.pad(codes.astype(np.uint64), ((0, 0), (0, -codes.shape[1] % per)))
    words = np.zeros((len(codes), padded.shape[1] // per), np.uint64)
    for word in range(words.shape[1]):
        for place in range(per):
            words[:, word] |= padded[:, word * per + (order or range(per))[place]] << np.uint64(bits * place)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def scales_of(n: int, m: int, rng: np.random.Generator, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(rng.uniform(0.002, 0.02, (n, m))).to(dtype)


def gptq(
    bits: int = 4, group: int = 32, *, sym: bool = True, version: int = 1, act: bool = False, dtype: Any = torch.float16
) -> Writer:
    def write(n_out: int, n_in: int, rng: np.random.Generator) -> Linear:
        size = n_in if group == -1 else group
        n_groups = -(-n_in // size)
        order = np.arange(n_in) // size
        if act:
            order = rng.permutation(order)
        codes = rng.integers(0, 2**bits, (n_out, n_in))
        zeros = np.full((n_out, n_groups), 2 ** (bits - 1)) if sym else rng.integers(0, 2**bits, (n_out, n_groups))
        scales = scales_of(n_out, n_groups, rng, dtype)
        stored = (zeros - 1) % 2**bits if version == 1 else zeros
        tensors = {
            "qweight": pack(codes, bits).t().contiguous(),
            "qzeros": pack(stored.T, bits),
            "scales": scales.t().contiguous(),
            "g_idx": torch.from_numpy(order.astype(np.int32)),
        }
        return Linear(tensors, scales.double().numpy()[:, order] * (codes - zeros[:, order]))

    return write


def awq(group: int = 32) -> Writer:
    def write(n_out: int, n_in: int, rng: np.random.Generator) -> Linear:
        size = n_in if group == -1 else group
        codes = rng.integers(0, 16, (n_out, n_in))
        zeros = rng.integers(0, 16, (n_out, n_in // size))
        scales = scales_of(n_out, n_in // size, rng, torch.float16)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {
            "qweight": pack(codes.T, 4, order),
            "qzeros": pack(zeros.T, 4, order),
            "scales": scales.t().contiguous(),
        }
        groups = np.arange(n_in) // size
        return Linear(tensors, scales.double().numpy()[:, groups] * (codes - zeros[:, groups]))

    return write


def packed(
    bits: int = 4, group: int = 32, *, sym: bool = True, act: bool = False, dtype: Any = torch.bfloat16
) -> Writer:
    """compressed-tensors' pack-quantized: codes and zero points have a sign, and are stored with an offset."""

    def write(n_out: int, n_in: int, rng: np.random.Generator) -> Linear:
        size, half = n_in if group == -1 else group, 2 ** (bits - 1)
        groups = np.arange(n_in) // size
        if act:
            groups = rng.permutation(groups)
        codes = rng.integers(-half, half, (n_out, n_in))
        zeros = rng.integers(-half, half, (n_out, n_in // size)) * (not sym)
        scales = scales_of(n_out, n_in // size, rng, dtype)
        tensors = {
            "weight_packed": pack(codes + half, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([n_out, n_in]),
        }
        if not sym:
            tensors["weight_zero_point"] = pack((zeros + half).T, bits).t().contiguous()
        if act:
            tensors["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
        return Linear(tensors, scales.double().numpy()[:, groups] * (codes - zeros[:, groups]))

    return write


def int8(rows: bool = True, *, sym: bool = True) -> Writer:
    def write(n_out: int, n_in: int, rng: np.random.Generator) -> Linear:
        codes = rng.integers(-128, 128, (n_out, n_in))
        scales = scales_of(n_out if rows else 1, 1, rng, torch.bfloat16)
        tensors = {"weight": torch.from_numpy(codes.astype(np.int8)), "weight_scale": scales if rows else scales[0]}
        zeros = np.zeros((len(scales), 1), int)
        if not sym:
            zeros = rng.integers(-128, 128, (len(scales), 1))
            tensors["weight_zero_point"] = torch.from_numpy(zeros.astype(np.int8))
        return Linear(tensors, scales.double().numpy() * (codes - zeros))

    return write


def fp8(tile: tuple[int, int] | None, name: str = "weight_scale", *, flat: bool = False) -> Writer:
    """A scale a tile, where 0 stands for all rows or columns; none: a scale without a shape."""

    def write(n_out: int, n_in: int, rng: np.random.Generator) -> Linear:
        height, width = tile or (n_out, n_in)
        height, width = height or n_out, width or n_in
        weight = torch.from_numpy(rng.normal(0, 60, (n_out, n_in))).clamp(-448, 448).to(torch.float8_e4m3fn)
        scales = scales_of(-(-n_out // height), -(-n_in // width), rng, torch.float32)
        factors = scales.double().numpy()[np.arange(n_out) // height][:, np.arange(n_in) // width]
        stored = scales.reshape(()) if tile is None else scales.flatten() if flat else scales
        return Linear({"weight": weight, name: stored}, weight.double().numpy() * factors)

    return write


# bitsandbytes' tables, as its quant_map has them: quantiles of the normal distribution, and floats of 4 bits.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
FP4 = (0.0, 0.0052083334, 0.6666667, 1.0, 0.33333334, 0.5, 0.16666667, 0.25)
TABLES = {"nf4": NF4, "fp4": (*FP4, *(-value for value in FP4))}


def bitsandbytes(form: str = "nf4", *, nested: bool = True, block: int = 64) -> Writer:
    def write(n_out: int, n_in: int, rng: np.random.Generator) -> Linear:
        n_values = n_out * n_in
        n_blocks = -(-n_values // block)
        codes = rng.integers(0, 16, n_values)
        pairs = np.pad(codes, (0, n_values % 2)).reshape(-1, 2)
        table = np.array(TABLES[form], np.float32)
        state: dict[str, Any] = {
            "quant_type": form, "blocksize": block, "dtype": "bfloat16", "shape": [n_out, n_in],
        }  # fmt: skip
        tensors = {
            "weight": torch.from_numpy((pairs[:, 0] << 4 | pairs[:, 1]).astype(np.uint8)).unsqueeze(1),
            "weight.quant_map": torch.from_numpy(table),
        }
        if nested:
            small = rng.integers(0, 256, n_blocks)
            levels = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
            largest_of = rng.uniform(0.01, 0.02, -(-n_blocks // 256)).astype(np.float32)
            largest = 0.05 + levels[small].astype(np.float64) * largest_of[np.arange(n_blocks) // 256]
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
            tensors |= {
                "weight.absmax": torch.from_numpy(small.astype(np.uint8)),
                "weight.nested_absmax": torch.from_numpy(largest_of),
                "weight.nested_quant_map": torch.from_numpy(levels),
            }
        else:
            stored = rng.uniform(0.02, 0.1, n_blocks).astype(np.float32)
            largest = stored.astype(np.float64)
            tensors["weight.absmax"] = torch.from_numpy(stored)
        described = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors[f"weight.quant_state.bitsandbytes__{form}"] = described
        values = table.astype(np.float64)[codes] * largest[np.arange(n_values) // block]
        return Linear(tensors, values.reshape(n_out, n_in))

    return write


def llm_int8(n_out: int, n_in: int, rng: np.random.Generator) -> Linear:
    codes = rng.integers(-127, 128, (n_out, n_in))
    largest = rng.uniform(0.5, 2, n_out).astype(np.float32)
    tensors = {
        "weight": torch.from_numpy(codes.astype(np.int8)),
        "SCB": torch.from_numpy(largest),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return Linear(tensors, codes * largest.astype(np.float64)[:, None] / 127)


def fp4(form: str = "mxfp4") -> Writer:
    """MXFP4: powers of two for 32 values; NVFP4: 8-bit floats for 16, and one scale that divides them all.

    As compressed-tensors stores them; "blocks" is GPT-OSS's way, and "modelopt" NVIDIA's, whose scale multiplies.
    """

    def write(n_out: int, n_in: int, rng: np.random.Generator) -> Linear:
        codes = rng.integers(0, 16, (n_out, n_in))
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = np.where(codes & 8, -1, 1) * table[codes & 7]
        packed = torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))
        if form in ("nvfp4", "modelopt"):
            stored = torch.from_numpy(rng.uniform(50, 448, (n_out, n_in // 16))).to(torch.float8_e4m3fn)
            tensors = {"weight_packed": packed, "weight_scale": stored, "weight_global_scale": torch.tensor([8192.0])}
            if form == "modelopt":
                tensors = {"weight": packed, "weight_scale": stored, "weight_scale_2": torch.tensor(2.0**-13)}
                tensors["input_scale"] = torch.tensor(0.5)
            return Linear(tensors, values * np.repeat(stored.double().numpy() / 8192, 16, axis=1))
        exponents = rng.integers(117, 123, (n_out, n_in // 32))
        stored = torch.from_numpy(exponents.astype(np.uint8))
        tensors = {"weight_packed": packed, "weight_scale": stored}
        if form == "blocks":
            tensors = {"weight_blocks": packed.view(n_out, n_in // 32, 16), "weight_scales": stored}
        return Linear(tensors, values * np.repeat(2.0 ** (exponents - 127), 32, axis=1))

    return write


def compressed(form: str, bits: int = 4, **weights: Any) -> dict[str, Any]:
    """The quantization_config of compressed-tensors."""
    scheme = {"targets": ["Linear"], "weights": {"num_bits": bits, **weights}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"], "quantization_status": "compressed",
    }  # fmt: skip


def write_release(
    folder: Path, args: ModelArgs, writer: Writer, settings: dict[str, Any], *, lm_head: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Write a model whose linears are a release's; return all values under Meta's names, in float64."""
    state = {name: tensor.half().float() for name, tensor in random_state(args, seed).items()}
    hugging_face_model(args, state).half().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    rng = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in state.items():
        *parts, kind = name.split(".")
        prefix = f"model.layers.{parts[1]}." if parts[0] == "layers" else ""
        module = ".".join(parts[2:]) if prefix else parts[0]
        own = f"{prefix}{NAMES[module]}"
        values[name] = tensor.double()
        if kind == "weight" and (module in LINEARS or (lm_head and module == "output")):
            linear = writer(tensor.shape[0], tensor.shape[1], rng)
            tensors |= {f"{own}.{end}": part for end, part in linear.tensors.items()}
            values[name] = in_metas_order(module, torch.from_numpy(linear.values), args.head_dim)
        else:
            tensors[f"{own}.{kind}"] = tensor.half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    write_byte_tokenizer(folder)
    return values


def in_metas_order(module: str, rows: Tensor, head_dim: int) -> Tensor:
    """Rows of Q and K in Hugging Face's order, one by one in Meta's."""
    if module not in ("attention.wq", "attention.wk"):
        return rows
    order = [head + i // 2 + (i % 2) * head_dim // 2 for head in range(0, len(rows), head_dim) for i in range(head_dim)]
    return rows[order]


def write_meta_release(
    folder: Path, args: ModelArgs, *, spinquant: bool = False, rank: int = 0, zeros: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Write Llama 3.2's quantized release: SpinQuant's, or QLoRA's with adapters of a rank; return what it computes.

    Its values are under Meta's names, in float64, with adapters added and w2's rotation of its inputs undone.
    """
    rng = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, tensor in random_state(args, seed).items():
        values[name] = tensor.double()
        module = name.removesuffix(".weight")
        if "norm" in name:
            tensors[name] = tensor
            continue
        n_out, n_in = tensor.shape
        half, size = (128, n_in) if module in ("tok_embeddings", "output") else (8, 32)
        codes = rng.integers(-half, half, (n_out, n_in))
        scales = torch.from_numpy(rng.uniform(0.5, 1, (n_out, n_in // size)) / half / n_in**0.5).float()
        tensors |= {name: torch.from_numpy(codes.astype(np.int8)), f"{module}.scales": scales}
        if zeros and half == 8:
            tensors[f"{module}.zeros"] = torch.zeros_like(scales)
        values[name] = torch.from_numpy(codes * np.repeat(scales.double().numpy(), size, axis=1))
        if spinquant and module.endswith("w2"):
            signs = [[(-1) ** (i & j).bit_count() for j in range(n_in)] for i in range(n_in)]
            values[name] = values[name] @ torch.tensor(signs).double() / n_in**0.5
        if rank and half == 8:
            a, b = (torch.from_numpy(rng.normal(0, 0.1, shape)).bfloat16() for shape in ((rank, n_in), (n_out, rank)))
            tensors |= {f"{module}.adaptor.A.weight": a, f"{module}.adaptor.B.weight": b}
            values[name] = values[name] + 2 * b.double() @ a.double()
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "consolidated.00.pth")
    settings = {"scheme": "int4_weight_int8_dynamic_activation", "group_size": 32, "spinquant": spinquant}
    lora = {"lora_args": {"rank": rank, "scale": 2.0}} if rank else {}
    params = {
        "dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads, "n_kv_heads": args.n_kv_heads,
        "vocab_size": args.vocab_size, "norm_eps": args.norm_eps, "hidden_dim": args.hidden_dim,
        "head_dim": args.head_dim, "quantization_args": settings, **lora,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    write_byte_tokenizer(folder)
    return values
