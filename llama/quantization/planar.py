"""Weights as the GPU kernels read them: quantized blocks taken apart into planes, and 8-bit floats.

Knows no kernels (see backends/cuda/matmul.py): products here are torch's, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llama.quantization.gguf_blocks import (
    F8_E4M3,
    LAYOUTS,
    BlockFields,
    BlockType,
    pack_codes,
    take_apart,
    unpack_codes,
    values_of,
)
from llama.quantization.weights import QuantizedWeight, float_matmul

# Most tokens that products and attention compute in tiles of one shape, so that no token's result depends on the others
# (see D41); and most that are multiplied by codes as they are decoded: for more, dequantizing first is faster.
MAX_GEMV_TOKENS = 8
MAX_DEQUANT_GEMM_TOKENS = 16
# Most tokens of a product with 8-bit floats that never rounds activations to 8 bits.
MAX_UNROUNDED_TOKENS = 64
# Values that are dequantized at once: 128 MB in 16 bits.
MAX_DEQUANTIZED_GPU_VALUES = 1 << 26
# Values that are taken apart, or rounded to 8 bits, at once: each needs a few bytes of temporary memory.
MAX_CONVERTED_VALUES = 1 << 24

GROUP_SIZE = 32  # values whose codes are stored together: a lower and an upper half of 16 each


class PlanarWeight(QuantizedWeight):
    """A matrix (out, in) of quantized blocks with codes and scales in tensors of their own, planes (see D40).

    Values are those of gguf_blocks.dequantize, and take as many bytes as the blocks, but for scales that were packed:
    up to 4 bytes in 110 or more. The planes:
    codes       uint8 (out, in / 8 * bits): the lower 8, 4 or 2 bits of codes. Of the 4 * bits bytes of a group the
                first holds the values 0, 4 * bits, 8 * bits and so on, from its lowest bits on. So a byte's upper 4
                bits are of values in the upper half of the group, 16 further on.
    high        uint8 (out, in / 8 * bits): the other 1 or 2 bits of 3-, 5- and 6-bit types, in the same order
    scales      fp16 (out, in / elements of a block, 1); of types with minima (.., 2): scale and minimum
    sub_scales  Q4_K, Q5_K: uint8 (out, in / 32, 2): scale and minimum of a group;
                Q3_K, Q6_K: int8 (out, in / 32, 2): scales of a group's halves;
                Q2_K: uint8 (out, in / 32, 2): the same, with minima in the upper 4 bits;
                IQ4_XS: int8 (out, in / 32, 1): scale of a group
    """

    codes: Tensor
    high: Tensor | None
    scales: Tensor
    sub_scales: Tensor | None

    def __init__(self, blocks: Tensor, block_type: BlockType) -> None:
        """Take blocks apart; blocks: uint8 (out, bytes of a row)."""
        super().__init__()
        n_rows, n_bytes = blocks.shape
        n_blocks, rest = divmod(n_bytes, block_type.size)
        assert not rest and n_rows, (blocks.shape, block_type)
        planes: dict[str, Tensor | None] = {}
        step = max(1, MAX_CONVERTED_VALUES // (n_blocks * block_type.elements))
        for first in range(0, n_rows, step):
            part = blocks[first : first + step].unflatten(1, (n_blocks, block_type.size))
            for name, plane in _take_apart(part, block_type).items():
                if first == 0:
                    planes[name] = None if plane is None else plane.new_empty(n_rows, *plane.shape[1:])
                whole = planes[name]
                if whole is not None and plane is not None:
                    whole[first : first + step] = plane
        self._hold(planes, block_type)

    @classmethod
    def _of(cls, planes: dict[str, Tensor | None], block_type: BlockType) -> PlanarWeight:
        """Make a weight of planes."""
        weight = cls.__new__(cls)
        nn.Module.__init__(weight)
        weight._hold(planes, block_type)
        return weight

    def _hold(self, planes: dict[str, Tensor | None], block_type: BlockType) -> None:
        self.block_type = block_type
        for name, plane in planes.items():
            self.register_buffer(name, plane)
        self.shape = torch.Size((len(self.scales), self.scales.shape[1] * block_type.elements))

    @classmethod
    def join(cls, parts: Sequence[PlanarWeight]) -> PlanarWeight:
        """Join the rows of all parts, which have one type, one below another."""
        (block_type,) = {part.block_type for part in parts}
        planes = [dict(part.named_buffers()) for part in parts]
        joined = {name: torch.cat([plane[name] for plane in planes]) for name in planes[0]}
        return cls._of(dict.fromkeys(PLANES) | joined, block_type)

    @staticmethod
    def bytes_of(block_type: BlockType, rows: int, columns: int) -> int:
        if block_type == F8_E4M3:  # of an Fp8Weight, which the same backend uses
            return rows * (columns + 4)
        block = PlanarWeight(torch.zeros(1, block_type.size, dtype=torch.uint8, device="cpu"), block_type)
        return rows * columns // block_type.elements * block.nbytes

    def part(self, start: int, stop: int) -> PlanarWeight:
        """Return the rows from start to stop, in the same memory."""
        rows = {name: plane[start:stop] for name, plane in self.named_buffers()}
        return self._of(dict.fromkeys(PLANES) | rows, self.block_type)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return _dequantized_matmul(x, self, dtype or x.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        return _decode({name: plane[ids] for name, plane in self.named_buffers()}, self.block_type)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Dequantize all values, by torch: (out, in)."""
        return _decode(dict(self.named_buffers()), self.block_type).to(dtype)


class Fp8Weight(QuantizedWeight):
    """A matrix (out, in) of 8-bit floats (e4m3, torch.float8_e4m3fn), with one fp32 scale a row (see D43).

    Products of up to MAX_UNROUNDED_TOKENS tokens round no activations. For more tokens, where the GPU multiplies 8-bit
    floats itself (Hopper), activations are rounded to 8 bits as well, each token with a scale of its own.
    """

    codes: Tensor  # float8_e4m3fn (out, in)
    scales: Tensor  # fp32 (out, 1)

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        assert codes.dtype == torch.float8_e4m3fn and scales.shape == (len(codes), 1), (codes.dtype, scales.shape)
        self.block_type = F8_E4M3
        self.shape = codes.shape
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def of(cls, values: Tensor) -> Fp8Weight:
        """Round values (out, in) of any floating dtype to the nearest codes; the largest of a row becomes 448.

        Raise ValueError where values are not finite.
        """
        weight = cls(*_to_fp8(values))
        if not weight.scales.isfinite().all():
            raise ValueError("values that are not finite cannot be stored as 8-bit floats")
        return weight

    @classmethod
    def join(cls, parts: Sequence[Fp8Weight]) -> Fp8Weight:
        """Join the rows of all parts, one below another."""
        codes = torch.cat([part.codes.view(torch.uint8) for part in parts])
        return cls(codes.view(torch.float8_e4m3fn), torch.cat([part.scales for part in parts]))

    def part(self, start: int, stop: int) -> Fp8Weight:
        """Return the rows from start to stop, in the same memory."""
        return Fp8Weight(self.codes[start:stop], self.scales[start:stop])

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        n_tokens = x.numel() // x.shape[-1]
        if n_tokens > MAX_UNROUNDED_TOKENS and self.multiplies_fp8(x.device):
            return multiply_fp8(x.reshape(n_tokens, -1), self).to(dtype or x.dtype).view(*x.shape[:-1], -1)
        return _dequantized_matmul(x, self, dtype or x.dtype)

    def multiplies_fp8(self, device: torch.device) -> bool:
        """Tell whether the device can multiply 8-bit floats with a scale for each row, at this weight's shape."""
        if device.type != "cuda" or torch.version.cuda is None or any(size % 16 for size in self.shape):
            return False
        return torch.cuda.get_device_capability(device)[0] == 9

    def rows(self, ids: Tensor) -> Tensor:
        codes = self.codes.view(torch.uint8)[ids].view(torch.float8_e4m3fn)  # torch indexes no 8-bit floats
        return codes.float() * self.scales[ids]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Dequantize all values, by torch: (out, in)."""
        return (self.codes.float() * self.scales).to(dtype)


PLANES = ("codes", "high", "scales", "sub_scales")


def multiply_fp8(x: Tensor, weight: Fp8Weight) -> Tensor:
    """Multiply x (n_tokens, in), rounded to 8 bits token by token, by the matrix transposed: bf16 (n_tokens, out).

    Both sizes of the weight are multiples of 16, which the hardware needs.
    """
    codes, scales = _to_fp8(x)
    return torch._scaled_mm(codes, weight.codes.t(), scales, weight.scales.t(), out_dtype=torch.bfloat16)


def _dequantized_matmul(x: Tensor, weight: PlanarWeight | Fp8Weight, dtype: torch.dtype) -> Tensor:
    """Multiply x (..., in) by the weight, of which torch dequantizes at most MAX_DEQUANTIZED_GPU_VALUES at once."""
    n_out, n_in = weight.shape
    y = x.new_empty(*x.shape[:-1], n_out, dtype=dtype)
    step = max(1, MAX_DEQUANTIZED_GPU_VALUES // n_in)
    for first in range(0, n_out, step):
        y[..., first : first + step] = float_matmul(x, weight.part(first, first + step).dense(x.dtype), dtype)
    return y


def _to_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows (n, size) to 8 bits: float8_e4m3fn codes (n, size) and fp32 scales (n, 1)."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    codes = torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device)
    scales = torch.empty(len(values), 1, dtype=torch.float32, device=values.device)
    step = max(1, MAX_CONVERTED_VALUES // values.shape[1])
    for first in range(0, len(values), step):
        part = values[first : first + step].float()
        # At least the smallest normal number, so that rows of zeros stay zeros.
        scale = (part.abs().amax(dim=1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
        codes[first : first + step] = (part / scale).clamp_(-largest, largest).to(torch.float8_e4m3fn)
        scales[first : first + step] = scale
    return codes, scales


def _take_apart(blocks: Tensor, block_type: BlockType) -> dict[str, Tensor | None]:
    """Return the planes of blocks (out, n_blocks, size)."""
    codes, scales, sub_scales = take_apart(blocks, block_type)
    layout = LAYOUTS[block_type.name]
    codes = codes.flatten(1)
    low = pack_codes(codes, layout.low_bits, GROUP_SIZE // 8 * layout.low_bits)
    high = None
    if layout.high:
        high = pack_codes(codes >> layout.low_bits, layout.high_bits, GROUP_SIZE // 8 * layout.high_bits)
    if sub_scales is not None:
        if block_type.name == "Q2_K":
            sub_scales = sub_scales[..., :1] | sub_scales[..., 1:] << 4
        sub_scales = sub_scales.reshape(len(blocks), codes.shape[1] // GROUP_SIZE, -1)
    return {"codes": low, "high": high, "scales": scales, "sub_scales": sub_scales}


def _decode(planes: dict[str, Tensor], block_type: BlockType) -> Tensor:
    """Dequantize planes of rows (...) to fp32 values (..., in)."""
    layout, scales, sub_scales = LAYOUTS[block_type.name], planes["scales"], planes.get("sub_scales")
    codes = unpack_codes(planes["codes"], layout.low_bits, GROUP_SIZE // 8 * layout.low_bits)
    if layout.high:
        codes |= unpack_codes(planes["high"], layout.high_bits, GROUP_SIZE // 8 * layout.high_bits) << layout.low_bits
    n_blocks, numbers = scales.shape[-2:]
    if sub_scales is not None:
        if block_type.name == "Q2_K":
            sub_scales = torch.stack([sub_scales & 15, sub_scales >> 4], dim=-1)
        sub_scales = sub_scales.reshape(*scales.shape[:-1], -1, numbers)
    fields = BlockFields(codes.unflatten(-1, (n_blocks, block_type.elements)), scales, sub_scales)
    return values_of(fields, block_type).flatten(-2)
