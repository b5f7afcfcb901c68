"""Take the tensors of a quantized release, module by module, and check that they fit each other.

Knows no forms of releases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.base import dtype_name
from llama.quantization.released import IntegerMatrix, ReleasedMatrix
from llama.quantization.released_layouts import INTEGER_LAYOUTS

Settings = Mapping[str, Any]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class ReleaseFolder:
    """What is left of a folder's tensors, and what its quantization_config says."""

    def __init__(
        self,
        path: Path,
        tensors: MutableMapping[str, Tensor],
        settings: Settings,
        file: str = "config.json",
        key: str = "quantization_config",
    ) -> None:
        """Name in messages the file that has the settings, and the key, if any, that they are under."""
        self.path, self.tensors, self.settings = path, tensors, settings
        self._file, self._key = file, key

    @property
    def said_in(self) -> str:
        return self._key or self._file

    def modules(self, end: str) -> Iterator[ReleaseModule]:
        """Yield the modules that have a tensor with this end."""
        for name in [name for name in self.tensors if name.endswith(f".{end}")]:
            yield ReleaseModule(self, name.removesuffix(f".{end}"))

    def is_true(self, key: str) -> bool:
        value = self.settings.get(key)
        if value is not None and type(value) is not bool:
            raise self.error(f"{key} must be true or false, got {value!r}")
        return bool(value)

    def object(self, key: str) -> Settings:
        value = self.settings.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(f"{key} must be an object, got {value!r:.80}")
        return value or {}

    def number(self, key: str, *choices: int) -> int:
        """Return a whole number, which is one of the choices where there are any."""
        value = self.settings.get(key)
        if type(value) is not int or (choices and value not in choices):
            wanted = " or ".join(map(str, choices)) or "a whole number"
            raise self.error(f"{key} must be {wanted}, got {value!r}")
        return value

    def error(self, text: str) -> ValueError:
        return ValueError(": ".join([str(self.path / self._file), *filter(None, [self._key]), text]))


class ReleaseModule:
    """The tensors of one linear: who takes one has checked its shape, and it is part of the matrix then."""

    def __init__(self, folder: ReleaseFolder, name: str) -> None:
        self._folder, self.name = folder, name
        self.parts: dict[str, Tensor] = {}

    @property
    def label(self) -> str:
        return f"{self._folder.path}: {self.name}"

    @property
    def _together(self) -> str:
        return f"{self._folder.said_in} do not belong together"

    def peek(self, end: str) -> Tensor | None:
        return self._folder.tensors.get(f"{self.name}.{end}")

    def has(self, end: str) -> bool:
        return self.peek(end) is not None

    def take(self, end: str, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...]) -> Tensor:
        """Return a tensor of one of these dtypes and shapes; with no shapes, a matrix that is not empty."""
        tensor = self._folder.tensors.pop(f"{self.name}.{end}", None)
        if tensor is None:
            raise ValueError(f"{self.label}.{end} is missing: weights and {self._together}")
        found = tuple(tensor.shape)
        fits = found in shapes if shapes else len(found) == 2 and min(found) > 0
        if tensor.dtype not in dtypes or not fits:
            expected = " or ".join(map(str, dict.fromkeys(shapes))) or "a matrix"
            raise ValueError(
                f"{self.label}.{end} is {dtype_name(tensor.dtype)} {found}, not "
                f"{' or '.join(map(dtype_name, dtypes))} {expected}: weights and {self._together}"
            )
        self.parts[end] = tensor
        return tensor

    def matrix(self, end: str, dtypes: tuple[torch.dtype, ...]) -> tuple[int, int]:
        """Take a matrix; return its shape."""
        n_rows, n_columns = self.take(end, dtypes).shape
        return n_rows, n_columns

    def take_bytes(self, end: str, n_bytes: int) -> Tensor:
        """Take the bytes of a tensor, whatever dtype they are kept in."""
        tensor = self.peek(end)
        if tensor is not None and tensor.is_contiguous():
            self._folder.tensors[f"{self.name}.{end}"] = tensor.flatten().view(torch.uint8)
        return self.take(end, (torch.uint8,), (n_bytes,))

    def groups(self, end: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int], sizes: set[int]) -> int:
        """Take scales (out, n_groups), or one of all; return the size of a group that both they and `sizes` have."""
        tensor = self.peek(end)
        n_rows, n_columns = shape
        n_groups = tensor.shape[1] if tensor is not None and tensor.dim() == 2 and tensor.shape[1] else 1
        size = n_columns // n_groups
        if n_columns % n_groups or (n_groups > 1 and sizes and size not in sizes):
            wanted = " or ".join(map(str, sorted(sizes))) or str(n_groups)
            raise ValueError(
                f"{self.label}.{end} has {n_groups} groups in rows of {n_columns} values, which groups of {wanted} do "
                f"not give: weights and {self._together}"
            )
        scales = self.take(end, dtypes, (n_rows, n_groups), (n_rows,), (1,), (), (1, 1))
        self.parts[end] = scales.reshape(-1, 1).expand(n_rows, 1) if n_groups == 1 else scales
        return size


Found = Iterator[tuple[ReleaseModule, ReleasedMatrix]]


def group_order(
    module: ReleaseModule, end: str, n_columns: int, size: int, n_groups: int, needed: bool = False
) -> Tensor | None:
    """Return the group of each column, or None where groups are columns one after another."""
    if not needed and not module.has(end):
        return None
    order = module.take(end, (torch.int32, torch.int64), (n_columns,))
    if n_groups > 1 and not bool(order.any()):  # never filled in
        if needed:
            raise ValueError(f"{module.label}.{end} has all columns in one of {n_groups} groups: download it again")
        return None
    if int(order.min()) < 0 or int(order.max()) >= n_groups:
        raise ValueError(
            f"{module.label}.{end} has groups {int(order.min())} to {int(order.max())}, there are {n_groups}: download "
            "it again"
        )
    return None if torch.equal(order.long(), torch.arange(n_columns) // size) else order.long()


def integers(
    module: ReleaseModule,
    shape: tuple[int, int],
    layout: str,
    name: str,
    bits: int,
    size: int,
    symmetric: bool,
    order: Tensor | None = None,
) -> IntegerMatrix:
    groups = "a row" if size == shape[1] else f"{size}"
    kind = f"{name} in groups of {groups}" + " in another order" * (order is not None)
    return IntegerMatrix(module.label, module.parts, shape, INTEGER_LAYOUTS[layout], kind, bits, size, symmetric, order)
