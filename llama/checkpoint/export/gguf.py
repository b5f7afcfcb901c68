"""Write one GGUF file of architecture "llama", dense or in blocks, made by the `gguf` library or by plain rounding."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama.checkpoint.base import WEIGHT_DTYPES, Progress
from llama.checkpoint.export.plan import ExportPlan
from llama.checkpoint.gguf import convert_rows
from llama.checkpoint.gguf_config import OPTIONAL_GGUF_KEYS, REQUIRED_GGUF_KEYS, ROPE_FACTORS
from llama.checkpoint.load import global_shapes
from llama.checkpoint.names import stored_name
from llama.config import ModelArgs
from llama.quantization.gguf_blocks import BLOCK_TYPES
from llama.quantization.plain_blocks import GROUPS, plain_blocks
from llama.rope import scaled_frequencies
from llama.rope_scaling import FactorScaling, LinearScaling, Llama3Scaling, YarnScaling

# What --dtype is called by ggml, and the code of a file that has mostly that.
GGUF_FILE_TYPES = {
    "float32": ("F32", 0),
    "float16": ("F16", 1),
    "bfloat16": ("BF16", 32),
    "q4_0": ("Q4_0", 2),
    "q4_1": ("Q4_1", 3),
    "q5_0": ("Q5_0", 8),
    "q5_1": ("Q5_1", 9),
    "q8_0": ("Q8_0", 7),
    "q2_k": ("Q2_K", 10),
    "q3_k": ("Q3_K", 11),
    "q4_k": ("Q4_K", 14),
    "q5_k": ("Q5_K", 16),
    "q6_k": ("Q6_K", 18),
    "iq4_nl": ("IQ4_NL", 25),
    "iq4_xs": ("IQ4_XS", 30),
}


class GGUFFileWriter:
    """Write a GGUF file. Making the writer raises ValueError for what the format or the type cannot express."""

    def __init__(self, plan: ExportPlan, type_name: str) -> None:
        """Plan a file whose matrices have the type type_name, one of GGUF_FILE_TYPES."""
        import gguf

        self.plan = plan
        name, self.file_type = GGUF_FILE_TYPES[type_name]
        self.qtype = gguf.GGMLQuantizationType[name]
        args = plan.args
        if plan.tokenizer.metadata is None:
            raise ValueError("this tokenizer cannot be written to GGUF: use --format hf")
        self.metadata = {**_metadata(args, plan.context_len), **plan.tokenizer.metadata}
        self.shapes = global_shapes(args)
        elements, _ = gguf.GGML_QUANT_SIZES[self.qtype]
        for name, shape in self.shapes.items():
            if len(shape) > 1 and shape[-1] % elements:
                raise ValueError(
                    f"{plan.own_name(name)} has rows of {shape[-1]}, {type_name} needs a multiple of {elements}"
                )

    @property
    def nbytes(self) -> int:
        return sum(self._nbytes(shape) for shape in self.shapes.values())

    def write(self, path: Path, progress: Progress) -> None:
        import gguf

        writer = gguf.GGUFWriter(path, "llama")
        writer.add_file_type(self.file_type)
        if self.qtype.name not in WEIGHT_DTYPES:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in self.metadata.items():
            _add_value(writer, key, value)
        factors = _rope_factors(self.plan.args)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        for name, shape in self.shapes.items():
            float32 = np.dtype(np.float32)  # the library looks at raw_dtype instead
            writer.add_tensor_info(
                stored_name(name, "gguf"), shape, float32, self._nbytes(shape), raw_dtype=self._type(shape)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for name, tensor in self.plan.read_all(self.shapes):
            shape = self.shapes[name]
            if self.qtype.name == "F16":
                self.plan.as_dtype(name, tensor, torch.float16)
            writer.write_tensor_data(_encode(tensor, self._type(shape)))
            progress(self._nbytes(shape))
        writer.flush()
        for file in writer.fout or ():
            os.fsync(file.fileno())
        writer.close()

    def _type(self, shape: tuple[int, ...]) -> Any:
        """Return the ggml type of a tensor. Norms stay in fp32, as llama.cpp asks for."""
        import gguf

        return self.qtype if len(shape) > 1 else gguf.GGMLQuantizationType.F32

    def _nbytes(self, shape: tuple[int, ...]) -> int:
        import gguf

        elements, size = gguf.GGML_QUANT_SIZES[self._type(shape)]
        return torch.Size(shape).numel() // elements * size


def _encode(tensor: Tensor, qtype: Any) -> np.ndarray:
    """Return a tensor's values as bytes of that ggml type."""
    from gguf import GGML_QUANT_SIZES, quantize

    if qtype.name in WEIGHT_DTYPES:
        return tensor.to(WEIGHT_DTYPES[qtype.name]).contiguous().view(torch.uint8).numpy()
    elements, size = GGML_QUANT_SIZES[qtype]
    values = tensor.float().contiguous().view(-1, elements).numpy()
    blocks = np.empty((len(values), size), np.uint8)
    if qtype.name in GROUPS:
        block_type = BLOCK_TYPES[qtype.name]
        convert_rows(values, blocks, elements, lambda rows: plain_blocks(torch.from_numpy(rows), block_type).numpy())
    else:
        convert_rows(values, blocks, elements, lambda rows: quantize(rows, qtype))
    return blocks


def _metadata(args: ModelArgs, context_len: int) -> dict[str, Any]:
    """Return the architecture under GGUF's keys; raise ValueError when they cannot express its RoPE scaling."""
    metadata: dict[str, Any] = {
        "llama.vocab_size": args.vocab_size,
        "llama.context_length": context_len,
        **{key: getattr(args, field) for field, key in {**REQUIRED_GGUF_KEYS, **OPTIONAL_GGUF_KEYS}.items()},
        "llama.attention.value_length": args.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(args.norm_eps),
        "llama.rope.dimension_count": args.head_dim,
        "llama.rope.freq_base": float(args.rope_theta),
    }
    if args.rotary_dim is not None or args.score_factor != 1.0:
        raise ValueError(
            f"GGUF's Llama cannot express rotary_dim {args.rotary_dim} and score_factor "
            f"{args.score_factor}: use --format hf"
        )
    if args.sliding_window is not None:
        metadata["llama.attention.sliding_window"] = args.sliding_window
    scaling = args.rope_scaling
    if isinstance(scaling, LinearScaling):
        metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float(scaling.factor)}
    elif isinstance(scaling, YarnScaling) and scaling.attention_factor is None and scaling.truncate:
        metadata |= {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": float(scaling.factor),
            "llama.rope.scaling.original_context_length": scaling.old_context_len,
            "llama.rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
            "llama.rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
        }
    elif scaling is not None and _rope_factors(args) is None:
        raise ValueError(f"GGUF cannot express {scaling}: use --format hf")
    return metadata


def _rope_factors(args: ModelArgs) -> np.ndarray | None:
    """Return Llama 3.1's rule as GGUF stores it: a wavelength factor for each rotated pair, (head_dim / 2,)."""
    if isinstance(args.rope_scaling, FactorScaling):
        return np.array(args.rope_scaling.factors, np.float32)
    if not isinstance(args.rope_scaling, Llama3Scaling):
        return None
    plain = scaled_frequencies(args.head_dim, args.rope_theta, None).double()
    return (plain / scaled_frequencies(args.head_dim, args.rope_theta, args.rope_scaling)).float().numpy()


def _add_value(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_string(key, value)
