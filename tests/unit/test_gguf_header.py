"""The header reader finds what the gguf library's own reader finds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType

from llama.checkpoint.gguf_header import is_gguf, read_header

SCALARS: dict[str, tuple[GGUFValueType, list[Any]]] = {
    "uint8": (GGUFValueType.UINT8, [0, 255]),
    "int8": (GGUFValueType.INT8, [-128, 127]),
    "uint16": (GGUFValueType.UINT16, [0, 65535]),
    "int16": (GGUFValueType.INT16, [-32768, 32767]),
    "uint32": (GGUFValueType.UINT32, [0, 2**32 - 1]),
    "int32": (GGUFValueType.INT32, [-(2**31), 2**31 - 1]),
    "float32": (GGUFValueType.FLOAT32, [0.0, -1.5, 1e-05, math.inf]),
    "bool": (GGUFValueType.BOOL, [True, False]),
    "string": (GGUFValueType.STRING, ["", "plain", "日本語 🦙 \x00 \n"]),
    "uint64": (GGUFValueType.UINT64, [0, 2**64 - 1]),
    "int64": (GGUFValueType.INT64, [-(2**63), 2**63 - 1]),
    "float64": (GGUFValueType.FLOAT64, [math.pi, -1e300]),
}


def write(path: Path, alignment: int | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, (kind, values) in SCALARS.items():
        for i, value in enumerate(values):
            writer.add_key_value(f"{name}.{i}", value, kind)
        writer.add_key_value(f"{name}.array", values, GGUFValueType.ARRAY, sub_type=kind)
    rng = np.random.default_rng(0)
    writer.add_tensor("one", rng.standard_normal(7, dtype=np.float32))
    writer.add_tensor("two", rng.standard_normal((3, 5)).astype(np.float16))
    writer.add_tensor("four", rng.standard_normal((2, 3, 4, 5), dtype=np.float32))
    blocks = gguf.quantize(rng.standard_normal((6, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_metadata_and_tensor_places_equal_the_librarys(tmp_path: Path, alignment: int | None) -> None:
    path = write(tmp_path / "model.gguf", alignment)
    header, reader = read_header(path), gguf.GGUFReader(path)
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == expected
    assert {key: type(value) for key, value in header.metadata.items()} == {k: type(v) for k, v in expected.items()}
    assert len(header.tensors) == len(reader.tensors) == 4
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.shape == tuple(int(size) for size in tensor.shape[::-1])
        assert (info.ggml_type, info.offset) == (int(tensor.tensor_type), int(tensor.data_offset))


def test_values_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Both readers could share a mistake."""
    metadata = read_header(write(tmp_path / "model.gguf")).metadata
    for name, (_, values) in SCALARS.items():
        expected = [float(np.float32(value)) for value in values] if name == "float32" else values
        assert [metadata[f"{name}.{i}"] for i in range(len(values))] == expected
        assert metadata[f"{name}.array"] == expected


@pytest.mark.slow
def test_the_demo_models_header_equals_the_librarys(demo_model: Path) -> None:
    header, reader = read_header(demo_model), gguf.GGUFReader(demo_model)
    for key, field in reader.fields.items():
        assert key.startswith("GGUF.") or header.metadata[key] == field.contents(), key
    assert {tensor.name: int(tensor.data_offset) for tensor in reader.tensors} == {
        name: info.offset for name, info in header.tensors.items()
    }


def test_a_gguf_file_is_told_by_its_first_bytes(tmp_path: Path) -> None:
    assert is_gguf(write(tmp_path / "renamed.bin"))
    for content in (b"", b"GGU", b"GGML\x03\x00\x00\x00", b"gguf"):
        (tmp_path / "other.gguf").write_bytes(content)
        assert not is_gguf(tmp_path / "other.gguf")
