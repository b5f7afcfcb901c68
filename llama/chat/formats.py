"""From a dialog to token ids, in the format that a model was tuned on.

Control tokens are placed by id; what people typed is encoded as plain text, whatever it spells.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypedDict

from llama.chat.template import TEXT_TAGS, TemplateChat
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One message of a dialog."""

    role: Role
    content: str


Dialog = Sequence[Message]

# The answer of Meta's code to a dialog that spells out Llama 2's tags.
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."


class ChatFormat(Protocol):
    """The format of dialogs that a model was tuned on."""

    def encode(self, dialog: Dialog) -> list[int]:
        """Encode a dialog up to where the answer begins; raise ValueError where its roles do not fit the format."""
        ...

    def is_unsafe(self, dialog: Dialog) -> bool:
        """Tell whether a message spells out tags that, as text, would still steer the model."""
        ...


class Llama2Chat:
    """[INST] user [/INST] answer, with the system prompt inside the first turn; its tags are plain text."""

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
        check_roles(dialog)
        return any(tag in message["content"] for message in dialog for tag in TEXT_TAGS)


class GuessedChat(Llama2Chat):
    """Llama 2's format, assumed where neither template nor tokens tell one; the first use logs a warning."""

    warned = False

    def encode(self, dialog: Dialog) -> list[int]:
        if not self.warned:
            self.warned = True
            log.warning(
                "this model brings no chat template and no chat tokens: if it is a base model, its answers will make "
                "no sense; assuming Llama 2's format, which chat_format llama2 confirms"
            )
        return super().encode(dialog)


class Llama3Chat:
    """Llama 3's format: a header with the role, the message, <|eot_id|>."""

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
    """The ChatML format: <|im_start|>role, the message, <|im_end|>."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, dialog: Dialog) -> list[int]:
        check_roles(dialog)
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


class CodeLlama70BChat:
    """Code Llama 70B Instruct's format: "Source: role", the message, <step>; always with a system message's header."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, dialog: Dialog) -> list[int]:
        check_roles(dialog)
        if dialog[0]["role"] != "system":
            dialog = [Message(role="system", content=""), *dialog]
        ids = [self.tokenizer.bos_id]
        for message in dialog:
            ids += self._header(message["role"])
            if message["content"]:
                ids += self._text("\n\n " + message["content"].strip())
            ids.append(self.tokenizer.special_tokens["<step>"])
        return [*ids, *self._header("assistant"), *self._text("\n\n ")]

    def is_unsafe(self, dialog: Dialog) -> bool:
        return False

    def _header(self, role: str) -> list[int]:
        return self._text(f" Source: {role}" + ("\nDestination: user" if role == "assistant" else ""))

    def _text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=False, eos=False)


CHAT_FORMATS: dict[str, Callable[[Tokenizer], ChatFormat]] = {
    "template": TemplateChat,
    "llama2": Llama2Chat,
    "llama3": Llama3Chat,
    "chatml": ChatML,
    "codellama70b": CodeLlama70BChat,
}
# The control tokens of each built-in format, by which it is recognised; Llama 2's tags are plain text.
FORMAT_TOKENS = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "codellama70b": ("<step>",),
}


def choose_chat_format(tokenizer: Tokenizer, name: str | None = None) -> ChatFormat:
    """Return the format named, else the model's own template, else the format whose control tokens the tokenizer has.

    Without any of these, return a GuessedChat. Raise ValueError where the tokenizer lacks tokens of the format named.
    """
    if name is None and tokenizer.chat_template:
        name = "template"
    if name is None:
        special = tokenizer.special_tokens
        name = next((name for name, tokens in FORMAT_TOKENS.items() if all(each in special for each in tokens)), None)
    if name is None:
        return GuessedChat(tokenizer)
    if name not in CHAT_FORMATS:
        raise ValueError(f"chat_format must be one of {', '.join(CHAT_FORMATS)}, got {name!r}")
    missing = [token for token in FORMAT_TOKENS.get(name, ()) if token not in tokenizer.special_tokens]
    if missing:
        raise ValueError(f"chat_format {name} needs the tokens {', '.join(missing)}, which this tokenizer lacks")
    return CHAT_FORMATS[name](tokenizer)


def check_system(chat_format: ChatFormat, system: str) -> None:
    """Raise ValueError where the format refuses a system prompt, or leaves it out."""
    question = Message(role="user", content="Hello")
    prompts = [[Message(role="system", content=text), question] for text in (system, system + "!")]
    if chat_format.encode(prompts[0]) == chat_format.encode(prompts[1]):
        raise ValueError("this model's chat format has no place for a system prompt: leave it out")


def check_messages(dialog: Dialog) -> None:
    """Raise ValueError unless a dialog is a list of messages, each with a role and a content that are text."""
    if not isinstance(dialog, list | tuple):
        raise ValueError(f"a dialog is a list of messages, and dialogs are a list of those; got {dialog!r}")
    for message in dialog:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f"a dialog is a list of messages, each a dictionary with texts as 'role' and 'content'; got {message!r}"
            )


def check_roles(dialog: Dialog) -> None:
    """Raise ValueError unless roles are an optional system, then user and assistant in turn, ending with user."""
    check_messages(dialog)
    roles = [message["role"] for message in dialog]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or len(turns) % 2 == 0 or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError(
            "a dialog is an optional 'system' message, then 'user' and 'assistant' in turn, ending with 'user'; "
            f"got {roles}"
        )
