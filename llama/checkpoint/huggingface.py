"""Read Hugging Face folders: config.json with safetensors or pytorch_model.bin files, whole or split with an index."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.base import WEIGHT_DTYPES, Reading, dtype_name, needed, positive_int, same_matrix
from llama.checkpoint.expert_tensors import unstacked
from llama.checkpoint.family import ATTENTION, FEED_FORWARD
from llama.checkpoint.hf_config import read_block_types, read_config, read_text_config, token_ids
from llama.checkpoint.mapped_file import Layouts, MappedMemory, map_folder
from llama.checkpoint.multipliers import folded
from llama.checkpoint.names import ROTATED, XIELU_PARTS, NamingScheme, meta_name, module_name, renamed, stored_name
from llama.checkpoint.release_config import read_release
from llama.checkpoint.releases import find_matrices
from llama.checkpoint.shapes import global_shapes
from llama.checkpoint.tensors import (
    FUSED,
    missing_biases,
    norm_offset,
    pair_neighbours,
    part_of_pairs,
    unfused,
    xielu_weight,
)
from llama.config import read_json_object
from llama.quantization.gguf_blocks import BlockType, dequantize
from llama.quantization.released import ReleasedMatrix
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

# What a folder has its weights in, the preferred first: the whole file, the index of a split one.
LAYOUTS: Layouts = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)

NO_WHOLE_MODEL = re.compile(r"^adapter_|-\d{5}-of-\d{5}\.")  # in names of files


def layouts_of(folder: Path) -> Layouts:
    """Return LAYOUTS, or the only file of another name where there is none of these, as AutoGPTQ has called it."""
    if any((folder / name).exists() for layout in LAYOUTS for name in layout):
        return LAYOUTS
    whole = [file.name for file in folder.glob("*.safetensors") if not NO_WHOLE_MODEL.search(file.name)]
    index = [file.name for file in folder.glob("*.safetensors.index.json")]
    if len(index) == 1 or (not index and len(whole) == 1):
        log.info("%s: weights are read from %s", folder, (index or whole)[0])
        return ((whole[0] if not index else LAYOUTS[0][0], index[0] if index else LAYOUTS[0][1]),)
    return LAYOUTS


class HuggingFaceCheckpoint:
    """Read a folder in Hugging Face's layout. Files are mapped; rows of Q and K are put into Meta's order: see D15.

    Weights may be blocks, of types that config.json gives: `read` decodes them. Or they are a quantized release's: see
    D79.
    """

    naming: NamingScheme = "hf"
    pads_vocab = True  # see D16
    tokenizer_metadata = None

    def __init__(self, folder: Path) -> None:
        self.path = folder
        config = read_config(folder / "config.json")
        self.args, stop_tokens, self.family = config.args, config.stop_tokens, config.family
        generation = folder / "generation_config.json"
        if generation.is_file():
            # Its end tokens, and nothing else: sampling is the caller's choice.
            stop_tokens |= token_ids(read_json_object(generation).get("eos_token_id"))
        self.stop_tokens = stop_tokens
        release = read_release(folder)
        tensors = needed(folder, map_folder(folder, layouts_of(folder), any_dtype=release is not None))
        self._mapped = MappedMemory()
        block_types = check_blocks(folder, tensors)
        matrices = {} if release is None else find_matrices(folder, tensors, *release)
        own = self.family.hf_names
        self._block_types = {meta_name(name, "hf"): each for name, each in renamed(folder, block_types, own).items()}
        stored: dict[str, Tensor | ReleasedMatrix] = renamed(folder, {**tensors, **matrices}, own)
        if self.args.experts is not None:
            stored = unstacked(folder, stored, self.args.experts, self.family.hf_transposes_experts)
        parts = unfused(folder, stored, FUSED["hf"], self.args, "hf")
        self._tensors: dict[str, Tensor | ReleasedMatrix] = {meta_name(name, "hf"): tensor for name, tensor in parts}
        if self.args.activation == "xielu":
            self._fold_xielu()
        if matrices:
            self._drop_zero_biases(config.biased)
        for name, shape in missing_biases(folder, self.args, config.biased, self._tensors).items():
            self._tensors[name] = torch.zeros(shape)
        self.factors: Mapping[str, float] = {}
        self.is_quantized = any(self.block_type(name) for name in self._tensors)
        self.rounding = 0.0
        dtypes = {name: tensor.dtype for name, tensor in self._tensors.items() if isinstance(tensor, Tensor)}
        for name, dtype in dtypes.items():
            if dtype not in WEIGHT_DTYPES.values() and name not in self._block_types:
                raise ValueError(
                    f"{folder}: {stored_name(name, 'hf')} has dtype {dtype}, only {', '.join(WEIGHT_DTYPES)} work"
                )
        if self.args.tied_embeddings:
            self._tie()
        self.args, self.factors = folded(self.args, config.multipliers)
        no_dtype = self.is_quantized or not dtypes
        self.dtype = torch.bfloat16 if no_dtype else next(iter(dtypes.values()))

    @property
    def model_name(self) -> str:
        return str(read_text_config(self.path / "config.json").get("_name_or_path") or "")

    @property
    def context_len(self) -> int | None:
        return positive_int(read_text_config(self.path / "config.json").get("max_position_embeddings"))

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        tensor, block_type = self._tensors[name], self.block_type(name)
        shape = tuple(tensor.shape)
        return (
            shape
            if not isinstance(tensor, Tensor) or block_type is None
            else (shape[0], shape[1] // block_type.size * block_type.elements)
        )

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self.shape(name)[dim] if stop is None else stop
        block_type, factor = self.block_type(name), self.factors.get(module_name(name))
        if block_type is None or not isinstance(self._tensors[name], Tensor):
            part, offset = self._slice(name, dim, start, stop), norm_offset(name, self.family)
            part = part.float() + offset if offset else part
            return part if factor is None else part.float() * factor
        if dim == 0:
            return dequantize(self.read_blocks(name, 0, start, stop), block_type)
        # Whole blocks around the columns.
        first = start - start % block_type.elements
        last = -(-stop // block_type.elements) * block_type.elements
        return dequantize(self.read_blocks(name, 1, first, last), block_type).narrow(1, start - first, stop - start)

    def reads_as(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> tuple[torch.dtype, Reading]:
        tensor = self._tensors[name]
        if self.block_type(name) is not None or not isinstance(tensor, Tensor):
            return torch.float32, "copy"
        if module_name(name) in self.factors or norm_offset(name, self.family):
            return torch.float32, "copy"
        is_strided = dim != 0 or not tensor.is_contiguous()
        return tensor.dtype, "copy" if self._is_reordered(name) else "strided" if is_strided else "zero_copy"

    def stored_as(self, name: str) -> str:
        tensor, block_type = self._tensors[name], self.block_type(name)
        if not isinstance(tensor, Tensor):
            return tensor.kind
        return block_type.name if block_type else dtype_name(tensor.dtype)

    def block_type(self, name: str) -> BlockType | None:
        tensor = self._tensors.get(name)
        if tensor is None or isinstance(tensor, Tensor):
            return self._block_types.get(name)
        return None if module_name(name) in self.factors else tensor.block_type

    def read_blocks(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        block_type = self.block_type(name)
        assert block_type is not None, name
        stop = self.shape(name)[dim] if stop is None else stop
        assert dim == 0 or start % block_type.elements == stop % block_type.elements == 0, (name, start, stop)
        if dim == 1 and isinstance(self._tensors[name], Tensor):
            start, stop = (column // block_type.elements * block_type.size for column in (start, stop))
        return self._slice(name, dim, start, stop, as_blocks=True)

    def release(self, name: str) -> None:
        tensor = self._tensors[name]
        for part in (tensor,) if isinstance(tensor, Tensor) else tensor.parts.values():
            self._mapped.release(part)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.path)

    def _tie(self) -> None:
        """Keep one of the embedding and the output projection, or both where they differ, as transformers does.

        Nothing is read where they are one tensor of the file, nor where headers alone tell that the folder cannot run.
        """
        table, output = "tok_embeddings.weight", "output.weight"
        if table not in self._tensors and output in self._tensors:
            self._tensors[table] = self._tensors.pop(output)
        if output not in self._tensors:
            return
        expected = global_shapes(self.args).items()
        fits = all(name in self._tensors and self.shape(name) == shape for name, shape in expected)
        if fits and not self._is_same(table, output):
            self.args = dataclasses.replace(self.args, tied_embeddings=False)
            log.warning("%s: lm_head is used, despite tie_word_embeddings, as it differs from the table", self.path)
        else:
            del self._tensors[output]

    def _is_same(self, a: str, b: str) -> bool:
        first, second = self._tensors[a], self._tensors[b]
        if not (isinstance(first, Tensor) and isinstance(second, Tensor)) or first.dtype != second.dtype:
            return False
        if self.shape(a) != self.shape(b):
            return False
        if first.data_ptr() == second.data_ptr():
            return True
        is_same = same_matrix(self, a, b)
        self.release(a)
        self.release(b)
        return is_same

    def _drop_zero_biases(self, biased: Collection[str]) -> None:
        """Leave out biases of zeros that the architecture lacks: AutoGPTQ writes one beside every matrix."""
        lacking = {"output", *ATTENTION, *FEED_FORWARD} - set(biased)
        for name, tensor in list(self._tensors.items()):
            is_bias = name.endswith(".bias") and module_name(name) in lacking
            if is_bias and isinstance(tensor, Tensor) and not tensor.any():
                del self._tensors[name]

    def _fold_xielu(self) -> None:
        """Have one tensor of each layer's activation in place of the four numbers that the files have."""
        for layer in range(self.args.n_layers):
            module = f"layers.{layer}.feed_forward.xielu"
            values = []
            for name in (f"{module}.{part}" for part in XIELU_PARTS):
                tensor = self._tensors.pop(name, None)
                if not isinstance(tensor, Tensor) or tensor.numel() != 1 or not tensor.is_floating_point():
                    found = (
                        "missing" if tensor is None else f"{getattr(tensor, 'dtype', 'blocks')} {tuple(tensor.shape)}"
                    )
                    raise ValueError(f"{self.path}: {stored_name(name, 'hf')} must be a number, but is {found}")
                values.append(float(tensor))
            self._tensors[f"{module}.weight"] = xielu_weight(*values)

    def _is_reordered(self, name: str) -> bool:
        return self.family.hf_rows == "halves" and module_name(name) in ROTATED

    def _slice(self, name: str, dim: int, start: int, stop: int, as_blocks: bool = False) -> Tensor:
        """Return rows or columns of a tensor as it is stored, or of a release's matrix, with rows in Meta's order."""
        cut = self._cut(name, as_blocks)
        if not self._is_reordered(name):
            return cut(dim, start, stop)
        if dim != 0:
            return pair_neighbours(cut(dim, start, stop), self.args.head_dim, self.args.rotary_dim)
        n_rows = self._tensors[name].shape[0]
        return part_of_pairs(lambda first, last: cut(0, first, last), n_rows, self.args, 0, start, stop)

    def _cut(self, name: str, as_blocks: bool) -> Callable[[int, int, int], Tensor]:
        """Return what reads [start, stop) along a dimension of a tensor, in the file's order of rows."""
        tensor = self._tensors[name]
        if isinstance(tensor, Tensor):
            return lambda dim, start, stop: tensor.narrow(dim, start, stop - start)
        return functools.partial(self._made_blocks, tensor) if as_blocks else tensor.values

    def _made_blocks(self, matrix: ReleasedMatrix, dim: int, start: int, stop: int) -> Tensor:
        blocks, error = matrix.blocks(dim, start, stop)
        self.rounding = max(self.rounding, error)
        return blocks


def check_blocks(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, BlockType]:
    """Return the types of the tensors that are blocks, by the names that they have in the files.

    Raise ValueError unless these tensors are as config.json says.
    """
    block_types = read_block_types(folder / "config.json")
    for name, block_type in block_types.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != torch.uint8 or tensor.dim() != 2 or tensor.shape[1] % block_type.size:
            found = "missing" if tensor is None else f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
            raise ValueError(
                f"{folder}: {name} is to be rows of {block_type.name} blocks of {block_type.size} bytes, but is "
                f"{found}: weights and config.json do not belong together"
            )
    return block_types
