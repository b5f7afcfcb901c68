"""Damage that knows a format: counts, offsets, names, shapes and types that are wrong in a file that can be parsed."""

from __future__ import annotations

import io
import json
import struct
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.damage import INTEGERS, STRINGS, damage_bytes, damage_json, damage_value, dump
from tests.fuzz.templates import damage_template
from tests.fuzz.tokenizer_files import damage_sentencepiece, damage_tiktoken, damage_tokenizer_json

GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
ALIGNMENT = 32

# What lies under a file's name where a download went wrong.
OTHER_FILES = (
    b"",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789\nsize 134\n",
    b"<!DOCTYPE html><html><body>404: Not found</body></html>\n",
    b'{"error": "Repository is gated"}',
    b"\0" * 4096,
    b"GGUF\x03\0\0\0",
    b"PK\x05\x06" + b"\0" * 18,
    b"\x80\x02}q\0.",
)


@dataclass
class GGUFParts:
    """The parts of a GGUF file, each with its bytes as they are to be written."""

    head: bytes  # magic and version
    values: list[tuple[bytes, int, bytes]]  # key, type code, value
    tensors: list[tuple[bytes, list[int], int, int]]  # name, dimensions, type code, offset
    data: bytes

    def write(self, extra_tensors: int = 0, extra_values: int = 0) -> bytes:
        """Return the file; extra: what its counts are wrong by."""
        counts = struct.pack("<qq", len(self.tensors) + extra_tensors, len(self.values) + extra_values)
        body = self.head + counts
        for key, code, value in self.values:
            body += _text(key) + struct.pack("<I", code) + value
        for name, dims, code, offset in self.tensors:
            numbers = [*dims, offset]
            packed = [struct.pack("<Q", number % 2**64) for number in numbers]
            body += _text(name) + struct.pack("<I", len(dims)) + b"".join(packed[:-1])
            body += struct.pack("<I", code % 2**32) + packed[-1]
        return body + bytes(-len(body) % ALIGNMENT) + self.data


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def parse_gguf(data: bytes) -> GGUFParts:
    """Take a whole file apart."""
    at = 24
    n_tensors, n_values = struct.unpack_from("<QQ", data, 8)

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    def number(code: str) -> int:
        return struct.unpack("<" + code, take(struct.calcsize("<" + code)))[0]

    def skip(code: int) -> None:
        if code == 8:
            take(number("Q"))
        elif code == 9:
            item, length = number("I"), number("Q")
            for _ in range(length):
                skip(item)
        else:
            take(struct.calcsize("<" + GGUF_NUMBERS[code]))

    values = []
    for _ in range(n_values):
        key, code, start = take(number("Q")), number("I"), at
        skip(code)
        values.append((key, code, data[start:at]))
    tensors = []
    for _ in range(n_tensors):
        name = take(number("Q"))
        dims = [number("Q") for _ in range(number("I"))]
        tensors.append((name, dims, number("I"), number("Q")))
    at += -at % ALIGNMENT
    return GGUFParts(data[:8], values, tensors, data[at:])


def damage_gguf(rng: Random, data: bytes) -> bytes:
    """Change a few entries of a GGUF file."""
    if rng.random() < 0.25:
        return damage_bytes(rng, data)
    parts, counts = parse_gguf(data), [0, 0]
    for _ in range(rng.choice((1, 1, 1, 2))):
        kind = rng.randrange(12)
        if kind == 0:
            counts[rng.randrange(2)] = rng.choice((1, -1, 2**40))
        elif kind == 1:
            parts.data = (
                damage_bytes(rng, parts.data) if rng.random() < 0.7 else parts.data[: rng.randrange(len(parts.data))]
            )
        elif kind == 2:
            key, code, value = rng.choice(
                (("general.alignment", 4, 64), ("split.count", 2, 2), ("split.no", 2, 1), ("llama.zzz", 4, 1))
            )
            key = key.replace("llama.", _prefix(parts))
            parts.values.append((key.encode(), code, struct.pack("<" + GGUF_NUMBERS[code], value)))
        elif kind <= 7:
            _damage_gguf_value(rng, parts.values)
        else:
            _damage_gguf_tensor(rng, parts.tensors)
    return parts.write(*counts)


def _prefix(parts: GGUFParts) -> str:
    """Return how the architecture's own keys begin."""
    text = next((value for key, _, value in parts.values if key == b"general.architecture"), b"")
    return text[8:].decode(errors="replace") + "."


def _damage_gguf_value(rng: Random, values: list[tuple[bytes, int, bytes]]) -> None:
    i = rng.randrange(len(values))
    (key, code, value), kind = values[i], rng.randrange(8)
    if kind == 0:
        del values[i]
    elif kind == 1:
        values.insert(rng.randrange(len(values) + 1), values[i])
    elif kind == 2:
        values[i] = rng.choice((key + b"x", key[:-1], key.upper(), b"", b"\xff")), code, value
    elif kind == 3 and code == 9:
        item, length = struct.unpack_from("<IQ", value)
        changed = rng.choice(
            ((item, length + 1), (item, length - 1), (item, 0), (9, length), (rng.randrange(13), length), (item, 2**61))
        )
        values[i] = key, code, struct.pack("<IQ", *changed) + value[12:]
    elif kind == 4 and code == 9:
        values[i] = key, code, value[:12] + damage_bytes(rng, value[12:])
    elif kind == 5:
        j = rng.randrange(len(values))
        values[i], values[j] = (key, *values[j][1:]), (values[j][0], code, value)
    else:
        new = rng.choice((*GGUF_NUMBERS, 8))
        if new == 8:
            text = rng.choice(STRINGS[:5] + ["gpt2", "llama", "yarn", "linear", "none", "mamba"])
            values[i] = key, new, _text(text.encode())
        elif GGUF_NUMBERS[new] in "fd":
            values[i] = (
                key,
                new,
                struct.pack(
                    "<" + GGUF_NUMBERS[new], rng.choice((0.0, -1.0, 0.5, 2.0, 1e30, float("nan"), float("inf")))
                ),
            )
        else:
            size = struct.calcsize("<" + GGUF_NUMBERS[new])
            old = int.from_bytes(value[:size], "little")
            number = rng.choice((rng.choice(INTEGERS), old + 1, old - 1, 2 * old, old // 2)) % 256**size
            values[i] = key, new, number.to_bytes(size, "little")


def _damage_gguf_tensor(rng: Random, tensors: list[tuple[bytes, list[int], int, int]]) -> None:
    i = rng.randrange(len(tensors))
    (name, dims, code, offset), kind = tensors[i], rng.randrange(8)
    dims, k = list(dims), rng.randrange(len(dims))
    if kind == 0:
        del tensors[i]
    elif kind == 1:
        tensors.insert(rng.randrange(len(tensors) + 1), tensors[i])
    elif kind == 2:
        new = rng.choice(
            (name + b"x", name.replace(b"blk.1", b"blk.2"), name.replace(b".weight", b".bias"), b"", tensors[0][0])
        )
        tensors[i] = new, dims, code, offset
    elif kind == 3:
        dims[k] = rng.choice((dims[k] + 1, dims[k] - 1, 2 * dims[k], dims[k] // 2, 0, rng.choice(INTEGERS)))
        tensors[i] = name, dims, code, offset
    elif kind == 4:
        dims = rng.choice((dims[::-1], [*dims, 1], [1, *dims], dims[:-1], [], [*dims, 1, 1, 1]))
        tensors[i] = name, dims, code, offset
    elif kind == 5:
        tensors[i] = name, dims, rng.choice((*range(45), 2**31)), offset
    elif kind == 6:
        tensors[i] = (
            name,
            dims,
            code,
            rng.choice((offset + 1, offset - 1, offset + 32, offset - 32, 0, 2**40, 2**64 - 32)),
        )
    else:
        j = rng.randrange(len(tensors))
        tensors[i], tensors[j] = (name, dims, code, tensors[j][3]), (*tensors[j][:3], offset)


def damage_safetensors(rng: Random, data: bytes) -> bytes:
    """Change the header, its length, or the bytes of the tensors."""
    size = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(8)
    if kind == 0:
        return damage_bytes(rng, data)
    if kind == 1:
        wrong = rng.choice((size + 1, size - 1, size + 8, 0, 2**31, 2**63, len(data), len(data) - 8))
        return wrong.to_bytes(8, "little") + data[8:]
    if kind == 2:
        return data[: 8 + size] + rng.choice(
            (tensors[: rng.randrange(len(tensors))], tensors + b"\0" * 8, damage_bytes(rng, tensors))
        )
    content = json.loads(header)
    name, other = (rng.choice([key for key in content if key != "__metadata__"]) for _ in range(2))
    entry = dict(content[name])
    if kind == 3:
        entry["shape"] = rng.choice(
            (entry["shape"][::-1], [*entry["shape"], 1], entry["shape"][:-1], [2**40, 2**40], [0])
        )
    elif kind == 4:
        entry["dtype"] = rng.choice(("F16", "BF16", "I32", "U8", "F64", "F8_E4M3", "BOOL", "x"))
    elif kind == 5:
        start, stop = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            ([start + 1, stop + 1], [start, stop - 4], [stop, start], content[other]["data_offsets"])
        )
    elif kind == 6:
        content = damage_value(rng, content)
        header = dump(content)
        return len(header).to_bytes(8, "little") + header + tensors
    else:
        content.pop(name)
        name = rng.choice((name + "x", name.replace("layers.1", "layers.2"), "module." + name, name[6:]))
    header = dump(content | {name: entry})
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + tensors


def damage_pickle(rng: Random, data: bytes) -> bytes:
    """Change tensors of a state dict, and the bytes of the file that holds it."""
    if rng.random() < 0.6:
        return damage_bytes(rng, data)
    state: dict[Any, Any] = dict(torch.load(io.BytesIO(data)))
    name = rng.choice(list(state))
    tensor, kind = state[name], rng.randrange(5)
    if kind == 0:
        del state[name]
    elif kind == 1:
        new = rng.choice(
            (
                name + "x",
                "module." + name,
                name.replace(".1.", ".2."),
                0,
                None,
                ("a", name),
                name.encode(),
                "\x1b[31m\n",
            )
        )
        state[new] = state.pop(name)
    elif kind == 2:
        state[name] = rng.choice(
            (None, [1.0], "x", {"a": tensor}, 5, state, _parameter(tensor), tensor.float().numpy(), b"x")
        )
    else:
        state[name] = _odd_tensor(rng, tensor)
    file = io.BytesIO()
    torch.save(
        rng.choice((state, state, state, state, {"model": state}, [state], tensor, None)),
        file,
        _use_new_zipfile_serialization=data[:2] == b"PK",
    )
    return file.getvalue()


def _parameter(tensor: Tensor) -> Tensor:
    return torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


def _odd_tensor(rng: Random, tensor: Tensor) -> Tensor:
    """Return a tensor of another shape, dtype or kind than a weight has."""
    kind = rng.randrange(9)
    if kind == 0:
        return tensor.new_zeros(1).expand(rng.choice(([2**40], [2**30, 2**30], list(tensor.shape))))
    if kind == 1:
        return tensor.to(
            rng.choice((torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.bfloat16))
        )
    if kind == 2:
        return rng.choice(
            (
                tensor.flatten(),
                tensor[:-1],
                tensor[..., :-1],
                tensor[None],
                tensor.sum(),
                tensor[:0],
                tensor.new_empty(0, 2**40),
            )
        )
    if kind == 3:
        return tensor.to_sparse()
    if kind == 4:
        return tensor.to("meta")
    if kind == 5:
        value = rng.choice((float("nan"), float("inf"), 1e38))
        return torch.full_like(tensor, value if tensor.is_floating_point() else 127)
    if kind == 6:
        return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)
    if kind == 7:
        return torch.nested.nested_tensor([tensor, tensor[:1]])
    return tensor.mT if tensor.dim() > 1 else tensor.conj()


def damage_file(rng: Random, name: str, data: bytes) -> bytes:
    """Damage a file as befits its name and content; now and then put another in its place."""
    if rng.random() < 0.02:
        return rng.choice(OTHER_FILES)
    if name == "tokenizer.json":
        return damage_tokenizer_json(rng, data)
    if name.endswith(".json"):
        return damage_json(rng, data)
    if name.endswith(".jinja"):
        return damage_template(rng, data)
    if name.endswith(".gguf"):
        return damage_gguf(rng, data)
    if name.endswith(".safetensors"):
        return damage_safetensors(rng, data)
    if name.endswith((".pth", ".bin")):
        return damage_pickle(rng, data)
    return damage_sentencepiece(rng, data) if data.startswith(b"\n") else damage_tiktoken(rng, data)
