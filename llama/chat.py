"""From a dialog to token ids, in the format that a model was tuned on.

Control tokens are placed by id; what people typed is encoded as plain text, whatever it spells.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypedDict

from llama.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    role: Role
    content: str


Dialog = Sequence[Message]

# What Meta's code answers to a dialog that spells out Llama 2's tags.
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."


class ChatFormat(Protocol):
    def encode(self, dialog: Dialog) -> list[int]:
        """Ids up to where the assistant's answer begins; ValueError when the roles do not fit the format."""
        ...

    def is_unsafe(self, dialog: Dialog) -> bool:
        """Whether a message spells out tags that, as text, would still steer the model."""
        ...


class Llama2Chat:
    """[INST] user [/INST] answer, with the system prompt inside the first turn; its tags are plain text."""

    TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, dialog: Dialog) -> list[int]:
        check_roles(dialog)
        system, turns = "", list(dialog)
        if turns[0]["role"] == "system":
            system = f"<<SYS>>\n{turns.pop(0)['content']}\n<</SYS>>\n\n"
        ids: list[int] = []
        for i in range(0, len(turns), 2):
            question = (system if i == 0 else "") + turns[i]["content"]
            text = f"[INST] {question.strip()} [/INST]"
            if i + 1 < len(turns):
                ids += self.tokenizer.encode(f"{text} {turns[i + 1]['content'].strip()} ", bos=True, eos=True)
            else:
                ids += self.tokenizer.encode(text, bos=True, eos=False)
        return ids

    def is_unsafe(self, dialog: Dialog) -> bool:
        return any(tag in message["content"] for message in dialog for tag in self.TAGS)


class Llama3Chat:
    """Each message between a header that names its role and <|eot_id|>."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, dialog: Dialog) -> list[int]:
        check_roles(dialog)
        ids = [self.tokenizer.special_tokens["<|begin_of_text|>"]]
        for message in dialog:
            ids += self._header(message["role"])
            ids += self.tokenizer.encode(message["content"].strip(), bos=False, eos=False)
            ids.append(self.tokenizer.special_tokens["<|eot_id|>"])
        return ids + self._header("assistant")

    def is_unsafe(self, dialog: Dialog) -> bool:
        return False

    def _header(self, role: str) -> list[int]:
        special = self.tokenizer.special_tokens
        name, blank = (self.tokenizer.encode(text, bos=False, eos=False) for text in (role, "\n\n"))
        return [special["<|start_header_id|>"], *name, special["<|end_header_id|>"], *blank]


class ChatML:
    """<|im_start|>role, the message, <|im_end|>; with the system message of the model's own template, if it has one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        default = re.search(r"<\|im_start\|>system\n([^{}<]*)<\|im_end\|>", tokenizer.chat_template or "")
        self.default_system = default[1] if default else None

    def encode(self, dialog: Dialog) -> list[int]:
        check_roles(dialog)
        if self.default_system is not None and dialog[0]["role"] != "system":
            dialog = [Message(role="system", content=self.default_system), *dialog]
        start, end = (self.tokenizer.special_tokens[name] for name in ("<|im_start|>", "<|im_end|>"))
        newline = self._text("\n")
        ids: list[int] = []
        for message in dialog:
            ids += [start, *self._text(f"{message['role']}\n{message['content']}"), end, *newline]
        return [*ids, start, *self._text("assistant\n")]

    def is_unsafe(self, dialog: Dialog) -> bool:
        return False

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False, eos=False)


CHAT_FORMATS: dict[str, Callable[[Tokenizer], ChatFormat]] = {
    "llama2": Llama2Chat,
    "llama3": Llama3Chat,
    "chatml": ChatML,
}
# The control tokens that a format writes; Llama 2 needs none, so it is what remains.
MARKS = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama2": (),
}


def choose_chat_format(tokenizer: Tokenizer, name: str | None = None) -> ChatFormat:
    """The format named, else the first whose control tokens the tokenizer has. ValueError when it lacks them."""
    if name is None:
        name = next(name for name, marks in MARKS.items() if all(mark in tokenizer.special_tokens for mark in marks))
    if name not in CHAT_FORMATS:
        raise ValueError(f"chat_format must be one of {', '.join(CHAT_FORMATS)}, got {name!r}")
    missing = [mark for mark in MARKS[name] if mark not in tokenizer.special_tokens]
    if missing:
        raise ValueError(f"chat_format {name} needs the tokens {', '.join(missing)}, which this tokenizer lacks")
    return CHAT_FORMATS[name](tokenizer)


def check_roles(dialog: Dialog) -> None:
    """ValueError unless an optional system message is followed by user and assistant in turn, ending with the user."""
    for message in dialog:
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"a message is a dictionary with texts as 'role' and 'content', got {message!r}")
    roles = [message["role"] for message in dialog]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or len(turns) % 2 == 0 or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError(
            "a dialog is an optional 'system' message, then 'user' and 'assistant' in turn, ending with 'user'; "
            f"got {roles}"
        )
