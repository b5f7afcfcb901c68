"""What a `tokenizer.json` says beside its vocabulary: how text is prepared, how tokens become bytes, where BOS goes.

Works on the parsed JSON; knows no vocabulary and no tokenizer library.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llama.tokenizer.vocab import byte_alphabet

MAX_PATTERN = 10_000  # characters; the longest known has some 500
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    """The steps of a component in order, those of its sequences in their place; ValueError when it is no component."""
    if node is None:
        return
    if not isinstance(node, dict) or not isinstance(node.get("type"), str):
        raise ValueError(f"a step of its pipeline is {node!r:.60}: expected an object with a 'type'")
    if node["type"] != "Sequence":
        yield node
        return
    for key in ("normalizers", "pretokenizers", "decoders", "processors"):
        inner = node.get(key, [])
        if not isinstance(inner, list):
            raise ValueError(f"the {key} of a Sequence are {inner!r:.60}: expected a list")
        for part in inner:
            yield from nodes(part)


def without_prefix(node: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space before a text, otherwise the same; None when nothing is left."""
    kind = node and node["type"]
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        kept = {key: value for key, value in node.items() if key != "add_prefix_space"}
        return kept | {"prepend_scheme": "never"}
    if kind == "ByteLevel":
        return node | {"add_prefix_space": False}
    if kind == "Sequence":
        key = "normalizers" if "normalizers" in node else "pretokenizers"
        parts = [without_prefix(part) for part in node.get(key, [])]
        return node | {key: [part for part in parts if part is not None]}
    return node


def restarts(normalizer: Any, pre_tokenizer: Any) -> bool:
    """Whether the text after a control token gets the space that begins a text: the older (legacy) behaviour."""
    for node in (*nodes(normalizer), *nodes(pre_tokenizer)):
        if node["type"] == "Prepend" or (node["type"] == "ByteLevel" and node.get("add_prefix_space", True)):
            return True
        # Files from before prepend_scheme have add_prefix_space alone.
        scheme = node.get("prepend_scheme", "always" if node.get("add_prefix_space", True) else "never")
        if node["type"] == "Metaspace" and scheme == "always":
            return True
    return False


def check_patterns(*components: Any) -> None:
    """ValueError for a regex that could take exponential time; what is left, the library stops after 10 million steps.

    That is a group repeated without limit that repeats or chooses inside, as in "(a+)+" or "(a|b)*".
    """
    for component in components:
        for node in nodes(component):
            pattern = node.get("pattern")
            regex = pattern.get("Regex") if isinstance(pattern, dict) else None
            if isinstance(regex, str) and (len(regex) > MAX_PATTERN or _explodes(regex)):
                raise ValueError(f"its pattern {regex[:80]!r} could take exponential time")


def _explodes(regex: str) -> bool:
    groups: list[bool] = []  # of each open group: whether it repeats or chooses inside
    in_class = 0
    closed: bool | None = None  # the same of a group that ended just before
    tokens = re.findall(r"\\.|\{\d*,?\d*\}|\(\?[^:=!<>]*[:=!>]?|.", regex, re.DOTALL)
    for token in tokens:
        ended, closed = closed, None
        if in_class:
            in_class += (token == "[") - (token == "]")
        elif token == "[":
            in_class = 1
        elif token.startswith("("):
            groups.append(False)
        elif token == ")":
            closed = groups.pop() if groups else None
            if groups and closed:
                groups[-1] = True
        elif token in ("*", "+") or re.fullmatch(r"\{\d+,\}", token):
            if ended:
                return True
            if groups:
                groups[-1] = True
        elif token == "|" and groups:
            groups[-1] = True
    return False


def bos_of_template(post_processor: Any) -> str | None:
    """The control token that begins every text; None when there is none.

    transformers goes by the post-processor alone as well: it ignores add_bos_token beside a tokenizer.json.
    """
    for node in nodes(post_processor):
        if node["type"] == "TemplateProcessing":
            begin = []
            for part in node.get("single") or []:
                if not isinstance(part, dict):
                    raise ValueError(f"its post_processor has the part {part!r:.60}: expected an object")
                if "Sequence" in part:
                    break
                token = part.get("SpecialToken")
                begin.append(token.get("id") if isinstance(token, dict) else None)
            if len(begin) > 1 or not all(isinstance(token, str) for token in begin):
                raise ValueError(f"its post_processor begins a text with {begin!r:.60}: expected one token")
            return begin[0] if begin else None
        if node["type"] != "ByteLevel":
            raise ValueError(f"its post_processor has the type {node['type']!r}: supported is TemplateProcessing")
    return None


@dataclass(frozen=True)
class PieceDecoder:
    """Bytes of a piece of the vocabulary.

    Unlike the `tokenizers` library, which joins pieces to text first, this keeps bytes of broken UTF-8: the library
    writes U+FFFD for every byte of a run of byte pieces that is no valid UTF-8 as a whole.
    """

    byte_level: bool  # spelled in GPT-2's alphabet, a character for each byte
    byte_fallback: bool  # "<0x0A>" is a byte
    replace: tuple[tuple[str, str], ...]
    drop_at_start: str  # what begins a text without being part of it, dropped once
    drop_all: bool  # or as often as it is there

    @classmethod
    def parse(cls, decoder: Any, normalizer: Any, pre_tokenizer: Any) -> "PieceDecoder":
        """From the file's decoder, or, where it has none, from how it prepares text."""
        steps = list(nodes(decoder))
        if not steps:
            steps = [node for node in nodes(pre_tokenizer) if node["type"] in ("ByteLevel", "Metaspace")]
        if not steps and any(node["type"] in ("Prepend", "Replace") for node in nodes(normalizer)):
            steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
        replace: list[tuple[str, str]] = []
        drop, drop_all = "", False
        for node in steps:
            kind = node["type"]
            if kind == "Replace":
                replace.append(_replacement(node))
            elif kind == "Metaspace":
                mark = node.get("replacement", "▁")
                if not isinstance(mark, str) or len(mark) != 1:
                    raise ValueError(f"its decoder replaces {mark!r:.60}: expected one character")
                replace.append((mark, " "))
                if node.get("prepend_scheme", "always") != "never" and node.get("add_prefix_space", True):
                    drop, drop_all = " ", True
            elif kind == "Strip":
                count = node.get("start", 0)
                if node.get("stop", 0) != 0 or count not in (0, 1) or not isinstance(node.get("content"), str):
                    raise ValueError(f"its decoder has {node!r:.80}: supported is one character at the start")
                drop = node["content"] * count
            elif kind not in ("ByteLevel", "ByteFallback", "Fuse"):
                raise ValueError(
                    f"its decoder has the type {kind!r}: supported are ByteLevel, ByteFallback, Fuse, Metaspace, "
                    "Replace, Strip and Sequence"
                )
        kinds = {node["type"] for node in steps}
        return cls("ByteLevel" in kinds, "ByteFallback" in kinds, tuple(replace), drop, drop_all)

    def decode(self, piece: str, at_start: bool, added: bool) -> bytes:
        """added: not part of the trained vocabulary, so not in the byte alphabet."""
        byte = BYTE_PIECE.fullmatch(piece) if self.byte_fallback else None
        if byte:
            data = bytes([int(byte[1], 16)])
            return data.removeprefix(self.drop_at_start.encode()) if at_start else data
        for old, new in self.replace:
            piece = piece.replace(old, new)
        if at_start and self.drop_at_start:
            piece = piece.lstrip(self.drop_at_start) if self.drop_all else piece.removeprefix(self.drop_at_start)
        if self.byte_level and not added:
            alphabet = byte_alphabet()
            if all(char in alphabet for char in piece):
                return bytes(alphabet[char] for char in piece)
        return piece.encode()


def _replacement(node: dict[str, Any]) -> tuple[str, str]:
    pattern, content = node.get("pattern"), node.get("content")
    old = pattern.get("String") if isinstance(pattern, dict) else None
    if not isinstance(old, str) or not old or not isinstance(content, str):
        raise ValueError(f"its decoder has {node!r:.80}: supported is the replacement of one text by another")
    if len(content) > 8 * len(old):
        raise ValueError(f"its decoder replaces {old!r} by {len(content)} characters")
    return old, content
