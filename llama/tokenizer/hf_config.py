"""The small files that Hugging Face keeps beside a tokenizer, read and checked. Knows no tokenizer library."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama.tokenizer.vocab import MARKERS

MAX_BYTES = 16 << 20  # the largest known tokenizer_config.json has 0.2 MB
MAX_CONTAINERS = 1 << 22  # Python needs some 60 bytes for each; the largest known tokenizer.json has 0.5 million
MAX_ID = 1 << 24
LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")  # of transformers, "Fast" taken off
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class AddedToken:
    """A token that is no piece of the trained vocabulary, with the names and defaults of the `tokenizers` library.

    special: placed by id only; text that spells it stays text. The others are found in text.
    """

    content: str
    special: bool = False
    normalized: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False

    @classmethod
    def parse(cls, value: Any, where: str) -> "AddedToken":
        """value: the text alone, or an object with these fields."""
        if isinstance(value, str):
            value = {"content": value}
        if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
            raise ValueError(f"{where} is {_short(value)}: expected a token's text, or an object with its 'content'")
        content = value["content"]
        flags = {name: value.get(name) for name in ("special", "normalized", "single_word", "lstrip", "rstrip")}
        wrong = [name for name, flag in flags.items() if flag is not None and not isinstance(flag, bool)]
        if wrong:
            raise ValueError(f"{where} has {wrong[0]} {_short(flags[wrong[0]])}: expected true or false")
        return cls(content, **{name: flag for name, flag in flags.items() if flag is not None})

    @property
    def is_control(self) -> bool:
        return self.special or self.content in MARKERS


@dataclass(frozen=True)
class TokenizerConfig:
    """tokenizer_config.json, special_tokens_map.json, added_tokens.json and the chat template, as far as they exist.

    named: texts of "bos_token" and the like; None where a file says that there is none, no key where none says it.
    added: tokens by id. specials: texts of named and additional special tokens.
    """

    tokenizer_class: str = ""  # of transformers, without "Fast"
    named: Mapping[str, str | None] = field(default_factory=dict)
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    specials: frozenset[str] = frozenset()
    add_bos: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    chat_template: str | None = None

    @property
    def is_llama(self) -> bool:
        return self.tokenizer_class in LLAMA_CLASSES

    @classmethod
    def read(cls, folder: Path) -> "TokenizerConfig":
        """Files that are absent leave the defaults; ValueError names a damaged one, its key and the value."""
        path = folder / "tokenizer_config.json"
        config = _read(path)
        map_path = folder / "special_tokens_map.json"
        sources = [(path, config), (map_path, _read(map_path))]
        if "added_tokens_decoder" not in config:  # in older files the map has the last word, as in transformers
            sources.reverse()
        named: dict[str, str | None] = {}
        for source, content in sources:
            for key in NAMED:
                if key in content and key not in named:
                    value = content[key]
                    named[key] = None if value is None else AddedToken.parse(value, f"{source}: {key}").content
        specials = {text for text in named.values() if text}
        for source, content in sources:
            for key in ("additional_special_tokens", "extra_special_tokens"):
                values: Any = content.get(key) or []
                values = list(values.values()) if isinstance(values, dict) else values
                if not isinstance(values, list):
                    raise ValueError(f"{source}: {key} is {_short(values)}: expected a list")
                specials |= {AddedToken.parse(value, f"{source}: {key}").content for value in values}
        name = config.get("tokenizer_class")
        return cls(
            tokenizer_class=name.removesuffix("Fast") if isinstance(name, str) else "",
            named=named,
            added=_added(folder, config),
            specials=frozenset(specials),
            add_bos=_flag(path, config, "add_bos_token"),
            add_prefix_space=_flag(path, config, "add_prefix_space"),
            legacy=_flag(path, config, "legacy"),
            chat_template=_chat_template(folder, config),
        )


def read_object(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object from a stranger: ValueError for anything else, before it can take much memory."""
    if data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
        raise ValueError(f"{name} is JSON with more than {MAX_CONTAINERS} lists and objects: no tokenizer needs them")
    try:
        value = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} is JSON, but no object: {_short(value)}")
    return value


def parse_id(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_ID:
        raise ValueError(f"{where} is {_short(value)}: expected a token id below {MAX_ID}")
    return value


def _read(path: Path) -> dict[str, Any]:
    data = _bytes(path)
    return {} if data is None else read_object(data, str(path))


def _bytes(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES >> 20} MiB")
    return data


def _added(folder: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Ids as in tokenizer_config.json, else as in the older added_tokens.json."""
    path, key = folder / "tokenizer_config.json", "added_tokens_decoder"
    added: dict[int, AddedToken] = {}
    if key in config:
        if not isinstance(config[key], dict):
            raise ValueError(f"{path}: {key} is {_short(config[key])}: expected an object")
        for text, value in config[key].items():
            number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else text
            added[parse_id(number, f"{path}: an id in {key}")] = AddedToken.parse(value, f"{path}: {key}.{text}")
    else:
        path = folder / "added_tokens.json"
        for text, number in _read(path).items():
            added[parse_id(number, f"{path}: {_short(text)}")] = AddedToken.parse(text, str(path))
    return added


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """A file of its own comes before an entry of tokenizer_config.json, as in transformers."""
    path = folder / "chat_template.jinja"
    data = _bytes(path)
    if data is not None:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text: {error}") from None
    path = folder / "tokenizer_config.json"
    template = config.get("chat_template")
    if template is None:
        path = folder / "chat_template.json"
        template = _read(path).get("chat_template")
    if isinstance(template, list):  # named ones, for tools and the like
        try:
            template = {entry["name"]: entry["template"] for entry in template}
        except (TypeError, KeyError):
            raise ValueError(f"{path}: chat_template is a list without 'name' and 'template' in each") from None
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{path}: chat_template is {_short(template)}: expected text")
    return template


def _flag(path: Path, config: dict[str, Any], key: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{path}: {key} is {_short(value)}: expected true or false")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _short(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
