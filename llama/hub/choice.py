"""Which files of a repository a model is made of: decided by their names alone, before anything is downloaded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from llama.files import GGUF_SPLIT, listed
from llama.hub.names import ModelName

# What is taken where weights of Hugging Face's layout or of Meta's are, as far as it is there.
NEEDED_OF_TOKENIZERS = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|tokenizer\.model(\.v\d+)?|"
    r"tekken\.json|chat_template\.(jinja|json)|config\.json"
)
NEEDED_BESIDE = re.compile(
    r"generation_config\.json|params\.json|checklist\.chk|(quantize|quantization|quant|hf_quant)_config\.json"
)
# The preferred first: weights twice in one repository are downloaded once. Each is whole files, or parts and an index.
WEIGHT_LAYOUTS = (
    ("model.safetensors", re.compile(r"model-\d+-of-\d+\.safetensors|model\.safetensors\.index\.json")),
    ("pytorch_model.bin", re.compile(r"pytorch_model-\d+-of-\d+\.bin|pytorch_model\.bin\.index\.json")),
    (
        "consolidated.safetensors",
        re.compile(r"consolidated-\d+-of-\d+\.safetensors|consolidated\.safetensors\.index\.json"),
    ),
    ("consolidated.pth", re.compile(r"consolidated\.\d+\.pth")),
)
INDEX = ".index.json"
PREFERRED_TYPE = "Q4_K_M"
# At the end of a GGUF file's name, behind what may be the maker's mark for a dynamic quantization.
TYPE = re.compile(r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|T?BF16|FP?16|FP?32|MXFP4\w*|TQ\d_\d))$", re.IGNORECASE)
NO_MODELS = re.compile(r"mmproj|imatrix", re.IGNORECASE)


@dataclass(frozen=True)
class Choice:
    """The files to have, as the repository names them, and which of them to open: "" is its top folder."""

    files: tuple[str, ...]
    opened: str


def choose(name: ModelName, files: Collection[str]) -> Choice:
    """Return the files of a repository that a name asks for; ValueError says what there is instead.

    Where no type is named and there are GGUF files alone, Q4_K_M is taken, or else the first, as llama.cpp does.
    """
    part = name.part
    if part in files:
        if not part.endswith(".gguf"):
            raise ValueError(f"{name} is one file of a model: give {name.repo}, or one of its GGUF files or folders")
        return _of_gguf(part, files)
    folder = f"{part}/" if part else ""
    inside = {file.removeprefix(folder) for file in files if file.startswith(folder)}
    if not inside:
        raise ValueError(f"{name.repo} has no {part}: it has {listed(_tops(files))}")
    layout = [] if name.type else _layout(inside)
    if layout:
        beside = (file for file in inside if NEEDED_OF_TOKENIZERS.fullmatch(file) or NEEDED_BESIDE.fullmatch(file))
        return Choice(tuple(sorted(folder + file for file in {*layout, *beside})), part)
    ggufs = sorted(file for file in inside if is_model_file(file) and _split_number(file) == 1)
    if not ggufs:
        raise ValueError(_nothing(name, inside))
    of_type = _of_type(ggufs, name.type or PREFERRED_TYPE)
    if not of_type and name.type:
        types = sorted({gguf_type(file) for file in ggufs})
        close = difflib.get_close_matches(name.type.upper(), types, 1)
        meant = f"did you mean :{close[0]}? It" if close else "it"
        raise ValueError(f"{name.repo} has no GGUF file of type {name.type}: {meant} has {listed(types, 40)}")
    return _of_gguf(folder + (of_type or ggufs)[0], files)


def choose_tokenizer(name: ModelName, files: Collection[str]) -> Choice:
    """Return the files of a repository's tokenizer, whose folder is opened, or one file if the name's part is one.

    Raise ValueError where it has none.
    """
    top = name.part.rpartition("/")[0] if name.part in files else name.part
    folder = f"{top}/" if top else ""
    found = [file for file in files if file.startswith(folder) and NEEDED_OF_TOKENIZERS.fullmatch(file[len(folder) :])]
    if not any(re.search(r"(tokenizer|tekken)\.(json|model)", file) for file in found):
        raise ValueError(f"{name} has no tokenizer.json, tokenizer.model or tekken.json: it has {listed(_tops(files))}")
    return Choice(tuple(sorted(found)), name.part)


def gguf_type(file: str) -> str:
    """Return the type that a GGUF file's name ends in, in capitals, or else all of the name without its suffix."""
    stem = _stem(file)
    found = TYPE.search(stem)
    return found[1].upper() if found else stem


def is_model_file(file: str) -> bool:
    """Tell whether a file's name is that of a GGUF model, and not of what goes with one."""
    return file.endswith(".gguf") and not NO_MODELS.search(file.rpartition("/")[2])


def split_of(file: str) -> list[str]:
    """Return the names of all files of the GGUF model that a file belongs to."""
    split = GGUF_SPLIT.fullmatch(file)
    if split is None:
        return [file]
    return [f"{split[1]}-{number:05d}-of-{split[3]}.gguf" for number in range(1, int(split[3]) + 1)]


def _of_gguf(file: str, files: Collection[str]) -> Choice:
    parts = split_of(file)
    missing = [part for part in parts if part not in files]
    if missing:
        raise ValueError(f"{file} is one of {len(parts)} files, and {listed(missing)} of them is not there")
    return Choice(tuple(parts), parts[0])


def _layout(files: Collection[str]) -> list[str]:
    for whole, parts in WEIGHT_LAYOUTS:
        if whole in files:
            return [whole]
        found = [file for file in files if parts.fullmatch(file)]
        if f"{whole}{INDEX}" in files and len(found) == 1:  # its parts have names of their maker's own
            suffix = whole[whole.rindex(".") :]
            found += [file for file in files if file.endswith(suffix) and "/" not in file]
        if found:
            return found
    # The only file of a name of its maker's own, as AutoGPTQ has given it.
    only = [file for file in files if re.fullmatch(r"(?!adapter_)[^/]+\.safetensors", file)]
    return only if len(only) == 1 and "config.json" in files and not any(map(is_model_file, files)) else []


def _of_type(ggufs: Sequence[str], kind: str) -> list[str]:
    """Return the files whose names end in a type, or else have it between marks; a plain one before UD-Q4_K_XL."""
    exact = [file for file in ggufs if gguf_type(file) == kind.upper()]
    pattern = re.compile(rf"(?:^|[-._/]){re.escape(kind)}(?=[-./]|$)", re.IGNORECASE)
    return exact or sorted((file for file in ggufs if pattern.search(_stem(file))), key=len)


def _stem(file: str) -> str:
    split = GGUF_SPLIT.fullmatch(file)
    return (split[1] if split else file.removesuffix(".gguf")).rpartition("/")[2]


def _split_number(file: str) -> int:
    split = GGUF_SPLIT.fullmatch(file)
    return int(split[2]) if split else 1


def _tops(files: Collection[str]) -> list[str]:
    return sorted({file.partition("/")[0] + "/" * ("/" in file) for file in files})


def _nothing(name: ModelName, files: Collection[str]) -> str:
    """Say why nothing of a repository can be run."""
    if name.type and _layout(files):
        return (
            f"{name.repo} has no GGUF files, and so none of type {name.type}: leave :{name.type} out, and --quantize "
            "int4 is as small"
        )
    if "adapter_config.json" in files:
        return f"{name} is a peft adapter, and not a whole model: give the model that it was trained on"
    return (
        f"{name} has no weights that can be read: looked for model.safetensors, pytorch_model.bin, consolidated.* and "
        f"*.gguf; it has {listed(_tops(files))}"
    )
