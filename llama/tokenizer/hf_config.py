"""Read and check the JSON files of a Hugging Face tokenizer."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llama.files import check_content
from llama.tokenizer.hf_limits import MAX_ADDED_TEXT, check_pieces
from llama.tokenizer.vocab import default_template

MAX_CONFIG_BYTES = 16 << 20  # The largest known tokenizer_config.json has 0.2 MB.
MAX_CONTAINERS = 1 << 22  # Python needs some 60 bytes for each; the largest known tokenizer.json has half a million.
MAX_ID = 1 << 24
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
LISTED_TOKENS = ("additional_special_tokens", "extra_special_tokens")
TOKEN_FIELDS = ("content", "special", "normalized", "single_word", "lstrip", "rstrip")
FLAGS = ("add_bos_token", "add_prefix_space", "legacy")
TYPE_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
T = TypeVar("T")


def expect(kind: type[T], value: Any, where: str) -> T:
    """Return a value of a JSON file unchanged; ValueError says where it stands if it is of another type."""
    if not isinstance(value, kind):
        found = "missing" if value is None else f"{value!r:.60}"
        raise ValueError(f"{where} is {found}: expected {TYPE_NAMES[kind]}")
    return value


def given(content: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return a value of a JSON object, or the default where it is absent or null; "" and the like are values."""
    value = content.get(key)
    return default if value is None else value


def parse_id(value: Any, where: str) -> int:
    """Return a token id unchanged; ValueError says where it stands if it is none."""
    if type(value) is not int or not 0 <= value < MAX_ID:
        raise ValueError(f"{where} is {value!r:.60}: ids are integers, 0 to {MAX_ID - 1}")
    return value


def parse_token(value: Any, where: str) -> Any:
    """Return the library's AddedToken of a text, or of an object with its fields; ValueError begins with `where`."""
    from tokenizers import AddedToken

    entry = {"content": value} if isinstance(value, str) else expect(dict, value, where)
    given = {key: entry[key] for key in TOKEN_FIELDS if entry.get(key) is not None}
    if not given.get("content"):
        raise ValueError(f"{where} is {value!r:.60}: expected a token's text, or an object with its 'content'")
    try:
        return AddedToken(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is {value!r:.200}: {error}") from None


def parse_added(entries: Iterable[tuple[Any, Any]], where: str) -> dict[int, Any]:
    """Return added tokens, given as pairs of an id and a text or object; ValueError begins with `where`."""
    added = {parse_id(i, f"{where}: the id of {token!r:.60}"): parse_token(token, where) for i, token in entries}
    check_pieces([token.content for token in added.values()], f"{where}: all together have", MAX_ADDED_TEXT)
    return added


@dataclass(frozen=True)
class TokenizerConfig:
    """What tokenizer_config.json and the older files beside it say; None, or an empty collection, where they do not."""

    is_llama: bool = False  # transformers opens the folder by its Llama class
    named: Mapping[str, str | None] = field(default_factory=dict)  # "bos_token" and the like; None: there is none
    added: Mapping[int, Any] = field(default_factory=dict)  # the library's AddedTokens by id
    specials: frozenset[str] = frozenset()  # the texts of all special tokens
    add_bos_token: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    chat_template: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "TokenizerConfig":
        """Read what there is of these files; ValueError names a damaged one, its key and the value."""
        path, map_path = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
        config = _read(path)
        sources = [(map_path, _read(map_path)), (path, config)]  # The later one wins.
        if "added_tokens_decoder" not in config:  # In older folders the map wins, as in transformers.
            sources.reverse()
        added, named = _read_added(folder, config), dict[str, str | None]()
        specials = {token.content for token in added.values() if token.special}
        for source, content in sources:
            for key in set(NAMED_TOKENS) & content.keys():
                token = content[key]
                named[key] = None if token is None else parse_token(token, f"{source}: {key}").content
            for key in LISTED_TOKENS:
                listed = given(content, key, [])
                listed = listed.values() if isinstance(listed, dict) else expect(list, listed, f"{source}: {key}")
                specials |= {parse_token(token, f"{source}: {key}").content for token in listed}
        return cls(
            is_llama=config.get("tokenizer_class") in LLAMA_CLASSES,
            named=named,
            added=added,
            specials=frozenset(specials.union(filter(None, named.values()))),
            chat_template=_read_chat_template(folder, config),
            **{key: expect(bool, config[key], f"{path}: {key}") for key in FLAGS if config.get(key) is not None},
        )


def read_object(data: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object from a stranger; ValueError for anything else, before it can take much memory."""
    if data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
        raise ValueError(f"{name} is JSON with more than {MAX_CONTAINERS} lists and objects: no tokenizer needs them")
    try:
        value = json.loads(data, parse_constant=int)  # int refuses NaN and Infinity, which are no JSON.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no valid JSON: {error}") from None
    return expect(dict, value, name)


def _read(path: Path) -> dict[str, Any]:
    return read_object(_read_bytes(path), str(path)) if path.is_file() else {}


def _read_bytes(path: Path) -> bytes:
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} is larger than {MAX_CONFIG_BYTES >> 20} MiB")
    if path.stat().st_size > 0:  # an empty template is one
        check_content(path)
    return path.read_bytes()


def _read_added(folder: Path, config: dict[str, Any]) -> dict[int, Any]:
    """Read the added tokens from tokenizer_config.json, else from the older added_tokens.json."""
    if "added_tokens_decoder" not in config:
        path = folder / "added_tokens.json"
        return parse_added(((number, text) for text, number in _read(path).items()), str(path))
    where = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
    entries = expect(dict, config["added_tokens_decoder"], where).items()
    return parse_added(((int(key) if re.fullmatch(r"-?\d{1,9}", key) else key, token) for key, token in entries), where)


def _read_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Read the default chat template: a file of its own comes before tokenizer_config.json, as in transformers."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return _read_bytes(path).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text: {error}") from None
    path, template = folder / "tokenizer_config.json", config.get("chat_template")
    if template is None:
        path = folder / "chat_template.json"
        template = _read(path).get("chat_template")
    where = f"{path}: chat_template"
    if isinstance(template, list):  # templates by name, for tools and the like
        template = {str(expect(dict, entry, where).get("name")): entry.get("template") for entry in template}
    if isinstance(template, dict):
        template = default_template(template, where)
    return None if template is None else expect(str, template, where)
