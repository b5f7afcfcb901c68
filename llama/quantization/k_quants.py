"""Quantize to any block type with care: scales are searched for the least squared error, which columns may weigh.

Knows nothing of files, names or ranks.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llama.quantization.gguf_blocks import IQ4_VALUES, LAYOUTS, ROUNDING, BlockFields, BlockType, quantize
from llama.quantization.packing import put_together

# Values of a part, and how many parts are worked on at once: enough values for what calls of torch cost by themselves,
# few enough for caches. What one part leaves of torch's threads, another one uses.
SEARCHED_AT_ONCE, PARTS_AT_ONCE = 1 << 18, 2
BLOCK_REFITS = 3
TOO_LARGE = 1e15  # for sums of squares in fp32, and for any scale in fp16
FLAT = 1e-5  # a share of a determinant, below which it is rounding


@dataclass(frozen=True)
class _Search:
    """Say how the scales of a type are searched.

    starts: steps of a group's range, more or fewer than its codes have, by which the search begins.
    """

    n_groups: int  # of a block
    starts: tuple[float, ...]
    has_low: bool = False  # whether values are scale * code + low; else scale * code
    # The largest scale, and minimum, of a group as a whole number; 0 where groups are blocks with scales of their own.
    # Types without minima have negative ones as well, down to -most - 1.
    most: int = 0
    refits: int = 2
    favours_large: bool = False  # whether large values count more: scales that shrink them cost more than their error


SEARCHES = {
    "Q4_0": _Search(1, (-1.0, 0.0, 0.7, 1.5), favours_large=True),
    "Q4_1": _Search(1, (-0.5, 0.0, 0.5, 1.2, 2.0), True),
    "Q5_0": _Search(1, (-1.0, 0.0, 0.7, 1.5), favours_large=True),
    "Q5_1": _Search(1, (-1.0, 0.0, 0.7, 1.5, 2.5), True),
    "Q2_K": _Search(16, (-0.1, 0.2, 0.5, 0.8), True, 15),
    "Q3_K": _Search(16, (-0.6, -0.3, 0.0, 0.3, 0.6, 0.9), False, 31),
    "Q4_K": _Search(8, (-0.5, 0.0, 0.5, 1.2), True, 63),
    "Q5_K": _Search(8, (-1.0, 0.0, 0.7, 1.5), True, 63),
    "Q6_K": _Search(16, (-1.0, 0.0, 0.7, 1.5), False, 127),
    "IQ4_NL": _Search(1, (-12.0, -6.0, 0.0, 6.0, 12.0, 20.0)),
    "IQ4_XS": _Search(8, (-12.0, -6.0, 0.0, 6.0, 12.0, 20.0), False, 31),
}


def quantize_blocks(values: Tensor, block_type: BlockType, importance: Tensor | None = None) -> Tensor:
    """Quantize fp32 values (rows, columns) to uint8 blocks (rows, row_bytes) of a type of BLOCK_TYPES.

    importance: (columns,) fp32, what the squared error of each column counts; None: all the same. Q8_0 is rounded as
    ggml does, whatever counts.
    Raise ValueError where rows are not whole blocks, or values are not finite or too large for a scale in fp16.
    """
    if block_type.name == "Q8_0":
        return quantize(values, block_type)
    rows, columns = values.shape
    if columns % block_type.elements:
        raise ValueError(
            f"rows of {columns} values are not whole {block_type.name} blocks of {block_type.elements}: "
            "keep this tensor in floats"
        )
    blocks = values.reshape(-1, block_type.elements)
    out = torch.empty(len(blocks), block_type.size, dtype=torch.uint8, device=values.device)
    per_row = columns // block_type.elements
    step = SEARCHED_AT_ONCE // block_type.elements
    weights = None if importance is None else importance.view(per_row, block_type.elements)

    @torch.inference_mode()  # threads are outside a caller's
    def work(first: int) -> None:
        part = blocks[first : first + step].float()
        weight = None
        if weights is not None:
            weight = weights[torch.arange(first, first + len(part), device=values.device) % per_row]
        out[first : first + step] = _encode(part, block_type, weight)

    with ThreadPoolExecutor(min(PARTS_AT_ONCE, torch.get_num_threads())) as pool:
        list(pool.map(work, range(0, len(blocks), step)))
    return out.view(rows, -1)


class _Sums(NamedTuple):
    """Weighted sums over each group of its values and codes: all that its squared error depends on."""

    c: Tensor
    cc: Tensor
    cx: Tensor


class _Groups:
    """Values (elements of a group, groups of a block, blocks), with their weights, and their codes in a type.

    Values are held less `base` of their group, near which its lowest one is, so that sums of groups far from 0 are
    precise; it is 0 for types without minima.
    """

    def __init__(self, x: Tensor, weight: Tensor | None, block_type: BlockType) -> None:
        self.search = SEARCHES[block_type.name]
        self.low, self.high = x.amin(dim=0), x.amax(dim=0)
        self.base = torch.zeros_like(self.low)
        if self.search.has_low:
            self.base = self.low.clamp(max=0) if self.search.most else self.low
            x = x - self.base
        if weight is not None:  # where nothing counts, all does
            weight = torch.where(weight.sum(dim=0) == 0, 1.0, weight)
        self.x, self.weight = x, weight
        self.wx = x if weight is None else x * weight
        self.w = torch.full_like(self.low, len(x)) if weight is None else weight.sum(dim=0)
        self.sum_x = self.wx.sum(dim=0)
        layout = LAYOUTS[block_type.name]
        most_code = (1 << layout.low_bits + layout.high_bits) - 1
        self.least, self.most = -layout.offset, most_code - layout.offset
        self.table: Tensor | None = None
        if layout.is_table:
            self.least, self.most = IQ4_VALUES[0], IQ4_VALUES[-1]
            table = torch.tensor(IQ4_VALUES, dtype=torch.float32)
            places = torch.arange(self.least, self.most + 1, dtype=torch.float32)
            self.nearest = torch.bucketize(places, (table[1:] + table[:-1]) / 2).to(x.device)
            self.table = table.to(x.device)[self.nearest]

    def codes(self, scale: Tensor, low: Tensor) -> Tensor:
        """Return the nearest codes, as fp32 whole numbers, for values scale * code + low."""
        inverse = 1 / scale
        has_low = self.search.has_low
        codes = torch.addcmul((self.base - low) * inverse, self.x, inverse) if has_low else self.x * inverse
        codes = codes.clamp_(self.least, self.most).add_(ROUNDING).sub_(ROUNDING)
        if self.table is None:
            return codes
        return self.table[codes.sub_(self.least).nan_to_num_(0).int()]

    def sums(self, codes: Tensor) -> _Sums:
        wc = codes if self.weight is None else codes * self.weight
        return _Sums(wc.sum(dim=0), (wc * codes).sum(dim=0), (self.wx * codes).sum(dim=0))

    def fit(self, sums: _Sums) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scale and low that fit best with codes, and by how much the squared error is below that of 0.

        That is NaN where codes are all alike.
        """
        alone = sums.cx / sums.cc
        if not self.search.has_low:
            return alone, self.base, alone * sums.cx
        product = self.w * sums.cc
        determinant = product - sums.c * sums.c
        determinant = torch.where(determinant > FLAT * product, determinant, torch.nan)
        scale = (self.w * sums.cx - sums.c * self.sum_x) / determinant
        low = (sums.cc * self.sum_x - sums.c * sums.cx) / determinant
        if self.search.most:  # no low is above 0
            above = ~(low <= -self.base)
            low = torch.where(above, -self.base, low)
            scale = torch.where(above, (sums.cx - low * sums.c) / sums.cc, scale)
        gain = scale * (2 * sums.cx - scale * sums.cc) + low * (2 * (self.sum_x - scale * sums.c) - low * self.w)
        return scale, low + self.base, gain


def _encode(values: Tensor, block_type: BlockType, weight: Tensor | None) -> Tensor:
    """Quantize fp32 values (n_blocks, elements), with weights of the same shape, to blocks (n_blocks, size)."""
    search = SEARCHES[block_type.name]
    largest = values.abs().max()
    if search.favours_large:
        own = torch.sqrt(values.square().mean(dim=1, keepdim=True) + values.square())
        weight = own if weight is None else weight * own

    def in_groups(each: Tensor) -> Tensor:
        return each.unflatten(1, (search.n_groups, -1)).permute(2, 1, 0).contiguous()

    groups = _Groups(in_groups(values), None if weight is None else in_groups(weight), block_type)
    scale, low = _search_groups(groups)
    sub_scales = None
    if search.most:
        units, numbers = _search_blocks(groups, scale, low)
        scale, low = units[0] * numbers[0], -units[1] * numbers[1]
        dtype = torch.uint8 if search.has_low else torch.int8
        sub_scales = torch.stack(numbers[: 1 + search.has_low], dim=-1).transpose(0, 1).to(dtype)
    else:
        scale, low = _as_half(scale), _as_half(low)
        units = (scale[0], low[0])
    codes = groups.codes(scale, low).sub_(groups.least).nan_to_num_(0).to(torch.uint8)
    if groups.table is not None:
        codes = groups.nearest[codes.int()].to(torch.uint8)
    scales = torch.stack(units[: 1 + search.has_low], dim=-1).half()
    if not largest < TOO_LARGE or not scales.isfinite().all():
        raise ValueError(
            f"values up to {largest:g} cannot be quantized to {block_type.name}, whose scales are "
            "float16: leave --quantize out"
        )
    return put_together(BlockFields(codes.permute(2, 1, 0).flatten(1), scales, sub_scales), block_type)


def _as_half(values: Tensor) -> Tensor:
    """Round to fp16 and back."""
    return values.half().float()


def _of_blocks(values: Tensor) -> Tensor:
    """Add up over the groups of each block, two halves at a time.

    The order of torch's sums depends on where a block lies among others, and so would what its values become.
    """
    while len(values) > 1:
        values = values[: len(values) // 2] + values[len(values) // 2 :]
    return values[0]


def _search_groups(groups: _Groups) -> tuple[Tensor, Tensor]:
    """Return the scale and low (groups of a block, blocks) that are best for each group by itself."""
    search = groups.search
    best_scale, best_low = torch.zeros_like(groups.low), groups.base
    if search.has_low:
        bottom, spread, steps = groups.base, groups.high - groups.base, groups.most
        best_low = groups.sum_x / groups.w + groups.base
        if search.most:
            best_low = best_low.clamp(max=0)
    else:
        bottom, steps = groups.base, -groups.least
        spread = torch.where(groups.high > -groups.low, -groups.high, -groups.low)
    shifted = best_low - groups.base
    best = shifted * (2 * groups.sum_x - shifted * groups.w)
    for start in search.starts:
        scale, low = spread / (steps + start), bottom
        for _ in range(search.refits):
            scale, low, gain = groups.fit(groups.sums(groups.codes(scale, low)))
            better = gain > best
            best = torch.where(better, gain, best)
            best_scale, best_low = torch.where(better, scale, best_scale), torch.where(better, low, best_low)
    return best_scale, best_low


Pair = tuple[Tensor, Tensor]


def _search_blocks(groups: _Groups, scale: Tensor, low: Tensor) -> tuple[Pair, Pair]:
    """Return the scale and minimum of each block (blocks,), rounded to fp16, and the whole numbers of its groups.

    Whole numbers and codes that fit best are worked out in turn.
    """
    search, has_low = groups.search, groups.search.has_low
    most, least = search.most, 0 if has_low else -search.most - 1
    lowest, highest = scale.amin(dim=0), scale.amax(dim=0)
    if has_low:
        unit, unit_low = _as_half(highest / most), _as_half(-low.amin(dim=0) / most)
    else:
        unit = _as_half(torch.where(highest > -lowest, highest, lowest) / least)
        unit_low = torch.zeros_like(unit)

    def whole(number: Tensor, unit: Tensor) -> Tensor:
        return (number / unit).nan_to_num_(0).clamp_(least, most).add_(ROUNDING).sub_(ROUNDING)

    number, number_low = whole(scale, unit), whole(-low, unit_low)
    best = torch.full_like(unit, torch.inf)
    kept = [unit, unit_low, number, number_low]
    for refit in range(BLOCK_REFITS + 1):
        scale, low = unit * number, -unit_low * number_low
        sums = groups.sums(groups.codes(scale, low).nan_to_num_(0))
        shifted = low - groups.base
        error = scale * (scale * sums.cc - 2 * sums.cx)
        if has_low:
            error += shifted * (shifted * groups.w - 2 * (groups.sum_x - scale * sums.c))
        error = _of_blocks(error)
        better = error < best
        best = torch.where(better, error, best)
        now = [unit, unit_low, number, number_low]
        kept = [torch.where(better, new, old) for new, old in zip(now, kept, strict=True)]
        if refit == BLOCK_REFITS:
            break
        fitted, low, _ = groups.fit(sums)
        number = whole(fitted, unit)
        if has_low:
            x, cx = groups.sum_x + groups.base * groups.w, sums.cx + groups.base * sums.c
            number_low = whole((unit * number * sums.c - x) / groups.w, unit_low)
            a, b = _of_blocks(number * number * sums.cc), _of_blocks(number * number_low * sums.c)
            c = _of_blocks(number_low * number_low * groups.w)
            r, t = _of_blocks(number * cx), _of_blocks(number_low * x)
            determinant = a * c - b * b
            new, new_low = (r * c - b * t) / determinant, (b * r - a * t) / determinant
            fits = (determinant > FLAT * a * c) & (new_low >= 0)
            unit = torch.where(fits, _as_half(new), unit)
            unit_low = torch.where(fits, _as_half(new_low), unit_low)
        else:
            new = _of_blocks(number * sums.cx) / _of_blocks(number * number * sums.cc)
            unit = torch.where(new.isnan(), unit, _as_half(new))
    unit, unit_low, number, number_low = kept
    return (unit, unit_low), (number, number_low)
