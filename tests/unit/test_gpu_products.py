"""Products of few tokens on a GPU are those of the values that its weights store, at a token's own pace."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.backends.cuda import matmul as matmul_module
from llama.backends.cuda.matmul import matmul
from llama.norms import XIELU
from llama.quantization import planar as planes
from llama.quantization.gguf_blocks import BLOCK_TYPES, F8_E4M3, BlockType, dequantize
from llama.quantization.planar import MAX_DEQUANT_GEMM_TOKENS, MAX_GEMV_TOKENS, Fp8Weight, PlanarWeight
from tests.gpu_compile import Ahead, compiled_kernels
from tests.unit.test_kernels import random_blocks

pytest.importorskip("triton", reason="triton is not installed")
from llama.backends.cuda import gemm, gemv

pytestmark = pytest.mark.slow

TYPES = list(BLOCK_TYPES.values())
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# No multiple of a program's rows; three blocks of 256 columns, so that the last step of a program is not full.
ROWS, COLUMNS = 22, 768
# Types for what depends on the shapes of kernels. All others are read by parts of the same code.
KINDS = [*(BLOCK_TYPES[name] for name in ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")), F8_E4M3]


def each_type(types: list[BlockType]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block_type", types, ids=lambda kind: kind.name)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def blocks_of(block_type: BlockType, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return random_blocks(block_type, rows, columns).to(DEVICE)


def stored(block_type: BlockType, rows: int = ROWS, columns: int = COLUMNS) -> tuple[PlanarWeight | Fp8Weight, Tensor]:
    """A weight (rows, columns), and its values in fp64 by another way."""
    if block_type == F8_E4M3:
        weight = Fp8Weight.of(random(rows, columns))
        return weight, weight.codes.double() * weight.scales.double()
    blocks = blocks_of(block_type, rows, columns)
    return PlanarWeight(blocks, block_type), dequantize(blocks, block_type).double()


def close(actual: Tensor, expected: Tensor, bound: float = 2e-6) -> None:
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= bound * expected.abs().max()


def gated(x: Tensor, values: Tensor) -> Tensor:
    gate, up = (x.double() @ values.t()).chunk(2, dim=-1)
    return F.silu(gate) * up


@each_type(TYPES)
def test_planes_keep_every_value(block_type: BlockType) -> None:
    blocks = blocks_of(block_type)
    weight, expected = PlanarWeight(blocks, block_type), dequantize(blocks, block_type)
    assert torch.equal(weight.dense(torch.float32), expected)
    assert torch.equal(gemm.dequantize(weight, torch.float32), expected)
    assert torch.equal(gemm.dequantize(weight.part(5, 8), torch.float16), expected[5:8].half())
    ids = torch.tensor([[21, 0, 17], [5, 5, 20]], device=DEVICE)
    assert torch.equal(weight.rows(ids), expected[ids])
    n_blocks = blocks.numel() // block_type.size
    assert blocks.nbytes <= weight.nbytes <= blocks.nbytes + 4 * n_blocks * (block_type.elements == 256)
    assert weight.nbytes == PlanarWeight.bytes_of(block_type, *weight.shape)


@each_type(KINDS)
def test_rows_lie_together_once(block_type: BlockType) -> None:
    """wq, wk and wv are parts of one weight: a second copy would cost the memory that quantizing saved."""
    whole, values = stored(block_type)
    parts = [whole.part(0, 16), whole.part(16, 21), whole.part(21, ROWS)]
    joined = type(whole).join(parts)
    assert joined.shape == whole.shape == (ROWS, COLUMNS)
    assert torch.equal(joined.dense(torch.float32), whole.dense(torch.float32))
    part = joined.part(16, 21)
    assert part.codes.data_ptr() == joined.codes[16:].data_ptr()
    assert part.nbytes * ROWS == joined.nbytes * 5
    x = random(3, COLUMNS)
    close(gemm.gemm(x, part), x.double() @ values[16:21].t())


@each_type([*TYPES, F8_E4M3])
def test_few_tokens_are_multiplied_in_fp32(block_type: BlockType) -> None:
    weight, values = stored(block_type)
    x, bias = random(MAX_GEMV_TOKENS, COLUMNS) / 16, random(ROWS)
    for n_tokens in (1, 3, MAX_GEMV_TOKENS):
        close(gemm.gemm(x[:n_tokens], weight), x[:n_tokens].double() @ values.t())
    for dtype in (torch.bfloat16, torch.float16):
        rounded = x[2:4].to(dtype)
        expected = rounded.double() @ values.t()
        close(gemm.gemm(rounded, weight, bias, torch.float32), expected + bias)
        # Triton's interpreter cuts bits off where GPUs round to bfloat16.
        close(gemm.gemm(rounded, weight), expected, torch.finfo(dtype).eps)


@each_type([*TYPES, F8_E4M3])
def test_one_token_is_multiplied_in_fp32(block_type: BlockType) -> None:
    """By a kernel of its own, plain and gated, with a bias, cut out of a batch, and of an odd hidden size."""
    weight, values = stored(block_type, 10)  # no multiple of a program's rows
    x, bias = random(3, 2, COLUMNS)[1:2, 1] / values.abs().max(), random(len(values))
    expected = x.double() @ values.t()
    close(gemv.gemv(x, weight), expected)
    close(gemv.gemv(x, weight, bias), expected + bias)
    close(gemv.gated_gemv(x, weight), gated(x, values), 5e-6)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = x.to(dtype)
        close(gemv.gemv(rounded, weight, bias, torch.float32), rounded.double() @ values.t() + bias)
    close(matmul(x, weight, bias, torch.float32), expected + bias)


def test_activations_without_a_gate_are_of_the_product_and_its_bias() -> None:
    """As relu^2 of Nemotron's and xIELU of Apertus' feed-forwards, which have w3 alone."""
    weight, values = stored(BLOCK_TYPES["Q4_0"], 10)
    x, bias = random(3, COLUMNS) / values.abs().max(), random(len(values))
    xielu = XIELU().double().to(DEVICE)
    xielu.weight.data = torch.tensor([0.7, 1.3, 0.5, -1e-6], dtype=torch.float64, device=DEVICE)
    for multiply, n_tokens in ((gemv.gemv, 1), (gemm.gemm, 3)):
        ups = x[:n_tokens].double() @ values.t() + bias
        assert ups.min() < -1 and ups.max() > 1
        close(multiply(x[:n_tokens], weight, bias, activation="relu2"), F.relu(ups).square(), 5e-6)
        slopes = xielu.weight.float()
        close(multiply(x[:n_tokens], weight, bias, activation="xielu", slopes=slopes), xielu(ups), 5e-6)


@pytest.mark.parametrize("columns", [2 * 4096, 4096 + 256])
@each_type(KINDS)
def test_a_program_of_one_token_takes_a_row_in_steps(block_type: BlockType, columns: int) -> None:
    """Four warps take 4096 columns a step: two whole steps, and one whose successor ends after 256."""
    weight, values = stored(block_type, 6, columns)
    x = random(1, columns) / values.abs().max()
    close(gemv.gemv(x, weight), x.double() @ values.t())
    close(gemv.gated_gemv(x, weight), gated(x, values), 5e-6)


@pytest.mark.parametrize("n_tokens", [MAX_GEMV_TOKENS + 1, MAX_DEQUANT_GEMM_TOKENS])
@each_type(KINDS)
def test_more_tokens_are_multiplied_in_their_dtype(block_type: BlockType, n_tokens: int) -> None:
    """bfloat16 is left to GPUs: Triton's interpreter multiplies its bits as integers."""
    weight, values = stored(block_type)
    x, bias = random(n_tokens, COLUMNS), random(ROWS)
    close(gemm.gemm(x, weight, bias), x.double() @ values.t() + bias)
    dtypes = [torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float16]
    for dtype in dtypes:
        bound = torch.finfo(dtype).eps
        close(gemm.gemm(x.to(dtype), weight, out_dtype=torch.float32), x.to(dtype).double() @ values.t(), bound)


@pytest.mark.parametrize("n_tokens", [1, 12])
@each_type(KINDS)
def test_gates_and_their_product_are_one_kernel(block_type: BlockType, n_tokens: int) -> None:
    """An odd hidden size: the last program's rows of w1 end where those of w3 begin."""
    weight, values = stored(block_type, 2 * (ROWS + 1))
    x = random(n_tokens, COLUMNS) / values.abs().max()  # the gates are neither open nor shut
    close(gemm.gated_gemm(x, weight), gated(x, values), 5e-6)


def test_a_row_of_8_bit_floats_may_have_any_length() -> None:
    weight = Fp8Weight.of(random(ROWS, 71))
    x, values = random(12, 71), weight.codes.double() * weight.scales.double()
    close(gemv.gemv(x[:1], weight), x[:1].double() @ values.t())
    for n_tokens in (2, 12):
        close(gemm.gemm(x[:n_tokens], weight), x[:n_tokens].double() @ values.t())
    assert torch.equal(gemm.dequantize(weight, torch.float32), weight.dense(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats_are_multiplied_as_eight_rows_whatever_is_asked(dtype: torch.dtype) -> None:
    """A library takes other kernels for one token than for eight, which add in another order."""
    weight, x = random(ROWS, COLUMNS, dtype=dtype), random(MAX_GEMV_TOKENS, COLUMNS, dtype=dtype)
    together = matmul(x, weight)
    assert together.dtype == torch.float32
    close(together, x.double() @ weight.double().t(), 1e-5 if DEVICE.type == "cuda" else 2 * torch.finfo(dtype).eps)
    for n_tokens in (1, 3, MAX_GEMV_TOKENS):
        assert torch.equal(matmul(x[-n_tokens:], weight), together[-n_tokens:])


@each_type(KINDS)
def test_a_token_does_not_feel_how_many_are_computed_with_it(block_type: BlockType) -> None:
    """Among 2 to 8; alone it takes another kernel, and differs by rounding (see D41)."""
    weight, _ = stored(block_type, 6)
    x = random(MAX_GEMV_TOKENS, COLUMNS, dtype=torch.bfloat16)
    for multiply in (gemm.gemm, gemm.gated_gemm):
        together = multiply(x, weight, out_dtype=torch.float32)
        for n_tokens in (2, 3, 5):
            assert torch.equal(multiply(x[-n_tokens:], weight, out_dtype=torch.float32), together[-n_tokens:])


def test_tokens_may_lie_apart() -> None:
    """One position of each row of a batch, cut out of all."""
    weight, values = stored(BLOCK_TYPES["Q4_0"])
    x = random(3, 2, COLUMNS)[:, 1]
    close(gemm.gemm(x, weight), x.double() @ values.t())


@each_type(KINDS)
def test_a_layer_takes_any_number_of_tokens(block_type: BlockType, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, values = stored(block_type)
    for module in (planes, matmul_module):
        monkeypatch.setattr(module, "MAX_DEQUANTIZED_GPU_VALUES", 10 * COLUMNS)  # in four pieces
    x = random(MAX_DEQUANT_GEMM_TOKENS + 1, COLUMNS)
    for multiply in (weight, lambda x: matmul(x, weight)):
        for n_tokens in (1, 30, MAX_DEQUANT_GEMM_TOKENS + 1):
            close(multiply(x[:n_tokens]), x[:n_tokens].double() @ values.t())


def test_8_bit_floats_are_the_nearest() -> None:
    values = random(ROWS, 48) * torch.logspace(-6, 6, ROWS, device=DEVICE)[:, None]
    values[3] = 0
    weight = Fp8Weight.of(values.bfloat16())
    values = values.bfloat16().float()
    dense = weight.dense(torch.float32)
    assert dense.isfinite().all() and torch.equal(dense[3], values[3])
    # Half a unit of 3 bits; and what lies below the normal numbers, half their smallest step.
    error = (dense - values).abs()
    assert (
        error <= torch.maximum(values.abs() / 16, values.abs().amax(dim=1, keepdim=True) / 448 / 1024) * 1.001
    ).all()
    assert torch.equal(weight.rows(torch.tensor([5, 0], device=DEVICE)), dense[[5, 0]])
    with pytest.raises(ValueError, match="not finite"):
        Fp8Weight.of(torch.full((2, 16), float("inf")))


def test_every_8_bit_float_is_decoded() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite().nonzero().flatten().cpu()] if DEVICE.type == "cpu" else codes
    weight = Fp8Weight(codes[None], torch.ones(1, 1, device=DEVICE))
    values = gemm.dequantize(weight, torch.float32)
    finite = weight.codes.float().isfinite()
    assert torch.equal(values[finite], weight.codes.float()[finite]) and finite.sum() == 254


def test_the_hardwares_product_of_8_bit_floats() -> None:
    """Tokens of zeros included; torch runs the same operation on a CPU."""
    weight = Fp8Weight.of(random(48, 64))
    x = random(70, 64)
    x[7] = 0
    y = planes.multiply_fp8(x, weight)
    assert not y[7].any()
    close(y.float(), x.double() @ weight.dense(torch.float64).t(), 0.05)


POINTERS = {
    "Q4_0": {"scales_ptr": "*fp16"},
    "Q4_1": {"scales_ptr": "*i32"},
    "Q8_0": {"scales_ptr": "*fp16"},
    "Q4_K": {"scales_ptr": "*i32", "sub_scales_ptr": "*i16"},
    "Q6_K": {"scales_ptr": "*fp16", "sub_scales_ptr": "*i16", "high_ptr": "*i32"},
    "F8_E4M3": {"scales_ptr": "*fp32"},
}
# Types of which the programs that take the most registers are compiled: the others are read by parts of the same code.
LARGEST = {
    "Q2_K": {"scales_ptr": "*i32", "sub_scales_ptr": "*i16"},
    "Q3_K": {"scales_ptr": "*fp16", "sub_scales_ptr": "*i16", "high_ptr": "*i32"},
    "Q5_K": {"scales_ptr": "*i32", "sub_scales_ptr": "*i16", "high_ptr": "*i32"},
    "IQ4_XS": {"scales_ptr": "*fp16", "sub_scales_ptr": "*i8"},
}


def ahead_of_time() -> Iterator[Ahead]:
    """All kernels, as the 8B model launches them: even rows, of multiples of 16, and bf16 activations."""
    sizes = dict.fromkeys(("n_out", "n_in", "n_groups", "x_stride"), "i32:16") | {"n_tokens": "i32"}
    for kind, pointers in (POINTERS | LARGEST).items():
        absent = dict.fromkeys({"high_ptr", "scales_ptr", "sub_scales_ptr"} - pointers.keys())
        no_ends = dict.fromkeys(("bias_ptr", "slopes_ptr"))
        # For fp32, as it takes the most registers, the type that does so, too.
        for dtype, name in [(torch.bfloat16, "bf16"), *([(torch.float32, "fp32")] if kind == "Q6_K" else [])]:
            tensors = {"x_ptr": f"*{name}", "y_ptr": f"*{name}", "codes_ptr": "*i32", **pointers}
            for n_tokens, n_rows, gated in itertools.product(
                (MAX_GEMV_TOKENS, MAX_DEQUANT_GEMM_TOKENS), (4096, 28672), (False, True)
            ):
                tokens, tile = gemm.tile_for(kind, n_tokens, n_rows, dtype)
                constants = {"KIND": kind, "ACTIVATION": "silu" if gated else None, "TOKENS": tokens, "EVEN": True}
                constants |= {"ROWS": tile.rows, "GROUPS": tile.groups, "STAGES": tile.stages}
                # What is gated has many rows.
                if gated == (n_rows == 28672) and (kind in POINTERS or (gated and n_tokens > MAX_GEMV_TOKENS)):
                    label = f"gemm {kind} {name} {n_tokens} {n_rows}"
                    kernel = gemm._gemm_kernel, tensors | sizes, absent | no_ends | constants
                    yield Ahead(label, *kernel, num_warps=tile.warps, num_stages=tile.stages)
            byte_pointers = {name: "*u8" if name == "high_ptr" else kind for name, kind in pointers.items()}
            alone = {"x_ptr": f"*{name}", "y_ptr": f"*{name}", "codes_ptr": "*u8", **byte_pointers}
            alone |= {"n_out": "i32:16", "n_in": "i32:16", "magic": "i32"}
            vector, rows = 16 // dtype.itemsize, gemv.ROWS[dtype.itemsize]
            uneven = [(4, False, False)]  # as w2 is
            for warps, gated, even in [*uneven, *([(4, False, True), (2, True, True)] if kind in POINTERS else [])]:
                constants = {"KIND": kind, "ACTIVATION": "silu" if gated else None, "ROWS": rows, "LANES": 32 * warps}
                constants |= {"VECTOR": vector, "EVEN": even}
                yield Ahead(
                    f"gemv {kind} {name} {warps} {even}", gemv._gemv_kernel, alone, absent | no_ends | constants, warps
                )
            if kind == "Q4_K":  # gates, biases and activations come after all that is held at once
                ends = {"bias_ptr": "*bf16", "slopes_ptr": "*bf16"}
                constants |= {"EVEN": True, "ACTIVATION": "xielu"}
                yield Ahead(f"gemv {kind} {name} xielu", gemv._gemv_kernel, alone | ends, absent | constants, warps)
                tokens, tile = gemm.tile_for(kind, MAX_DEQUANT_GEMM_TOKENS, 28672, dtype)
                constants = {"KIND": kind, "ACTIVATION": "xielu", "TOKENS": tokens, "EVEN": True}
                constants |= {"ROWS": tile.rows, "GROUPS": tile.groups, "STAGES": tile.stages}
                kernel = gemm._gemm_kernel, tensors | ends | sizes, absent | constants
                yield Ahead(f"gemm {kind} {name} xielu", *kernel, num_warps=tile.warps, num_stages=tile.stages)
        if kind in LARGEST:
            continue
        signature = {"codes_ptr": "*i32", **pointers, "values_ptr": "*bf16", "n_in": "i32:16", "n_groups": "i32:16"}
        constants = absent | {"KIND": kind, "GROUPS": gemm.DENSE_GROUPS}
        yield Ahead(f"dense {kind}", gemm._dequantize_kernel, signature, constants)


def test_kernels_compile_for_gpus_and_spill_nothing() -> None:
    """Codes are copied to shared memory ahead, 16 bytes at a time, and multiplied by tensor cores."""
    for name, kernel in compiled_kernels(__name__).items():
        assert not kernel.spills, (name, kernel.registers, kernel.spills)
        # What GPUs other than A100 and H100 give a program.
        assert kernel.shared <= 99 * 1024, (name, kernel.shared)
        if name.startswith("gemm") and "fp32" not in name:
            assert "cp.async.cg.shared.global" in kernel.ptx and "mma.sync" in kernel.ptx, name
        if name.startswith("gemv") and "fp32" not in name:  # 8 codes or 8 values of x at a time
            assert kernel.ptx.count("ld.global.v2.b32") >= gemv.ROWS[2], name
            assert "ld.global.v4.b32" in kernel.ptx and ".local" not in kernel.ptx, name


def test_one_program_serves_two_tokens_and_eight() -> None:
    """Programs compiled apart for 1 and 8 tokens differed in last bits, as only a GPU showed."""
    for kind, n_rows in itertools.product(gemm.TILES, (4096, 28672)):
        assert len({gemm.tile_for(kind, n, n_rows, torch.bfloat16) for n in range(1, MAX_GEMV_TOKENS + 1)}) == 1
