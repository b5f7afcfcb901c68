"""Tell by content what a path holds, and open it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from llama.checkpoint.base import StoredCheckpoint
from llama.checkpoint.gguf import GGUFCheckpoint, is_later_split
from llama.checkpoint.gguf_header import is_gguf
from llama.checkpoint.huggingface import HuggingFaceCheckpoint, layouts_of
from llama.checkpoint.lora import AdaptedCheckpoint, Adapter
from llama.checkpoint.meta import MISTRAL_LAYOUTS, MetaCheckpoint
from llama.files import check_content, folder_listing
from llama.hub.find import local_path, meant

log = logging.getLogger("llama")


def open_checkpoint(path: str | os.PathLike[str]) -> StoredCheckpoint:
    """Open a folder of Meta shards, a Hugging Face folder, a GGUF file, a folder with one GGUF model, or one by name.

    Raise OSError or ValueError that say what was looked for and what was found.
    """
    path = Path(os.path.expanduser(local_path(path)))
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        parent = path.parent
        beside = f"{parent} has {folder_listing(parent)}" if parent.is_dir() else f"neither does {parent}"
        raise FileNotFoundError(f"ckpt_dir {path} does not exist; {beside}{meant(path)}")
    if path.is_file():
        check_content(path, is_binary=path.suffix != ".json")
        if is_gguf(path):
            return GGUFCheckpoint(path)
    if path.suffix in (".pth", ".safetensors", ".bin", ".json"):
        raise ValueError(f"ckpt_dir {path} is a single file: give its folder {path.parent}")
    raise ValueError(f"ckpt_dir {path} is neither a folder nor a GGUF file")


def _open_folder(folder: Path) -> StoredCheckpoint:
    shards = any(folder.glob("consolidated.*.pth"))
    mistral = any((folder / name).exists() for layout in MISTRAL_LAYOUTS for name in layout)
    config = (folder / "config.json").is_file()
    hugging_face = config and any((folder / name).exists() for layout in layouts_of(folder) for name in layout)
    if shards and mistral:
        raise ValueError(f"ckpt_dir {folder} has consolidated.*.pth and consolidated.safetensors: remove one of them")
    if hugging_face and (shards or mistral):
        log.info("%s: %s is read", folder, "consolidated.*.pth" if shards else "config.json with its weights")
    if shards or (mistral and not hugging_face):
        checkpoint = MetaCheckpoint(folder)
        adapter = Adapter(folder, 1.0, checkpoint.pairs, {})
        return AdaptedCheckpoint(checkpoint, [adapter], keeps_blocks=True) if checkpoint.pairs else checkpoint
    if hugging_face:
        return HuggingFaceCheckpoint(folder)
    ggufs = sorted(file for file in folder.glob("*.gguf") if not is_later_split(file))
    if len(ggufs) == 1:
        return GGUFCheckpoint(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise ValueError(f"ckpt_dir {folder} has several GGUF files: give one of {names} itself")
    if config:
        return HuggingFaceCheckpoint(folder)  # which says what it looked for
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"ckpt_dir {folder} is a peft adapter: give its base model as --ckpt_dir, and this folder as --lora"
        )
    raise FileNotFoundError(
        f"ckpt_dir {folder} has no checkpoint: looked for consolidated.*.pth with params.json, for config.json "
        f"with safetensors or .bin files, for consolidated.safetensors, and for *.gguf; found {folder_listing(folder)}"
    )
