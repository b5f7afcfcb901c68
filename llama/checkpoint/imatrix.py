"""Read and write importance matrices: of each column of a matrix, the mean square of what the model multiplies it by.

The files are llama.cpp's: GGUF with sums and counts, as llama-imatrix writes it today, and to read also the older
binary form. Knows nothing of how activations are measured, nor of blocks.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from llama.checkpoint.base import some_of
from llama.checkpoint.gguf_header import is_gguf, read_header
from llama.checkpoint.gguf_tensors import decode_rows, map_tensors
from llama.checkpoint.names import LAYER_PREFIXES, stored_name
from llama.files import check_content

IMATRIX_TYPE = "imatrix"  # of general.type
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
SUMS, COUNTS = ".in_sum2", ".counts"
# Modules of a layer that multiply the same: where a file names one of them only, it says the same of the others. Files
# of architectures with fused matrices name those.
SAME_INPUT = (("attn_q", "attn_k", "attn_v", "attn_qkv"), ("ffn_gate", "ffn_up"))
_EXPERT = re.compile(r"(blk\.\d+\.ffn_\w+)\.(\d+)\.weight")  # a matrix of one expert, which files have with the others
# A column that a text leaves at 0 still counts, as another text may not: a share of its matrix's mean.
LEAST_SHARE = 1e-6
_FIX = "llama calibrate makes one"


@dataclass(frozen=True)
class ColumnSquares:
    """Sums over tokens of the squares of a matrix's inputs: fp64 (columns,), or (experts, columns).

    counts: of how many tokens: (1,), or (experts,).
    """

    sums: Tensor
    counts: Tensor


@dataclass(frozen=True)
class ImportanceMatrix:
    """Mean squares of inputs, by the names of matrices in GGUF: fp32 (1, columns), or (experts, columns).

    An expert that no token was routed to has ones. datasets: what was read, for people. chunk_count: how many texts.
    """

    path: Path
    means: Mapping[str, Tensor]
    datasets: Sequence[str] = ()
    chunk_count: int = 0

    def of(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """Return what each column of a model's matrix counts: fp32 (columns,), or (experts, columns); mostly near 1.

        name: Meta's. shape: (rows, columns), or (experts, rows, columns). None is of a table of tokens that the file
        does not name, as llama.cpp's do not. Raise ValueError where it lacks a layer's matrix, or has another length.
        """
        stored = stored_name(name, "gguf")
        means = self._found(stored)
        if means is None:
            if not stored.startswith(LAYER_PREFIXES["gguf"]):
                return None
            raise ValueError(f"imatrix {self.path} has nothing of {stored}: {_OTHER_MODEL}")
        wanted = math.prod(shape[:-2]), shape[-1]
        if tuple(means.shape) != wanted and means.numel() != math.prod(wanted):
            raise ValueError(
                f"imatrix {self.path} has {means.numel()} values of {stored}, whose columns are {math.prod(wanted)}: "
                f"{_OTHER_MODEL}"
            )
        means = means.view(wanted)
        means = means / means.mean(dim=-1, keepdim=True)
        return means.clamp(min=LEAST_SHARE).view(*shape[:-2], shape[-1])

    def check_layers(self, n_layers: int) -> None:
        """Raise ValueError where it is of a model with more layers."""
        prefix = LAYER_PREFIXES["gguf"]
        numbers = (name.removeprefix(prefix).partition(".")[0] for name in self.means if name.startswith(prefix))
        last = max((int(number) for number in numbers if number.isdecimal()), default=-1)
        if last >= n_layers:
            raise ValueError(
                f"imatrix {self.path} is of {last + 1} layers or more, the model has {n_layers}: {_OTHER_MODEL}"
            )

    def _found(self, stored: str) -> Tensor | None:
        if stored in self.means:
            return self.means[stored]
        layer, _, module = stored.removesuffix(".weight").rpartition(".")
        same = next((names for names in SAME_INPUT if module in names), ())
        names = [f"{layer}.{each}.weight" for each in same]
        return next((self.means[each] for each in names if each in self.means), None)


_OTHER_MODEL = "it is of another model, " + _FIX + " of this one"


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read a file of llama.cpp's, of either form; raise ValueError for what is none, is damaged or makes no sense."""
    if not path.is_file():
        raise FileNotFoundError(f"imatrix {path} does not exist: {_FIX}")
    if is_gguf(path):
        return _read_gguf_imatrix(path)
    check_content(path, is_binary=True)
    with path.open("rb") as file:
        return _DatReader(path, file).read()


def _read_gguf_imatrix(path: Path) -> ImportanceMatrix:
    header = read_header(path)
    stored_type = header.metadata.get("general.type")
    if stored_type != IMATRIX_TYPE and not any(name.endswith(SUMS) for name in header.tensors):
        raise ValueError(f"{path} is a GGUF file of type {stored_type or 'model'}, and no imatrix: {_FIX}")
    tensors = map_tensors(path, header)
    names = [name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)]
    means = {}
    for name in names:
        if name + COUNTS not in tensors:
            raise ValueError(f"imatrix {path} has no {name + COUNTS}, only its sums: it is damaged, {_FIX}")
        stored = [tensors[name + SUMS], tensors[name + COUNTS]]
        if any(each.dtype != torch.float32 for each in stored):
            raise ValueError(f"imatrix {path}: what it has of {name} must be F32: {_FIX}")
        sums, counts = (decode_rows(each, 0, each.shape[0]) for each in stored)
        sums, counts = sums.view(-1, sums.shape[-1]), counts.flatten()
        if len(counts) not in (1, len(sums)):
            raise ValueError(f"imatrix {path} has {len(counts)} counts of {name} for {len(sums)} sums: {_FIX}")
        means[name] = _means(path, name, sums, counts[:, None])
    datasets, chunk_count = header.metadata.get(DATASETS), header.metadata.get(CHUNK_COUNT)
    return ImportanceMatrix(
        path,
        _some(path, means),
        datasets if isinstance(datasets, list) else (),
        chunk_count if isinstance(chunk_count, int) else 0,
    )


def _means(path: Path, name: str, sums: Tensor, counts: Tensor) -> Tensor:
    """Return sums (n, columns) over counts (n or 1, 1), or ones; raise ValueError where they are impossible."""
    if not counts.isfinite().all() or (counts < 0).any() or not (counts > 0).any():
        shown = ", ".join(f"{count:g}" for count in counts.flatten()[:4].tolist())
        raise ValueError(f"imatrix {path}: its counts of {name} are {shown}, some must be above 0: {_FIX}")
    if not sums.isfinite().all() or (sums < 0).any():
        place = int((~sums.isfinite() | (sums < 0)).flatten().int().argmax())
        raise ValueError(
            f"imatrix {path}: {name} has {sums.flatten()[place]:g} for column {place % sums.shape[-1]}, which no sum "
            f"of squares can be: {_FIX}"
        )
    means = torch.where(counts > 0, sums / counts, 1.0)
    return torch.where(means.sum(dim=-1, keepdim=True) > 0, means, 1.0)


def _some(path: Path, means: dict[str, Tensor]) -> dict[str, Tensor]:
    if not means:
        raise ValueError(f"imatrix {path} has no matrices: {_FIX}")
    return means


class _DatReader:
    """Read the older form: names with sums that are to be divided by a count, then the number of chunks and a name."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.left = path, file, path.stat().st_size

    def read(self) -> ImportanceMatrix:
        n_entries = self.integer()
        if n_entries < 1:
            raise ValueError(f"{self.path} is no imatrix, it begins with a count of {n_entries}: {_FIX}")
        means: dict[str, Tensor] = {}
        for _ in range(n_entries):
            name = self.take(self.integer()).decode(errors="replace")
            n_calls, n_values = self.integer(), self.integer()
            if name in means or n_values < 1:
                raise ValueError(f"imatrix {self.path} has {name!r} twice, or no values of it: it is damaged, {_FIX}")
            sums = torch.frombuffer(bytearray(self.take(4 * n_values)), dtype=torch.float32)
            means[name] = _means(self.path, name, sums[None], torch.tensor([[float(n_calls)]]))
        chunk_count, datasets = 0, []
        if self.left:  # the first versions ended here
            chunk_count = self.integer()
            datasets = [self.take(self.integer()).decode(errors="replace")]
        return ImportanceMatrix(self.path, means, datasets, chunk_count)

    def integer(self) -> int:
        number: int = struct.unpack("<i", self.take(4))[0]
        return number

    def take(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise ValueError(f"{self.path} is no imatrix, or it is damaged or cut off: {_FIX}")
        self.left -= size
        return self.file.read(size)


def write_imatrix(
    path: Path, squares: Mapping[str, ColumnSquares], datasets: Sequence[str], chunk_count: int, chunk_size: int
) -> None:
    """Write what was measured of matrices, by Meta's names, as llama-imatrix does.

    chunk_count, chunk_size: how many texts were read, and of how many tokens at most.
    """
    import gguf

    writer = gguf.GGUFWriter(path, IMATRIX_TYPE)
    writer.kv_data[0].clear()  # the architecture, which llama.cpp's files do not name
    writer.add_type(IMATRIX_TYPE)
    writer.add_array(DATASETS, list(datasets))
    writer.add_uint32(CHUNK_COUNT, chunk_count)
    writer.add_uint32(CHUNK_SIZE, chunk_size)
    for stored, each in sorted(_by_stored_names(squares).items()):
        counts = each.counts if each.sums.dim() == 1 else each.counts[:, None]
        for suffix, values in ((SUMS, each.sums), (COUNTS, counts)):
            writer.add_tensor(stored + suffix, np.ascontiguousarray(values.to(torch.float32).numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _by_stored_names(squares: Mapping[str, ColumnSquares]) -> dict[str, ColumnSquares]:
    """Return squares by GGUF's names, those of all experts of a layer in one, in their order."""
    found: dict[str, ColumnSquares] = {}
    experts: dict[str, dict[int, ColumnSquares]] = {}
    for name, each in squares.items():
        stored = stored_name(name, "gguf")
        expert = _EXPERT.fullmatch(stored)
        if expert is None:
            found[stored] = each
        else:
            experts.setdefault(f"{expert[1]}_exps.weight", {})[int(expert[2])] = each
    for stored, by_number in experts.items():
        ordered = [by_number[number] for number in sorted(by_number)]
        found[stored] = ColumnSquares(
            torch.stack([each.sums for each in ordered]), torch.cat([each.counts for each in ordered])
        )
    return found


def check_measured(squares: Mapping[str, ColumnSquares]) -> None:
    """Raise ValueError where sums are not finite: such weights, or such a dtype, give no model either."""
    wrong = [stored_name(name, "gguf") for name, each in squares.items() if not each.sums.isfinite().all()]
    if wrong:
        raise ValueError(
            f"inputs of {some_of(wrong)} are not finite: the weights are damaged, or too large for this dtype (try "
            "--dtype float32)"
        )


def origin(importance: ImportanceMatrix) -> dict[str, Any]:
    """Return the keys by which a quantized GGUF file tells what it was calibrated with, as llama.cpp's do."""
    return {
        "quantize.imatrix.file": str(importance.path),
        "quantize.imatrix.dataset": ", ".join(importance.datasets),
        "quantize.imatrix.entries_count": len(importance.means),
        "quantize.imatrix.chunks_count": importance.chunk_count,
    }
