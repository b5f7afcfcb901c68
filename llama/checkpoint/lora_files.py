"""Read low-rank adapters, PEFT's folders and llama.cpp's GGUF files, and check that they fit a checkpoint.

PEFT: adapter_config.json with adapter_model.safetensors or .bin, as huggingface/peft 0.18 writes them. GGUF: what
llama.cpp's convert_lora_to_gguf.py writes.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from llama.checkpoint.base import StoredCheckpoint, some_of
from llama.checkpoint.family import RowOrder
from llama.checkpoint.gguf_config import ALL_ROPE_FACTORS
from llama.checkpoint.gguf_header import is_gguf, read_header
from llama.checkpoint.gguf_tensors import decode_rows, map_tensors
from llama.checkpoint.lora import OUTPUT, TABLE, AdaptedCheckpoint, Adapter, LowRankPair
from llama.checkpoint.mapped_file import Layouts, map_folder
from llama.checkpoint.names import ROTATED, meta_name, module_name, with_parts
from llama.checkpoint.shapes import global_shapes
from llama.checkpoint.tensors import FUSED, GATE_IN_UP, norm_offset, pair_neighbours, parts_of_fused
from llama.config import ModelArgs, read_json_object

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_LAYOUTS: Layouts = (
    ("adapter_model.safetensors", "adapter_model.safetensors.index.json"),
    ("adapter_model.bin", "adapter_model.bin.index.json"),
)
MERGE = "merge it by peft's merge_and_unload() and save the whole model"

# Keys of adapter_config.json that change the computation in ways that are not built, where they say anything.
UNSUPPORTED = (
    *("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "target_parameters", "layer_replication"),
    *("trainable_token_indices", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)
# Ways to begin a training that leave the base model as it was; others (pissa, olora, loftq) change its weights, too.
HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")

# A tensor of PEFT's: which of the two it is of which module, or all of a tensor (`modules_to_save`, biases).
PEFT_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\.(?:(?P<part>lora_(?:embedding_)?[AB])(?:\.default)?(?:\.weight)?"
    r"|(?P<base>base_layer\.)?(?:modules_to_save\.(?:default\.)?)?(?P<whole>weight|bias))"
)
GGUF_NAME = re.compile(r"(?P<tensor>.+)\.lora_(?P<part>[ab])")


def with_adapters(checkpoint: StoredCheckpoint, lora: Sequence[str], requantizes: bool = False) -> StoredCheckpoint:
    """Return a checkpoint with its adapters; itself where there are none.

    lora: what `adapter_scale` reads. requantizes: merge adapters into quantized blocks, too, which then are floats.
    Raise ValueError or FileNotFoundError that says what is wrong with an adapter, or why it does not fit.
    """
    adapters: list[Adapter] = []
    if isinstance(checkpoint, AdaptedCheckpoint):  # whose files hold an adapter of their own
        adapters, checkpoint = list(checkpoint.adapters), checkpoint.base
    if not lora and not adapters:
        return checkpoint
    for text in lora:
        path, scale = adapter_scale(text)
        if any(path.samefile(each.path) for each in adapters):
            raise ValueError(f"lora {path} is given twice: give it once, with the sum of its scales")
        adapter = _read_gguf(path, scale, checkpoint) if path.is_file() else _read_peft(path, scale, checkpoint)
        for other in adapters:
            if both := adapter.replaced.keys() & other.replaced.keys():
                raise ValueError(f"lora {path} and {other.path} both replace {some_of(sorted(both))}: give one of them")
        adapters.append(adapter)
    return AdaptedCheckpoint(checkpoint, adapters, keeps_blocks=not requantizes)


def adapter_scale(text: str) -> tuple[Path, float]:
    """Return the path and the scale, by default 1, of an adapter that a user names: PATH or PATH:SCALE.

    Raise FileNotFoundError where there is nothing, ValueError where the scale is no number.
    """
    whole = Path(os.path.expanduser(text))
    if whole.exists() or ":" not in text:
        path, scale = whole, 1.0
    else:
        said, _, number = text.rpartition(":")
        path = Path(os.path.expanduser(said))
        try:
            scale = float(number)
        except ValueError:
            scale = math.nan
        if path.exists() and not math.isfinite(scale):
            raise ValueError(f"lora {path} must be followed by a number, as in {said}:0.5, got {number!r}")
    if not text or not path.exists():
        raise FileNotFoundError(
            f"lora {str(path) if text else repr(text)} does not exist: give an adapter's folder or file"
        )
    return path, scale


def _read_peft(folder: Path, scale: float, checkpoint: StoredCheckpoint) -> Adapter:
    config = _peft_config(folder)
    base = config.get("base_model_name_or_path") or None
    halves: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    family = checkpoint.family
    fits = _Fit(folder, checkpoint, f", it was trained on {base}" if base else "")
    for name, tensor in map_folder(folder, ADAPTER_LAYOUTS).items():
        found = PEFT_NAME.fullmatch(name)
        if found is None or not tensor.is_floating_point():
            raise ValueError(f"lora {folder}: {name} is no tensor of an adapter that is known: {MERGE}")
        module, part = found["module"], found["part"]
        if part is None:
            whole = meta_name(with_parts(f"{module}.{found['whole']}", family.hf_names), "hf")
            fits.check(whole, module, tuple(tensor.shape), is_whole=True)
            if not (found["base"] and found["whole"] == "weight"):  # a table that PEFT saves as it was
                offset = norm_offset(whole, family)
                tensor = tensor.float() + offset if offset else tensor
                replaced[whole] = _in_metas_order(whole, tensor, checkpoint.args, family.hf_rows)
            continue
        is_embedding = "embedding" in part  # whose A is of tokens, as its weight is A's transposed by B's
        kind = "a" if part.endswith("B" if is_embedding else "A") else "b"
        halves.setdefault(module, {})[kind] = tensor.t() if is_embedding else tensor
    pairs: dict[str, LowRankPair] = {}
    for module, found_halves in halves.items():
        a, b = fits.both(module, found_halves)
        rank = len(a)
        try:
            alpha = _of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        except re.error as error:
            raise ValueError(f"lora {folder}: alpha_pattern is no regular expression: {error}") from None
        if type(alpha) not in (int, float):
            raise ValueError(f"lora {folder}: {ADAPTER_CONFIG} must have numbers for lora_alpha, got {alpha!r}")
        factor = scale * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        for target, rows in _unfused(module, b, parts_of_fused(module, FUSED["hf"], checkpoint.args, "hf")):
            name = meta_name(with_parts(f"{target}.weight", family.hf_names), "hf")
            fits.check(name, target, (len(rows), a.shape[1]))
            pairs[name] = LowRankPair(a, _in_metas_order(name, rows, checkpoint.args, family.hf_rows), factor)
    fits.changes_something(pairs or replaced)
    is_other = Path(str(base)).name not in (checkpoint.path.name, Path(checkpoint.model_name).name)
    return Adapter(folder, scale, pairs, replaced, str(base) if base and is_other else "")


def _peft_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json; raise an error for what is no LoRA, or one of a kind that is not built."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        names = sorted(path.name for path in folder.iterdir())
        is_model = (folder / "config.json").is_file() or (folder / "params.json").is_file()
        fix = "; it looks like a whole model: give that as --ckpt_dir" if is_model else ""
        raise FileNotFoundError(
            f"lora {folder} is no adapter: looked for {ADAPTER_CONFIG} with {ADAPTER_LAYOUTS[0][0]} or "
            f"{ADAPTER_LAYOUTS[1][0]}, found {some_of(names, 8) or 'nothing'}{fix}"
        )
    config = read_json_object(file)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"lora {folder}: peft_type {kind!r} is not supported, only LORA is: {MERGE}")
    for key in UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"lora {folder}: {key} {config[key]!r} is not supported: {MERGE}")
    init = config.get("init_lora_weights")
    if init not in HARMLESS_INITS:
        raise ValueError(f"lora {folder}: init_lora_weights {init!r} has changed the base model, too: {MERGE}")
    return config


def _read_gguf(file: Path, scale: float, checkpoint: StoredCheckpoint) -> Adapter:
    if not is_gguf(file):
        raise ValueError(f"lora {file} is neither a folder of peft's nor a GGUF file: give the folder {file.parent}")
    header = read_header(file)
    metadata = header.metadata
    kind = metadata.get("general.type", "model")
    if kind not in ("adapter", "model"):
        raise ValueError(f"lora {file} is a GGUF file of type {kind}, and no adapter: name another")
    if kind != "adapter":
        raise ValueError(f"lora {file} is no adapter but a whole model: give it as --ckpt_dir")
    if metadata.get("adapter.type") != "lora":
        raise ValueError(f"lora {file}: adapter.type {metadata.get('adapter.type')!r} is not supported, only 'lora' is")
    family, architecture = checkpoint.family, metadata.get("general.architecture")
    if architecture != (family.gguf or "llama"):
        raise ValueError(
            f"lora {file} is for another model: its general.architecture is {architecture!r}, that of "
            f"{checkpoint.path} is {family.gguf or 'llama'!r}"
        )
    if metadata.get("adapter.alora.invocation_tokens"):
        raise ValueError(f"lora {file}: adapters that begin at a token (adapter.alora) are not supported")
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if type(alpha) is not float:
        raise ValueError(f"lora {file}: adapter.lora.alpha must be a number, got {alpha!r}")
    halves: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    fits = _Fit(file, checkpoint, "")
    tensors = {name: stored for name, stored in map_tensors(file, header).items() if name not in ALL_ROPE_FACTORS}
    for name, stored in tensors.items():
        tensor = decode_rows(stored, 0, stored.shape[0])
        found = GGUF_NAME.fullmatch(name)
        if found is None:
            whole = meta_name(with_parts(name, family.gguf_names), "gguf")
            fits.check(whole, name, tuple(tensor.shape), is_whole=True)
            replaced[whole] = _in_metas_order(whole, tensor, checkpoint.args, family.gguf_rows)
        elif meta_name(found["tensor"], "gguf") == TABLE:  # as they are looked up: A has a row a token
            halves.setdefault(found["tensor"], {})["b" if found["part"] == "a" else "a"] = (
                tensor if found["part"] == "a" else tensor.t()
            )
        else:
            halves.setdefault(found["tensor"], {})[found["part"]] = tensor
    fused = FUSED["gguf"] | (GATE_IN_UP if family.gguf_gate_in_up else {})
    pairs: dict[str, LowRankPair] = {}
    for tensor_name, found_halves in halves.items():
        a, b = fits.both(tensor_name, found_halves)
        module = tensor_name.removesuffix(".weight")
        for target, rows in _unfused(module, b, parts_of_fused(module, fused, checkpoint.args, "gguf")):
            name = meta_name(with_parts(f"{target}.weight", family.gguf_names), "gguf")
            fits.check(name, tensor_name, (len(rows), a.shape[1]))
            rows = _in_metas_order(name, rows, checkpoint.args, family.gguf_rows)
            pairs[name] = LowRankPair(a, rows, scale * (alpha / len(a) if alpha else 1.0))  # as llama.cpp reads 0
    fits.changes_something(pairs or replaced)
    return Adapter(file, scale, pairs, replaced)


class _Fit:
    """Raise ValueError where an adapter is damaged, or does not fit a checkpoint."""

    def __init__(self, path: Path, checkpoint: StoredCheckpoint, trained_on: str) -> None:
        """Name the adapter by its path; trained_on: a part of a sentence that names its base model, or nothing."""
        self.path, self.checkpoint, self.trained_on = path, checkpoint, trained_on
        self.names = global_shapes(dataclasses.replace(checkpoint.args, vocab_size=1, tied_embeddings=False)).keys()

    def both(self, module: str, halves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return a (r, in) and b (out, r) of a module."""
        if len(halves) < 2:
            raise ValueError(f"lora {self.path} has one of the two matrices of {module} alone: download it again")
        a, b = halves["a"], halves["b"]
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or not len(a):
            shapes = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
            raise ValueError(f"lora {self.path}: the matrices of {module}, {shapes}, do not belong together")
        return a, b

    def check(self, name: str, said: str, shape: tuple[int, ...], is_whole: bool = False) -> None:
        """Compare what an adapter is for with the model. name: Meta's; said: the module's in the adapter."""
        if name not in self.names:
            raise ValueError(
                f"lora {self.path} is for another model{self.trained_on}: it has {said}, which "
                f"{self.checkpoint.path} lacks"
            )
        source = TABLE if name == OUTPUT and self.checkpoint.args.tied_embeddings else name
        if module_name(source) in self.checkpoint.factors:
            raise ValueError(
                f"lora {self.path} changes {said}, which is scaled as {self.checkpoint.path} is loaded: this is not "
                f"supported: {MERGE}"
            )
        # What the checkpoint itself lacks is told elsewhere.
        own = self.checkpoint.shape(source) if source in self.checkpoint.names() else shape
        if shape == own:
            return
        if is_whole and len(shape) == 2 and shape[1:] == own[1:]:
            raise ValueError(
                f"lora {self.path} replaces {said} by one of {shape[0]} rows, {self.checkpoint.path} has {own[0]}: "
                f"adapters that add tokens are not supported: {MERGE}"
            )
        raise ValueError(
            f"lora {self.path} is for another model{self.trained_on}: its {said} has shape {shape}, that of "
            f"{self.checkpoint.path} {own}"
        )

    def changes_something(self, changed: Collection[str]) -> None:
        if not changed:
            raise ValueError(f"lora {self.path} has no tensors of an adapter")


def _unfused(module: str, b: Tensor, parts: Sequence[tuple[str, int]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the modules that a fused one stands for, by names and rows of B; or itself, if it has no such parts."""
    sizes = [rows for _, rows in parts]
    if parts and sum(sizes) == len(b):
        yield from zip((name for name, _ in parts), b.split(sizes), strict=True)
    else:
        yield module, b


def _in_metas_order(name: str, rows: Tensor, args: ModelArgs, order: RowOrder) -> Tensor:
    """Return what an adapter has for a tensor's rows, in the order of its format, in Meta's order."""
    is_reordered = order == "halves" and module_name(name) in ROTATED
    return pair_neighbours(rows, args.head_dim, args.rotary_dim) if is_reordered else rows


def _of_pattern(pattern: object, module: str, default: Any) -> Any:
    """Return the value of the first key, a regular expression, that ends a module's name, as PEFT compares them."""
    if isinstance(pattern, dict):
        for key, value in pattern.items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
    return default
