"""Blocks of a file, and blocks made while loading, are what a rank holds, and compute what their values do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from llama.backends.cpu.build import library
from llama.backends.cpu.packed_weight import PackedWeight
from llama.backends.eager import EagerBackend
from llama.checkpoint import open_checkpoint
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.checkpoint.imatrix import ColumnSquares, ImportanceMatrix, read_imatrix, write_imatrix
from llama.checkpoint.load import WeightFormat, load_weights
from llama.checkpoint.names import module_name
from llama.checkpoint.shapes import global_shapes
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from llama.memory.plan import Planner
from llama.model import Transformer
from llama.quantization.gguf_blocks import BLOCK_TYPES, BlockType, dequantize
from llama.quantization.planar import PlanarWeight
from llama.quantization.weights import BlockWeight, QuantizedWeight
from tests.checkpoints import BYTE_VOCAB_SIZE, random_state, write_byte_tokenizer, write_meta
from tests.gguf_files import write_gguf_model
from tests.models import build, one_pass, random_tokens, transformer

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(library() is None, reason="no C++ compiler here")

# Rows of whole blocks: of 256 values, and of 32 but not of 64. Three blocks of hidden features.
SUPER = ModelArgs(
    dim=256, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=128, vocab_size=BYTE_VOCAB_SIZE, hidden_dim=768
)
SMALL = ModelArgs(dim=96, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=BYTE_VOCAB_SIZE, hidden_dim=160)
WHOLE = dataclasses.replace(SMALL, hidden_dim=None, multiple_of=32)  # as Meta's format says it: 8 blocks
KINDS = {name: SMALL if block_type.elements == 32 else SUPER for name, block_type in BLOCK_TYPES.items()}


def write(path: Path, kind_name: str) -> tuple[Path, dict[str, Tensor]]:
    """A GGUF file whose matrices are all of a type, with its tokenizer beside it, and the values of its tensors."""
    args = KINDS[kind_name]
    path.mkdir(exist_ok=True)
    write_byte_tokenizer(path)
    stored = write_gguf_model(path / "m.gguf", args, random_state(args), GGMLQuantizationType[kind_name])
    return path / "m.gguf", stored


def built(path: Path, **options: Any) -> Transformer:
    return build(path, tokenizer_path=path.parent / "tokenizer.model", **options).model


def matrices(model: Transformer) -> dict[str, Any]:
    """What is held of each weight that is no norm."""
    shapes = global_shapes(model.args)
    found = {}
    for name in (name for name, shape in shapes.items() if len(shape) == 2):
        module, _, attribute = name.rpartition(".")
        found[name] = getattr(model.get_submodule(module), attribute)
    return found


def held_bytes(model: Transformer) -> int:
    blocks = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    return sum(weight.nbytes for weight in model.parameters()) + sum(weight.nbytes for weight in blocks)


@needs_kernels
@pytest.mark.parametrize("kind_name", KINDS)
@torch.inference_mode()
def test_a_files_blocks_are_held_as_they_are_and_compute_what_their_values_do(tmp_path: Path, kind_name: str) -> None:
    """Of many tokens at once and of few; the bound is what activations of 16 bits cost, where fp32's would be 2e-5."""
    path, stored = write(tmp_path, kind_name)
    args = KINDS[kind_name]
    model, dense = built(path), transformer(args, stored)
    held = matrices(model)
    assert {type(weight) for weight in held.values()} == {PackedWeight}
    assert {weight.block_type.name for weight in held.values()} == {kind_name}
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind_name]]
    raw = sum(weight.shape.numel() for weight in held.values()) // elements * size
    most = 1.2 if kind_name == "Q2_K" else 1.06  # whose scales of 4 bits become bytes
    assert raw <= sum(weight.nbytes for weight in held.values()) < most * raw
    for shape in ((3, 7), (2, 2), (1, 1)):
        tokens = random_tokens(*shape, vocab_size=args.vocab_size)
        torch.testing.assert_close(one_pass(model, tokens), one_pass(dense, tokens), rtol=0, atol=5e-4)


class OfFourBits(BlockWeight):
    """As the class of a backend whose kernels know one type."""

    @staticmethod
    def holds(block_type: BlockType) -> bool:
        return block_type.name == "Q4_0"


@pytest.mark.parametrize(("kind_name", "mode", "linear"), [("Q5_1", None, None), ("Q5_1", "int8", "Q8_0")])
def test_types_that_a_class_does_not_hold_become_what_else_is_asked_for(
    tmp_path: Path, kind_name: str, mode: str | None, linear: str | None
) -> None:
    """Floats, or blocks that the class does hold; never blocks that no kernel reads."""
    path, stored = write(tmp_path, kind_name)
    checkpoint, weight_format = open_checkpoint(path), WeightFormat(torch.float32, mode, OfFourBits, True)
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    changes = load_weights(model, checkpoint, CPU, weight_format)
    assert changes.keys() == {(kind_name, linear or "float32")}
    for name, weight in matrices(model).items():
        assert (None if isinstance(weight, Tensor) else weight.block_type.name) == linear
        if linear is None:
            assert torch.equal(weight, stored[name])


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("format", ["meta", "hf"])
def test_quantizing_while_loading_gives_what_converting_saves(tmp_path: Path, mode: str, format: str) -> None:
    """Bit for bit, from either order of Q's and K's rows."""
    args = dataclasses.replace(SMALL, hidden_dim=None, multiple_of=96)
    write_meta(tmp_path / "meta", args, dtype=torch.bfloat16)
    convert(tmp_path / "meta", tmp_path / "hf")
    convert(tmp_path / "meta", tmp_path / "saved", quantize=mode)
    loaded = build(tmp_path / format, quantize=mode).model
    saved = build(tmp_path / "saved", quantize=mode).model
    expected = {"tok_embeddings": "Q8_0", "output": "Q8_0"}
    for name, weight in matrices(loaded).items():
        same = matrices(saved)[name]
        assert torch.equal(values(weight), values(same))
        assert weight.block_type.name == expected.get(module_name(name), {"int8": "Q8_0", "int4": "Q4_1"}[mode])
        assert same.block_type == weight.block_type
    assert all(torch.equal(*both) for both in zip(loaded.parameters(), saved.parameters(), strict=True))


def measured(path: Path, args: ModelArgs) -> ImportanceMatrix:
    """An importance matrix of a model's layers, in which each column counts something else."""
    shapes = {name: shape for name, shape in global_shapes(args).items() if "layers" in name and len(shape) == 2}
    counts = torch.tensor([9.0], dtype=torch.float64)
    squares = {
        name: ColumnSquares(torch.arange(1.0, 1 + shape[1], dtype=torch.float64).roll(i) ** 2, counts)
        for i, (name, shape) in enumerate(shapes.items())
    }
    write_imatrix(path, squares, ["text"], 9, 512)
    return read_imatrix(path)


def test_int4_by_importance_is_the_same_at_load_as_converted(tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", WHOLE)
    importance = measured(tmp_path / "i.gguf", WHOLE)
    convert(tmp_path / "meta", tmp_path / "saved", quantize="int4", importance=importance)
    plain, loaded, saved = (
        matrices(build(path, quantize="int4", **options).model)
        for path, options in (
            (tmp_path / "meta", {}),
            (tmp_path / "meta", {"imatrix": tmp_path / "i.gguf"}),
            (tmp_path / "saved", {}),
        )
    )
    for name, weight in loaded.items():
        assert torch.equal(values(weight), values(saved[name])), name
        assert torch.equal(values(weight), values(plain[name])) == ("layers" not in name), name


def test_ranks_quantize_their_columns_by_what_these_count(tmp_path: Path) -> None:
    """Of wo and w2 each rank has some of the columns, and of 8 blocks of w2 the last rank has one that only pads."""
    write_meta(tmp_path / "meta", WHOLE)
    checkpoint, importance = open_checkpoint(tmp_path / "meta"), measured(tmp_path / "i.gguf", WHOLE)
    weight_format = WeightFormat(torch.float32, "int4", column_weights=importance.of)
    held = []
    for rank, size in ((0, 1), (0, 3), (1, 3), (2, 3)):
        parallel = weight_format.with_ffn_multiple(checkpoint, ModelParallel(rank, size))
        with torch.device("meta"):
            model = Transformer(checkpoint.args, parallel)
        load_weights(model, checkpoint, CPU, weight_format)
        held.append(matrices(model))
    for name in held[0]:
        if (module := module_name(name)) in ("wo", "w1", "w2", "wq"):
            whole, *parts = (values(each[name]) for each in held)
            dim = 1 if module in ("wo", "w2") else 0
            assert torch.equal(torch.cat(parts, dim).narrow(dim, 0, whole.shape[dim]), whole), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"^imatrix .*i\.gguf is for quantize int4 alone, got None: give that, too"),
        ({"quantize": "int8"}, "is for quantize int4 alone, got int8"),
        ({"quantize": "int4"}, "is of 3 layers or more, the model has 2: it is of another model"),
    ],
)
def test_an_importance_matrix_that_does_not_fit_is_told(tmp_path: Path, options: Any, words: str) -> None:
    write_meta(tmp_path, WHOLE)
    measured(tmp_path / "i.gguf", dataclasses.replace(WHOLE, n_layers=3))
    with pytest.raises(ValueError, match=words) as caught:
        build(tmp_path, imatrix=tmp_path / "i.gguf", **options)
    assert "\n" not in str(caught.value)


def test_an_importance_matrix_for_weights_that_stay_as_they_are_is_told(tmp_path: Path) -> None:
    path, _ = write(tmp_path, "Q4_0")
    measured(tmp_path / "i.gguf", SMALL)
    with pytest.raises(ValueError, match="has nothing to do, as the weights are blocks that are no larger already"):
        built(path, quantize="int4", imatrix=tmp_path / "i.gguf")


def convert(source: Path, target: Path, **options: Any) -> None:
    checkpoint = open_checkpoint(source)
    write_checkpoint(writer(checkpoint, tokenizer_source(checkpoint), "hf", **options), target, lambda n_bytes: None)


def test_rows_that_are_not_whole_blocks_are_held_as_floats(tmp_path: Path) -> None:
    write_meta(tmp_path, dataclasses.replace(SMALL, multiple_of=10, hidden_dim=None))
    held = matrices(build(tmp_path, quantize="int4").model)
    floats = {module_name(name) for name, weight in held.items() if isinstance(weight, Tensor)}
    assert floats == {"w2"} and held["layers.0.feed_forward.w2.weight"].shape[1] % 32 != 0


@pytest.mark.parametrize("value", ["int2", "INT8", "", 8])
def test_an_unknown_quantization_is_told(tmp_path: Path, value: object) -> None:
    write_meta(tmp_path, SMALL)
    with pytest.raises(ValueError, match=r"^quantize must be one of int8, int4, fp8, got"):
        build(tmp_path, quantize=value)


def test_8_bit_floats_are_refused_where_no_gpu_reads_them(tmp_path: Path) -> None:
    write_meta(tmp_path, SMALL)
    with pytest.raises(ValueError, match=r"^quantize fp8 needs a CUDA device and Triton kernels, got cpu: use int8"):
        build(tmp_path, quantize="fp8")


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize(
    ("kind_name", "mode", "linear", "tables"),
    [
        ("Q4_0", "int8", "Q4_0", "Q4_0"),
        ("Q4_0", "int4", "Q4_0", "Q4_0"),
        ("Q8_0", "int4", "Q4_1", "Q8_0"),
        ("Q4_K", "int4", "Q4_K", "Q4_K"),
        ("Q6_K", "int8", "Q6_K", "Q6_K"),
        ("Q6_K", "int4", "Q4_1", "Q6_K"),
        ("Q5_1", "int4", "Q4_1", "Q5_1"),
        ("IQ4_XS", "int4", "IQ4_XS", "IQ4_XS"),
    ],
)
def test_blocks_of_a_file_that_are_smaller_stay_as_they_are(
    tmp_path: Path, kind_name: str, mode: str, linear: str, tables: str
) -> None:
    path, stored = write(tmp_path, kind_name)
    for name, weight in matrices(built(path, quantize=mode)).items():
        table = module_name(name) in ("tok_embeddings", "output")
        assert weight.block_type.name == (tables if table else linear), name
        if weight.block_type.name == kind_name:
            rows = torch.arange(weight.shape[0])
            torch.testing.assert_close(weight.rows(rows), stored[name], rtol=1e-6, atol=1e-6)


# What holds a file's blocks: the GPU's planes can be decoded anywhere.
PACKS = [pytest.param(PackedWeight, marks=needs_kernels), PlanarWeight, None]
PLANNED = [
    ("Q4_0", None),
    ("Q4_K", None),
    ("Q3_K", None),
    ("IQ4_XS", None),
    ("Q5_0", "int4"),
    ("Q6_K", "int4"),
    ("meta", "int8"),
    ("meta", "int4"),
]


@pytest.mark.slow
@pytest.mark.parametrize("packs", PACKS, ids=["cpu", "gpu", "torch"])
@pytest.mark.parametrize(("kind_name", "mode"), PLANNED)
def test_planned_weights_are_the_bytes_of_the_blocks(
    tmp_path: Path, kind_name: str, mode: str | None, packs: Any
) -> None:
    """On every rank of some, where shares of hidden features are uneven and padded with blocks of zeros."""
    if kind_name == "meta":
        write_meta(tmp_path, dataclasses.replace(SMALL, multiple_of=160, hidden_dim=None), dtype=torch.bfloat16)
    else:
        write(tmp_path, kind_name)
    checkpoint = open_checkpoint(tmp_path if kind_name == "meta" else tmp_path / "m.gguf")
    check_planned(checkpoint, WeightFormat(torch.float32, mode, *held_in(packs)))


def test_planned_weights_are_the_bytes_of_8_bit_floats(tmp_path: Path) -> None:
    """On a GPU: elsewhere they are refused."""
    write_meta(tmp_path, dtype=torch.bfloat16)
    check_planned(open_checkpoint(tmp_path), WeightFormat(torch.float32, "fp8", PlanarWeight, True), sizes=(1, 2))


def held_in(weight_cls: Any) -> tuple[Any, bool]:
    """The end of a WeightFormat: kernels' class, which keeps a file's blocks, or None for torch's, which does not."""
    return weight_cls or BlockWeight, weight_cls is not None


def check_planned(checkpoint: Any, weight_format: WeightFormat, sizes: tuple[int, ...] = (1, 2, 3)) -> None:
    for size in sizes:
        for rank in {0, size - 1}:
            parallel = weight_format.with_ffn_multiple(checkpoint, ModelParallel(rank, size))
            planner = Planner(checkpoint, checkpoint.args, parallel, weight_format, EagerBackend(CPU), free=10**9)
            with torch.device("meta"):
                model = Transformer(checkpoint.args, parallel)
            load_weights(model, checkpoint, CPU, weight_format)
            assert planner.weights.total == held_bytes(model), (rank, size)
            in_blocks = any(isinstance(weight, QuantizedWeight) for weight in matrices(model).values())
            assert in_blocks == (weight_format.keeps_stored_blocks or weight_format.quantize is not None)


@pytest.mark.slow
@pytest.mark.parametrize("packs", PACKS, ids=["cpu", "gpu", "torch"])
@pytest.mark.parametrize(
    ("kind_name", "size", "floats"),
    [("Q4_K", 2, {"wo"}), ("Q4_K", 3, set()), ("Q4_0", 2, {"wo"}), ("Q5_K", 2, {"wo"}), ("IQ4_NL", 3, set())],
)
def test_ranks_cut_rows_between_blocks_or_hold_floats(
    tmp_path: Path, kind_name: str, size: int, floats: set[str], packs: Any
) -> None:
    """Put together, the ranks' parts are the file's values, each once, and zeros."""
    path, stored = write(tmp_path, kind_name)
    checkpoint = open_checkpoint(path)
    # Without kernels blocks are kept where they are asked for.
    weight_format = WeightFormat(torch.float32, None if packs else "int8", *held_in(packs))
    ranks = []
    for rank in range(size):
        parallel = weight_format.with_ffn_multiple(checkpoint, ModelParallel(rank, size))
        with torch.device("meta"):
            model = Transformer(checkpoint.args, parallel)
        load_weights(model, checkpoint, CPU, weight_format)
        ranks.append(matrices(model))
    for name, expected in stored.items():
        if expected.dim() == 1 or module_name(name) in ("wk", "wv"):
            continue
        parts = [values(rank[name]) for rank in ranks]
        dim = 1 if module_name(name) in ("wo", "w2") else 0
        joined = torch.cat(parts, dim)
        length = expected.shape[dim]
        torch.testing.assert_close(joined.narrow(dim, 0, length), expected, rtol=1e-6, atol=1e-6)
        assert not joined.narrow(dim, length, joined.shape[dim] - length).any()
        assert all(isinstance(rank[name], Tensor) == (module_name(name) in floats) for rank in ranks), name


def values(weight: Any) -> Tensor:
    if isinstance(weight, BlockWeight):
        return dequantize(weight.blocks, BLOCK_TYPES[weight.block_type.name])
    return weight if isinstance(weight, Tensor) else weight.rows(torch.arange(weight.shape[0]))
