"""Importance matrices: the files that are read and written, what they change, and which are refused in one line."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from llama.checkpoint import open_checkpoint, with_adapters
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.checkpoint.imatrix import ColumnSquares, check_measured, read_imatrix, write_imatrix
from llama.checkpoint.shapes import global_shapes
from llama.cli import calibrate, convert
from llama.engine.options import BuildOptions
from tests.conftest import TINY_LLAMA2

MATRICES = {
    name: shape for name, shape in global_shapes(TINY_LLAMA2).items() if name.startswith("layers.") and len(shape) > 1
}
HEAVY = 5  # a column that counts 10,000 times as much as others


def squares(matrices: Mapping[str, tuple[int, ...]] = MATRICES) -> dict[str, ColumnSquares]:
    sums = {name: torch.rand(shape[1], dtype=torch.float64) + 0.5 for name, shape in matrices.items()}
    for each in sums.values():
        each[HEAVY] = 1e4
    return {name: ColumnSquares(each, torch.tensor([40.0], dtype=torch.float64)) for name, each in sums.items()}


def write_dat(path: Path, entries: Mapping[str, tuple[int, Any]], end: bytes = b"") -> None:
    """llama.cpp's older form: of each matrix its name, a number of calls, and values that are to be divided by it."""
    parts = [struct.pack("<i", len(entries))]
    for name, (n_calls, values) in entries.items():
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", n_calls, len(values))]
        parts.append(np.asarray(values, np.float32).tobytes())
    path.write_bytes(b"".join(parts) + end)


def write_gguf(path: Path, tensors: Mapping[str, Any]) -> None:
    file = gguf.GGUFWriter(path, "llama")
    file.add_type("imatrix")
    for name, values in tensors.items():
        file.add_tensor(name, np.asarray(values))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def test_a_file_has_the_keys_and_tensors_of_llama_cpps(tmp_path: Path) -> None:
    measured = squares()
    write_imatrix(tmp_path / "i.gguf", measured, ["a text"], 3, 512)
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": ["a text"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 512,
    }
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert list(tensors) == sorted(tensors, key=lambda name: (name.rpartition(".")[0], not name.endswith("2")))
    assert len(tensors) == 2 * len(MATRICES)
    assert tensors["blk.1.ffn_down.weight.counts"].tolist() == [40]
    wanted = measured["layers.1.feed_forward.w2.weight"].sums
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight.in_sum2"], wanted.float().numpy())


def test_both_forms_say_the_same(tmp_path: Path) -> None:
    """The older one has sums over chunks, whose number is of calls and not of tokens."""
    measured = squares()
    write_imatrix(tmp_path / "i.gguf", measured, ["a text"], 3, 512)
    new = read_imatrix(tmp_path / "i.gguf")
    entries = {name: (3, mean[0] * 3) for name, mean in new.means.items()}
    write_dat(tmp_path / "i.dat", entries, struct.pack("<ii", 3, 6) + b"a text")
    write_dat(tmp_path / "oldest.dat", entries)
    old, oldest = read_imatrix(tmp_path / "i.dat"), read_imatrix(tmp_path / "oldest.dat")
    assert (list(old.datasets), old.chunk_count) == (list(new.datasets), new.chunk_count) == (["a text"], 3)
    for name, shape in MATRICES.items():
        weights = new.of(name, shape)
        assert weights is not None and weights.shape == (shape[1],)
        sums = measured[name].sums
        torch.testing.assert_close(weights, (sums / sums.mean()).float())
        for other in (old, oldest):
            torch.testing.assert_close(other.of(name, shape), weights)
    assert new.of("output.weight", (400, 32)) is None


def test_experts_have_rows_and_counts_of_their_own(tmp_path: Path) -> None:
    """An expert that no token was routed to had 0 / 0; all its columns count the same."""
    sums = torch.tensor([[2.0, 6.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    counts = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)
    write_imatrix(tmp_path / "i.gguf", {"blk.0.ffn_up_exps.weight": ColumnSquares(sums, counts)}, [], 1, 512)
    write_dat(tmp_path / "i.dat", {"blk.0.ffn_up_exps.weight": (2, [2, 6, 2, 2, 2, 2])})
    for file in ("i.gguf", "i.dat"):
        weights = read_imatrix(tmp_path / file).of("blk.0.ffn_up_exps.weight", (3, 7, 2))
        assert weights is not None and weights.tolist() == [[0.5, 1.5], [1, 1], [1, 1]]


def test_what_was_measured_of_experts_is_one_matrix_as_in_llama_cpps_files(tmp_path: Path) -> None:
    """Each expert had a name that llama-quantize does not know, and one that no token was routed to made the file void.

    Experts are in the order of their numbers, not of their names.
    """
    squares = {
        f"layers.1.feed_forward.experts.{number}.w3.weight": ColumnSquares(
            torch.tensor([number, 3.0 * number], dtype=torch.float64), torch.tensor([float(number)])
        )
        for number in range(12)
    }
    write_imatrix(tmp_path / "i.gguf", squares, [], 1, 512)
    importance = read_imatrix(tmp_path / "i.gguf")
    assert importance.means.keys() == {"blk.1.ffn_up_exps.weight"}
    weights = importance.of("blk.1.ffn_up_exps.weight", (12, 7, 2))
    assert weights is not None and weights.tolist() == [[1, 1], *[[0.5, 1.5]] * 11]


def test_matrices_with_the_same_input_share_what_one_of_them_has(tmp_path: Path) -> None:
    """Files of architectures with fused matrices name attn_qkv and ffn_up alone."""
    write_gguf(
        tmp_path / "i.gguf",
        {
            f"blk.0.{name}.weight.{kind}": np.array(values, np.float32)
            for name, first in (("attn_qkv", 3), ("ffn_up", 7))
            for kind, values in (("in_sum2", [first, 1]), ("counts", [1]), ("in_sum", [1, 1]))
        },
    )
    importance = read_imatrix(tmp_path / "i.gguf")
    for name, first in (("attention.wq", 1.5), ("attention.wv", 1.5), ("feed_forward.w1", 1.75)):
        weights = importance.of(f"layers.0.{name}.weight", (4, 2))
        assert weights is not None and weights[0] == first, name
    with pytest.raises(ValueError, match=r"nothing of blk\.0\.ffn_down\.weight"):
        importance.of("layers.0.feed_forward.w2.weight", (4, 2))


@pytest.mark.parametrize(("format", "options"), [("gguf", {"dtype": "q4_0"}), ("hf", {"quantize": "int4"})])
def test_columns_that_count_are_rounded_with_more_care(
    llama2_folder: Path, tmp_path: Path, format: str, options: dict[str, Any]
) -> None:
    write_imatrix(tmp_path / "i.gguf", squares(), [], 1, 512)
    errors = []
    for importance in (None, read_imatrix(tmp_path / "i.gguf")):
        path = tmp_path / f"{importance is None}.gguf"
        checkpoint = open_checkpoint(llama2_folder)
        made = writer(checkpoint, tokenizer_source(checkpoint), format, importance=importance, **options)
        write_checkpoint(made, path, lambda n_bytes: None)
        again = open_checkpoint(path)
        pairs = {name: (again.read(name).float(), checkpoint.read(name)) for name in MATRICES}
        differences = {name: (found - exact).square().mean(dim=0) for name, (found, exact) in pairs.items()}
        errors.append({name: float(each[HEAVY] / each.mean()) for name, each in differences.items()})
    plain, calibrated = errors
    assert all(calibrated[name] < 0.2 * plain[name] for name in plain), (plain, calibrated)


def test_a_quantized_file_tells_what_it_was_calibrated_with(llama2_folder: Path, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", squares(), ["a text"], 3, 512)
    convert.main(llama2_folder, tmp_path / "m.gguf", format="gguf", dtype="q4_0", imatrix=tmp_path / "i.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    found = {key: field.contents() for key, field in fields.items() if key.startswith("quantize.")}
    assert found == {
        "quantize.imatrix.file": str(tmp_path / "i.gguf"),
        "quantize.imatrix.dataset": "a text",
        "quantize.imatrix.entries_count": len(MATRICES),
        "quantize.imatrix.chunks_count": 3,
    }


def without(squares: dict[str, ColumnSquares], name: str) -> dict[str, ColumnSquares]:
    return {each: value for each, value in squares.items() if each != name}


def more_layers() -> dict[str, ColumnSquares]:
    return squares({**MATRICES, "layers.2.attention.wq.weight": (32, 32)})


def wider() -> dict[str, ColumnSquares]:
    return squares({name: (rows, columns + 32) for name, (rows, columns) in MATRICES.items()})


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: without(squares(), "layers.1.attention.wo.weight"), {}, r"nothing of blk\.1\.attn_output\.weight"),
        (more_layers, {}, "of 3 layers or more, the model has 2"),
        (wider, {}, r"64 values of blk\.0\.attn_q\.weight, whose columns are 32: it is of another model"),
        (squares, {"dtype": "float16"}, "nothing to do, as no weight is quantized"),
        (squares, {"dtype": None, "format": "hf"}, "nothing to do, as no weight is quantized"),
        (squares, {"dtype": None, "format": "meta"}, "--format meta has none"),
    ],
    ids=["missing", "layers", "columns", "floats", "hf", "meta"],
)
def test_what_does_not_fit_the_model_is_told_before_weights_are_read(
    make: Callable[[], dict[str, ColumnSquares]],
    options: dict[str, Any],
    words: str,
    llama2_folder: Path,
    tmp_path: Path,
) -> None:
    write_imatrix(tmp_path / "i.gguf", make(), [], 1, 512)
    flags = {"format": "gguf", "dtype": "q4_0", **options}
    path = tmp_path / ("m.gguf" if flags["format"] == "gguf" else "m")
    with pytest.raises(ValueError, match=words):
        convert.main(llama2_folder, path, **flags, imatrix=tmp_path / "i.gguf")
    assert not path.exists()


NAME = "blk.0.attn_q.weight"
ONES = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{NAME}.in_sum2": ONES, f"{NAME}.counts": ONES[:1] * 0}, "counts of blk.0.attn_q.weight are 0"),
        ({f"{NAME}.in_sum2": ONES, f"{NAME}.counts": ONES[:1] * np.nan}, "counts of blk.0.attn_q.weight are nan"),
        ({f"{NAME}.in_sum2": ONES.astype(np.float16), f"{NAME}.counts": ONES[:1]}, "F32"),
        ({f"{NAME}.in_sum2": np.array([1, np.nan], "f"), f"{NAME}.counts": ONES[:1]}, "has nan for column 1"),
        ({f"{NAME}.in_sum2": np.array([1, 2, -3], "f"), f"{NAME}.counts": ONES[:1]}, "has -3 for column 2"),
        ({f"{NAME}.in_sum2": ONES}, "no blk.0.attn_q.weight.counts"),
        ({f"{NAME}.in_sum2": ONES, f"{NAME}.counts": ONES[:3]}, "3 counts of blk.0.attn_q.weight for 1 sums"),
        ({"a": ONES}, "has no matrices"),
    ],
    ids=["zero", "nan-count", "fp16", "nan", "negative", "alone", "counts", "none"],
)
def test_figures_that_no_text_gives_are_refused(tensors: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "i.gguf", tensors)
    with pytest.raises(ValueError, match=words):
        read_imatrix(tmp_path / "i.gguf")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\0\0\0\0", "begins with a count of 0"),
        (struct.pack("<i", -1), "begins with a count of -1"),
        (struct.pack("<ii", 1, 1 << 30), "damaged or cut off"),
        (struct.pack("<ii", 1, -2), "damaged or cut off"),
        (struct.pack("<ii1sii", 1, 1, b"a", 1, 1 << 30), "damaged or cut off"),
        (struct.pack("<ii1siif", 1, 1, b"a", 0, 1, 1.0), "counts of a are 0"),
        (struct.pack("<ii1siif", 1, 1, b"a", 1, 1, float("inf")), "has inf for column 0"),
        (struct.pack("<ii1sii", 1, 1, b"a", 1, 0), "no values"),
        (struct.pack("<ii1siifi1siif", 2, 1, b"a", 1, 1, 1.0, 1, b"a", 1, 1, 1.0), "'a' twice"),
        (b"name,importance\n1,2\n", "is text in place of the file"),
    ],
    ids=["empty", "zero", "negative", "long", "back", "cut", "calls", "inf", "none", "twice", "text"],
)
def test_damaged_files_of_the_older_form_are_told(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_imatrix(tmp_path / "i.dat")


def test_a_model_and_an_importance_matrix_are_not_taken_for_each_other(llama2_folder: Path, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", squares(), [], 1, 512)
    with pytest.raises(ValueError, match="is an importance matrix, no model: llama convert --imatrix takes it"):
        open_checkpoint(tmp_path / "i.gguf")
    convert.main(llama2_folder, tmp_path / "m.gguf", format="gguf", dtype="q8_0")
    with pytest.raises(ValueError, match="of type imatrix, and no adapter: name another"):
        with_adapters(open_checkpoint(llama2_folder), (str(tmp_path / "i.gguf"),))
    with pytest.raises(ValueError, match="of type model, and no imatrix"):
        read_imatrix(tmp_path / "m.gguf")
    with pytest.raises(FileNotFoundError, match="does not exist: llama calibrate makes one"):
        read_imatrix(tmp_path / "missing.gguf")


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"a text", {"window": 1}, "--window must be at least 2, got 1"),
        (b"a text", {"max_tokens": 1}, "--max_tokens must be at least 2, got 1"),
        (b"a text", {"output": Path("imatrix.dat")}, "must end in .gguf"),
        (b"", {}, "is empty"),
    ],
    ids=["window", "max_tokens", "output", "empty"],
)
def test_what_cannot_be_measured_is_told(
    content: bytes, options: dict[str, Any], words: str, llama2_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        calibrate.main(
            BuildOptions(llama2_folder, device="cpu"),
            **{"text": tmp_path / "text", "output": tmp_path / "i.gguf", **options},
        )


def test_an_existing_file_is_not_replaced(llama2_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "i.gguf").write_bytes(b"mine")
    (tmp_path / "text").write_bytes(b"a text")
    with pytest.raises(FileExistsError, match="exists already"):
        calibrate.main(BuildOptions(llama2_folder, device="cpu"), text=tmp_path / "text", output=tmp_path / "i.gguf")
    assert (tmp_path / "i.gguf").read_bytes() == b"mine"


def test_an_output_that_cannot_be_written_is_told_before_measuring(llama2_folder: Path, tmp_path: Path) -> None:
    """The text was read to its end first, which takes an hour of a large model."""
    (tmp_path / "text").write_bytes(b"a text")
    with pytest.raises(NotADirectoryError, match="cannot be made"):  # and not that the model is missing
        calibrate.main(BuildOptions(tmp_path / "no model"), text=tmp_path / "text", output=tmp_path / "text" / "i.gguf")


def test_activations_that_are_not_finite_are_told() -> None:
    measured = squares()
    measured["layers.0.attention.wo.weight"].sums[3] = torch.inf
    with pytest.raises(ValueError, match=r"inputs of blk\.0\.attn_output\.weight are not finite: .*--dtype float32"):
        check_measured(measured)
