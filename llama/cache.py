"""The key/value cache: preallocated storage that the model writes and reads, row by row.

Knows nothing of the model; the caller keeps track of which positions of a row are valid.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer for up to `bsz` rows of up to `max_seq_len` positions.

    keys, values: (n_layers, bsz, max_seq_len, n_kv_heads, head_dim). Rows have different lengths: a position that was
    not written yet has any finite value, and attention masks it. On a CPU, memory is committed only when it is written.
    """

    def __init__(
        self,
        n_layers: int,
        bsz: int,
        max_seq_len: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (n_layers, bsz, max_seq_len, n_kv_heads, head_dim)
        # Zeros, because a masked position still meets a zero weight, and 0 * NaN is NaN.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def slots(self, positions: Tensor) -> Tensor:
        """Return the slots of positions (bsz, seqlen) of rows 0 to bsz - 1, counted over all rows: (bsz * seqlen,)."""
        rows = torch.arange(positions.shape[0], device=positions.device)
        return (rows[:, None] * self.max_seq_len + positions).flatten()

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys, values (bsz, seqlen, n_kv_heads, head_dim) in a layer's slots."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys.flatten(0, 1))
        self.values[layer].flatten(0, 1).index_copy_(0, slots, values.flatten(0, 1))

    def read(self, layer: int, bsz: int, kv_len: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the first kv_len positions of the first bsz rows, as views."""
        return self.keys[layer, :bsz, :kv_len], self.values[layer, :bsz, :kv_len]

    @property
    def max_seq_len(self) -> int:
        return self.keys.shape[2]

    def grow(self, max_seq_len: int, length: int) -> None:
        """Enlarge every row to max_seq_len positions, and copy the first `length`."""
        n_layers, bsz, _, n_kv_heads, head_dim = self.keys.shape
        for name in ("keys", "values"):  # one after the other, so that the old keys are freed before values are copied
            old: Tensor = getattr(self, name)
            new = old.new_zeros(n_layers, bsz, max_seq_len, n_kv_heads, head_dim)
            new[:, :, :length] = old[:, :, :length]
            setattr(self, name, new)
            del old

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` over row `target`."""
        self.keys[:, target, :length] = self.keys[:, source, :length]
        self.values[:, target, :length] = self.values[:, source, :length]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes
