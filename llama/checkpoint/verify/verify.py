"""Find everything that is wrong with a checkpoint before it is used, not only the first thing; nothing is loaded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.base import Checkpoint, Progress, read_in_turn
from llama.checkpoint.gguf import GGUFCheckpoint, is_later_split, split_files
from llama.checkpoint.gguf_header import is_gguf, read_header
from llama.checkpoint.hf_config import read_block_types
from llama.checkpoint.huggingface import LAYOUTS
from llama.checkpoint.load import check_vocab_size
from llama.checkpoint.mapped_file import map_weights
from llama.checkpoint.meta import MISTRAL_LAYOUTS, shard_problems
from llama.checkpoint.names import stored_name
from llama.checkpoint.open import open_checkpoint
from llama.checkpoint.release_config import read_release
from llama.checkpoint.shapes import global_shapes
from llama.checkpoint.verify.checksums import Finding, bytes_listed, verify_lists
from llama.config import read_json_object
from llama.files import check_content
from llama.quantization.gguf_blocks import dequantize

# What is checked of a folder: weights, configuration and tokenizer.
WEIGHT_FILES = ("consolidated.*.pth", "*.safetensors", "pytorch_model*.bin", "*.gguf")
OTHER_FILES = {"*.json": "JSON", "*.model": "tokenizer", "*.model.v*": "tokenizer", "*.jinja": "chat template"}

# Zero points that quantized releases of Meta may have, all 0, which is checked where they are opened.
ALL_ZEROS = ".zeros"

CHECKED_AT_ONCE = 1 << 22  # values of a tensor


def checked_files(path: Path) -> list[Path]:
    """Return the files of a checkpoint: those of a folder, or a GGUF file and the rest of its split."""
    if path.is_dir():
        patterns = (*WEIGHT_FILES, *OTHER_FILES)
        return sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
    try:
        return split_files(path)
    except FileNotFoundError:
        return [path]


def verify(path: Path, deep: bool, progress: Progress) -> Iterator[Finding]:
    """Make every check in turn and yield what it finds; deep also reads every weight.

    Raise FileNotFoundError when there is nothing at path.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    sound = True
    for finding in (*_verify_files(path), *_verify_layout(path)):
        sound = sound and finding.problem is None
        yield finding
    yield from verify_lists(path, progress)
    yield from _verify_whole(path, sound)
    if deep:
        for file in _weights(path):
            yield from _verify_values(file, progress)


def bytes_to_read(path: Path, deep: bool) -> int:
    """Return the bytes that `verify` tells its progress in all."""
    return bytes_listed(path) + sum(file.stat().st_size for file in _weights(path) if deep)


def _weights(path: Path) -> list[Path]:
    return [file for file in checked_files(path) if any(file.match(pattern) for pattern in WEIGHT_FILES)]


def _verify_files(path: Path) -> Iterator[Finding]:
    """Check each file by itself."""
    weights = set(_weights(path))
    for file in checked_files(path):
        what = next((what for pattern, what in OTHER_FILES.items() if file.match(pattern)), "weights")
        try:
            check_content(file, is_binary=file in weights)
            problem = None
            if file in weights or is_gguf(file):
                what = f"{len(_names(file))} tensors, header and lengths"
            elif file.suffix == ".json":
                read_json_object(file)
        except (ValueError, OSError) as error:
            problem = _text(error, file)
        yield Finding(file.name, file.stat().st_size, what, problem)


def _names(file: Path) -> list[str]:
    """Return a weights file's own names of its tensors; raise ValueError when they are not all in it."""
    return list(_map(file) if file.suffix in (".pth", ".safetensors", ".bin") else read_header(file).tensors)


def _verify_layout(path: Path) -> Iterator[Finding]:
    """Check files against each other."""
    if not path.is_dir():
        return
    numbers = {int(file.name.split(".")[1]) for file in path.glob("consolidated.[0-9][0-9].pth")}
    missing = sorted(set(range(max(numbers, default=-1) + 1)) - numbers)
    for number in missing:
        yield Finding(f"consolidated.{number:02d}.pth", None, "shards without a gap", "missing")
    if numbers and not missing:
        yield from _verify_shards(sorted(path.glob("consolidated.[0-9][0-9].pth")))
    if numbers and not (path / "params.json").is_file():
        yield Finding("params.json", None, "configuration", "missing")
    for _, index in LAYOUTS + MISTRAL_LAYOUTS:
        if (path / index).is_file():
            yield from _verify_index(path / index)


def _verify_shards(files: list[Path]) -> Iterator[Finding]:
    """Check that all of Meta's shards have the tensors of the first, in its shapes."""
    try:
        shards = [_map(file) for file in files]
    except (ValueError, OSError):
        return  # named already
    for number, problem in shard_problems(shards):
        yield Finding(files[number].name, files[number].stat().st_size, "shards belong together", problem)


def _verify_index(index: Path) -> Iterator[Finding]:
    """Check that every tensor of an index is in the file it names, and every tensor of the files in the index."""
    size = index.stat().st_size
    try:
        weight_map = read_json_object(index).get("weight_map")
    except (ValueError, OSError):
        return  # named already
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        yield Finding(index.name, size, "index", "no weight_map from tensors to files")
        return
    problems: list[str | None] = []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            yield Finding(name, None, f"named by {index.name}", "missing")
            continue
        try:
            found = set(_names(index.parent / name))
        except (ValueError, OSError):
            continue  # named already
        indexed = {tensor for tensor, file in weight_map.items() if file == name}
        problems += [f"{tensor} is not in {name}" for tensor in sorted(indexed - found)]
        problems += [f"{tensor} in {name} is not in the index" for tensor in sorted(found - indexed)]
    what = f"index of {len(weight_map)} tensors"
    yield from (Finding(index.name, size, what, problem) for problem in problems or [None])


def _verify_whole(path: Path, sound: bool) -> Iterator[Finding]:
    """Check what building a model checks. When not sound, what keeps the checkpoint from opening is named already."""
    what = "opens as a checkpoint"
    try:
        checkpoint = open_checkpoint(path)
    except (ValueError, OSError) as error:
        if sound:
            yield Finding(path.name, None, what, _text(error, path))
        return
    yield Finding(path.name, None, what)
    vocab_size = checkpoint.args.vocab_size
    what = "tokenizer"
    try:
        tokenizer = checkpoint.tokenizer()
        what = f"tokenizer of {tokenizer.n_words} tokens"
        vocab_size = check_vocab_size(checkpoint, tokenizer)
        yield Finding(path.name, None, what)
    except (ValueError, OSError) as error:
        yield Finding(path.name, None, what, _text(error, path))
    yield from _verify_shapes(checkpoint, vocab_size)


def _verify_shapes(checkpoint: Checkpoint, vocab_size: int) -> Iterator[Finding]:
    """Check all tensors against the configuration; a vocab_size of -1 is not known and fits any number of rows."""
    args = dataclasses.replace(checkpoint.args, vocab_size=vocab_size)
    expected, found = global_shapes(args), set(checkpoint.names())
    own_names = {name: stored_name(name, checkpoint.naming) for name in found | expected.keys()}
    problems: list[str | None] = [f"{own_names[name]} is missing" for name in expected if name not in found]
    problems += [f"{own_names[name]} is not described by it" for name in sorted(found - expected.keys())]
    for name, shape in expected.items():
        stored = checkpoint.shape(name) if name in found else shape
        if len(stored) != len(shape) or any(a not in (b, -1) for a, b in zip(shape, stored, strict=True)):
            problems.append(f"{own_names[name]} has shape {stored}, it asks for {shape}")
    what = f"{len(found)} tensors as the configuration asks"
    yield from (Finding(checkpoint.path.name, None, what, problem) for problem in problems or [None])


def _verify_values(file: Path, progress: Progress) -> Iterator[Finding]:
    """Find NaN and infinite weights, and weights that are only zeros, which a download with holes has."""
    size, count, bad = file.stat().st_size, 0, False
    try:
        for name, share, tensor in _tensors(file):
            problem = None if name.endswith(ALL_ZEROS) else _wrong_values(tensor)
            if problem is not None:
                yield Finding(file.name, size, "values", f"{name} has {problem}")
            count, bad = count + 1, bad or problem is not None
            progress(int(size * share))
    except (ValueError, OSError):
        return  # named already
    if count and not bad:
        yield Finding(file.name, size, f"values of {count} tensors")


def _tensors(file: Path) -> Iterator[tuple[str, float, Tensor]]:
    """Yield a file's tensors with their names, and which share of all its values each has."""
    if file.suffix == ".gguf":
        if is_later_split(file):
            return  # read with the first file
        checkpoint = GGUFCheckpoint(file)
        sizes = {name: torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names()}
    else:
        sizes = {name: tensor.numel() for name, tensor in _map(file).items()}

    def reopen() -> Callable[[str], Tensor]:
        return GGUFCheckpoint(file).read if file.suffix == ".gguf" else _map(file).__getitem__

    config = file.parent / "config.json"
    block_types = read_block_types(config) if file.suffix == ".safetensors" and config.is_file() else {}
    total = max(1, sum(sizes.values()))
    for name, tensor in read_in_turn(sizes, reopen):
        in_blocks = name in block_types and tensor.dtype == torch.uint8
        yield name, sizes[name] / total, dequantize(tensor, block_types[name]) if in_blocks else tensor


def _map(file: Path) -> dict[str, Tensor]:
    """Map the tensors of a file; those of a quantized release are of any dtype."""
    config = file.parent / "config.json"
    return map_weights(file, any_dtype=config.is_file() and read_release(file.parent) is not None)


def _wrong_values(tensor: Tensor) -> str | None:
    """Return how many of a tensor's values are NaN or infinite, or that a matrix of floats has only zeros.

    Codes may be all zeros, but never NaN.
    """
    if not tensor.is_floating_point():
        return None
    nan = infinite = 0
    zero = True
    for part in tensor.reshape(-1).split(CHECKED_AT_ONCE):
        values = part.float() if part.itemsize == 1 else part  # torch knows no infinity of 8-bit floats
        nan += int(torch.isnan(values).sum())
        infinite += int(torch.isinf(values).sum())
        zero = zero and not bool(values.any())
    counts = [f"{n} {what}" for n, what in ((nan, "NaN"), (infinite, "infinite")) if n]
    if counts:
        return f"{' and '.join(counts)} of {tensor.numel()} values"
    return "only zeros" if zero and tensor.dim() > 1 else None


def _text(error: Exception, file: Path) -> str:
    """Return the error in one line without the path, which the table has; what lies in a folder is named by itself."""
    text = " ".join(str(error).split()).replace(f"{file}{os.sep}", "")
    return text.removeprefix(str(file)).lstrip(": ") or type(error).__name__
