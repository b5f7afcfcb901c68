"""Find everything that is wrong with a checkpoint before it is used, not only the first thing; nothing is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoint.base import Checkpoint
from llama.checkpoint.gguf import GGUFCheckpoint, is_gguf, split_files
from llama.checkpoint.gguf_header import read_header
from llama.checkpoint.hf_config import read_block_types
from llama.checkpoint.huggingface import LAYOUTS, map_weights
from llama.checkpoint.load import DERIVED, global_shapes
from llama.checkpoint.open import LATER_SPLIT, open_checkpoint
from llama.checkpoint.torch_pickle import map_pickle
from llama.checkpoint.verify.checksums import Finding, Progress, bytes_listed, verify_lists
from llama.config import read_json_object
from llama.quantization.gguf_blocks import BlockType, dequantize

# What is checked of a folder: weights, configuration and tokenizer.
WEIGHTS = ("consolidated.*.pth", "*.safetensors", "pytorch_model*.bin", "*.gguf")
SMALL = ("*.json", "*.model", "*.jinja")

CHECKED_AT_ONCE = 1 << 22  # values of a tensor
# Pages of a mapped file that were read count as the process's memory until the file is closed.
READ_BEFORE_REOPENING = 1 << 28


def checked_files(path: Path) -> list[Path]:
    """The files of a checkpoint: those of a folder, or a GGUF file and the rest of its split."""
    if path.is_dir():
        return sorted({file for pattern in WEIGHTS + SMALL for file in path.glob(pattern) if file.is_file()})
    try:
        return split_files(path)
    except FileNotFoundError:
        return [path]


def verify(path: Path, deep: bool, progress: Progress) -> Iterator[Finding]:
    """Every check that can be made, in turn; deep also reads every weight. FileNotFoundError when path is nothing."""
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
    """For a progress bar."""
    return bytes_listed(path) + sum(file.stat().st_size for file in _weights(path) if deep)


def _weights(path: Path) -> list[Path]:
    return [file for file in checked_files(path) if any(file.match(pattern) for pattern in WEIGHTS)]


def _verify_files(path: Path) -> Iterator[Finding]:
    """Each file by itself."""
    weights = set(_weights(path))
    for file in checked_files(path):
        what = "weights" if file in weights else "text"
        try:
            problem = _foreign(file)
            if problem is None:
                if file in weights or is_gguf(file):
                    what = f"{len(_names(file))} tensors, header and lengths"
                elif file.suffix == ".json":
                    what = "JSON"
                    read_json_object(file)
        except (ValueError, OSError) as error:
            problem = _said(error, file)
        yield Finding(file.name, file.stat().st_size, what, problem)


def _names(file: Path) -> list[str]:
    """A weights file's own names of its tensors; ValueError when they are not all in it."""
    if file.suffix == ".pth":
        return list(map_pickle(file))
    if file.suffix in (".safetensors", ".bin"):
        return list(map_weights(file))
    return list(read_header(file).tensors)


def _foreign(file: Path) -> str | None:
    """What a file is that is not what its name says."""
    if file.stat().st_size == 0:
        return "empty: download it again"
    with file.open("rb") as stream:
        start = stream.read(256).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself: git lfs pull fetches it"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page saved in place of the file: log in and download it again"
    return None


def _verify_layout(path: Path) -> Iterator[Finding]:
    """Files against each other."""
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
    for _, index in LAYOUTS:
        if (path / index).is_file():
            yield from _verify_index(path / index)


def _verify_shards(files: list[Path]) -> Iterator[Finding]:
    try:
        shards = [{name: tuple(tensor.shape) for name, tensor in map_pickle(file).items()} for file in files]
    except (ValueError, OSError):
        return  # named already
    for file, shard in zip(files[1:], shards[1:], strict=True):
        problems = [f"lacks {name}" for name in shards[0].keys() - shard.keys()]
        problems += [f"has {name}, which {files[0].name} lacks" for name in shard.keys() - shards[0].keys()]
        problems += [
            f"{name} has shape {shape}, in {files[0].name} {shards[0][name]}"
            for name, shape in shard.items()
            if shards[0].get(name, shape) != shape
        ]
        for problem in sorted(problems):
            yield Finding(file.name, file.stat().st_size, "shards belong together", problem)


def _verify_index(index: Path) -> Iterator[Finding]:
    """Whether every tensor of an index is in the file it names, and every tensor in the index."""
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
    """What building a model checks; when not sound, what keeps it from opening is named already."""
    what = "opens as a checkpoint"
    try:
        checkpoint = open_checkpoint(path)
    except (ValueError, OSError) as error:
        if sound:
            yield Finding(path.name, None, what, _said(error, path))
        return
    yield Finding(path.name, None, what)
    vocab_size = checkpoint.args.vocab_size
    try:
        n_words = checkpoint.tokenizer().n_words
        problem = None
        padded = checkpoint.pads_vocab and vocab_size > n_words
        if not padded and vocab_size not in (-1, n_words):
            problem = f"it has {n_words} tokens, the weights have {vocab_size}"
        yield Finding(path.name, None, f"tokenizer of {n_words} tokens", problem)
    except (ValueError, OSError) as error:
        n_words = -1
        yield Finding(path.name, None, "tokenizer", _said(error, path))
    yield from _verify_shapes(checkpoint, vocab_size if vocab_size != -1 else n_words)


def _verify_shapes(checkpoint: Checkpoint, vocab_size: int) -> Iterator[Finding]:
    args = dataclasses.replace(checkpoint.args, vocab_size=vocab_size)
    expected, found = global_shapes(args), set(checkpoint.names()) - DERIVED
    problems: list[str | None] = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not described by it" for name in sorted(found - expected.keys())]
    for name, shape in expected.items():
        # Without a vocabulary's size, that dimension is not known.
        stored = checkpoint.shape(name) if name in found else shape
        if len(stored) != len(shape) or any(a not in (b, -1) for a, b in zip(shape, stored, strict=True)):
            problems.append(f"{name} has shape {stored}, it asks for {shape}")
    what = f"{len(found)} tensors as the configuration asks"
    yield from (Finding(checkpoint.path.name, None, what, problem) for problem in problems or [None])


def _verify_values(file: Path, progress: Progress) -> Iterator[Finding]:
    """NaN and infinite weights, and weights that are only zeros, which a download with holes has."""
    size, count, bad = file.stat().st_size, 0, False
    try:
        for name, share, tensor in _tensors(file):
            problem = _wrong_values(tensor)
            if problem is not None:
                yield Finding(file.name, size, "values", f"{name} has {problem}")
            count, bad = count + 1, bad or problem is not None
            progress(int(size * share))
    except (ValueError, OSError):
        return  # named already
    if count and not bad:
        yield Finding(file.name, size, f"values of {count} tensors")


def _tensors(file: Path) -> Iterator[tuple[str, float, Tensor]]:
    """Tensors by name, and which part of the file's values each has."""
    if file.suffix == ".gguf" and LATER_SPLIT.search(file.name):
        return  # read with the first file
    source, block_types = _open(file), _block_types(file)
    names = list(source.names()) if isinstance(source, GGUFCheckpoint) else list(source)
    sizes = {name: _numel(source, name) for name in names}
    total, read = max(1, sum(sizes.values())), 0
    for name in names:
        if read > READ_BEFORE_REOPENING:
            source, read = _open(file), 0
        tensor = source.read(name) if isinstance(source, GGUFCheckpoint) else source[name]
        read += tensor.nbytes
        if name in block_types and tensor.dtype == torch.uint8:
            tensor = dequantize(tensor, block_types[name])
        yield name, sizes[name] / total, tensor


def _open(file: Path) -> GGUFCheckpoint | dict[str, Tensor]:
    if file.suffix == ".gguf":
        return GGUFCheckpoint(file)
    return map_pickle(file) if file.suffix == ".pth" else map_weights(file)


def _block_types(file: Path) -> dict[str, BlockType]:
    """The types of a safetensors file's tensors that are blocks; GGUF files decode theirs themselves."""
    config = file.parent / "config.json"
    return read_block_types(config) if file.suffix == ".safetensors" and config.is_file() else {}


def _numel(source: GGUFCheckpoint | dict[str, Tensor], name: str) -> int:
    shape = source.shape(name) if isinstance(source, GGUFCheckpoint) else source[name].shape
    return torch.Size(shape).numel()


def _wrong_values(tensor: Tensor) -> str | None:
    nan = infinite = 0
    zero = True
    for part in tensor.reshape(-1).split(CHECKED_AT_ONCE):
        nan += int(torch.isnan(part).sum())
        infinite += int(torch.isinf(part).sum())
        zero = zero and not bool(part.any())
    counts = [f"{n} {what}" for n, what in ((nan, "NaN"), (infinite, "infinite")) if n]
    if counts:
        return f"{' and '.join(counts)} of {tensor.numel()} values"
    return "only zeros" if zero and tensor.dim() > 1 else None


def _said(error: Exception, file: Path) -> str:
    """The error without the path, which the table has."""
    text = " ".join(str(error).split())
    return text.removeprefix(str(file)).lstrip(": ") or type(error).__name__
