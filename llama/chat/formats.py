"""From a dialog to token ids, in the format that a model was tuned on.

Control tokens are placed by id; what people typed is encoded as plain text, whatever it spells.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from llama.chat.dialog import Dialog, Message, check_contents, check_continued, check_roles
from llama.chat.finetunes import FINETUNES, known_finetune
from llama.chat.llama2_tags import B_INST, B_SYS, E_INST, E_SYS, SPECIAL_TAGS
from llama.chat.template import TemplateChat
from llama.chat.tool_calls import ToolCallStream
from llama.chat.tools import Tools, no_place_for_tools
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")


class DialogFormat(Protocol):
    """The format of dialogs that a model was tuned on."""

    def encode(self, dialog: Dialog, tools: Tools | None = None, continue_final_message: bool = False) -> list[int]:
        """Encode a dialog up to where the answer begins, or where its last message ends, which the answer continues.

        tools: what the model may call. Raise ValueError where roles do not fit, and where there is no place for tools.
        """
        ...

    def is_unsafe(self, dialog: Dialog) -> bool:
        """Tell whether a message spells out tags that, as text, would still steer the model."""
        ...

    def call_stream(self, tools: Tools | None, prompt: Sequence[int]) -> ToolCallStream | None:
        """Return what tells calls in an answer to a prompt, None where there can be none."""
        ...


class TextChat:
    """A format of roles and texts alone, without a place for tools.

    name: that of the format; alternates: whether user and assistant speak in turn.
    """

    name: str
    alternates = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, dialog: Dialog, tools: Tools | None = None, continue_final_message: bool = False) -> list[int]:
        chat_format, begun = f"chat format {self.name}", ""
        if tools:
            raise no_place_for_tools(chat_format)
        check_contents(dialog, chat_format)
        if continue_final_message:
            begun = check_continued(dialog)
            dialog = dialog[:-1]
        if self.alternates:
            check_roles(dialog, chat_format)
        return self.prompt(dialog, begun)

    def prompt(self, dialog: Dialog, begun: str) -> list[int]:
        """Encode a dialog that was checked, and the beginning of the answer."""
        raise NotImplementedError

    def is_unsafe(self, dialog: Dialog) -> bool:
        return False

    def call_stream(self, tools: Tools | None, prompt: Sequence[int]) -> ToolCallStream | None:
        return None

    def text(self, text: str) -> list[int]:
        """Encode a text of its own."""
        return self.tokenizer.encode(text, bos=False, eos=False)


class Llama2Chat(TextChat):
    """[INST] user [/INST] answer, with the system prompt inside the first turn; its tags are plain text."""

    name, alternates = "llama2", True

    def prompt(self, dialog: Dialog, begun: str) -> list[int]:
        system, turns = "", list(dialog)
        if turns[0]["role"] == "system":
            system = B_SYS + turns.pop(0)["content"] + E_SYS
        ids: list[int] = []
        for i in range(0, len(turns), 2):
            question = (system if i == 0 else "") + turns[i]["content"]
            text = f"{B_INST} {question.strip()} {E_INST}"
            if i + 1 < len(turns):
                ids += self.tokenizer.encode(f"{text} {turns[i + 1]['content'].strip()} ", bos=True, eos=True)
            else:
                ids += self.tokenizer.encode(f"{text} {begun.strip()}".strip(), bos=True, eos=False)
        return ids

    def is_unsafe(self, dialog: Dialog) -> bool:
        check_contents(dialog, "chat format llama2")
        return any(tag in message["content"] for message in dialog for tag in SPECIAL_TAGS)


class GuessedChat(Llama2Chat):
    """Llama 2's format, assumed where neither template nor tokens tell one; the first use logs a warning."""

    warned = False

    def prompt(self, dialog: Dialog, begun: str) -> list[int]:
        if not self.warned:
            self.warned = True
            log.warning(
                "this model brings no chat template and no chat tokens: if it is a base model, its answers will make "
                "no sense; assuming Llama 2's format, which chat_format llama2 confirms"
            )
        return super().prompt(dialog, begun)


class Llama3Chat(TextChat):
    """Llama 3's format: a header with the role, the message, <|eot_id|>; roles in any order.

    It is `llama.tokenizer.ChatFormat` in Meta's Llama 3, whose names of methods it has.
    """

    name = "llama3"

    def prompt(self, dialog: Dialog, begun: str) -> list[int]:
        return [*self.encode_dialog_prompt(dialog), *self.text(begun.strip())]

    def encode_header(self, message: Message) -> list[int]:
        """Encode what begins a message: its role between control tokens, and a blank line."""
        special = self.tokenizer.special_tokens
        role = "ipython" if message["role"] == "tool" else message["role"]
        name, blank = (self.tokenizer.encode(text, bos=False, eos=False) for text in (role, "\n\n"))
        return [special["<|start_header_id|>"], *name, special["<|end_header_id|>"], *blank]

    def encode_message(self, message: Message) -> list[int]:
        """Encode a whole message, stripped, with the end of its turn."""
        text = self.tokenizer.encode(message["content"].strip(), bos=False, eos=False)
        return [*self.encode_header(message), *text, self.tokenizer.special_tokens["<|eot_id|>"]]

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """Encode messages, and the header of the answer."""
        messages = [token for message in dialog for token in self.encode_message(message)]
        answer = self.encode_header(Message(role="assistant", content=""))
        return [self.tokenizer.special_tokens["<|begin_of_text|>"], *messages, *answer]


class ChatML(TextChat):
    """The ChatML format: <|im_start|>role, the message, <|im_end|>."""

    name = "chatml"

    def prompt(self, dialog: Dialog, begun: str) -> list[int]:
        start, end = (self.tokenizer.special_tokens[name] for name in ("<|im_start|>", "<|im_end|>"))
        newline = self.text("\n")
        ids: list[int] = []
        for message in dialog:
            ids += [start, *self.text(f"{message['role']}\n{message['content']}"), end, *newline]
        return [*ids, start, *self.text(f"assistant\n{begun}")]


class CodeLlama70BChat(TextChat):
    """Code Llama 70B Instruct's format: "Source: role", the message, <step>; always with a system message's header."""

    name, alternates = "codellama70b", True

    def prompt(self, dialog: Dialog, begun: str) -> list[int]:
        if dialog[0]["role"] != "system":
            dialog = [Message(role="system", content=""), *dialog]
        ids = [self.tokenizer.bos_id]
        for message in dialog:
            ids += self._header(message["role"])
            if message["content"]:
                ids += self.text("\n\n " + message["content"].strip())
            ids.append(self.tokenizer.special_tokens["<step>"])
        return [*ids, *self._header("assistant"), *self.text("\n\n " + begun.strip())]

    def _header(self, role: str) -> list[int]:
        return self.text(f" Source: {role}" + ("\nDestination: user" if role == "assistant" else ""))


CHAT_FORMATS: dict[str, Callable[[Tokenizer], DialogFormat]] = {
    "template": TemplateChat,
    "llama2": Llama2Chat,
    "llama3": Llama3Chat,
    "chatml": ChatML,
    "codellama70b": CodeLlama70BChat,
    **{name: functools.partial(TemplateChat, source=turns.template, name=name) for name, turns in FINETUNES.items()},
}
# The control tokens that a built-in format needs.
FORMAT_TOKENS = {
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "codellama70b": ("<step>",),
    "openchat": ("<|end_of_turn|>",),
    "mistral-v7": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"),
    "mistral-v3": ("[INST]", "[/INST]"),
}
# Formats that their control tokens tell: the first that a tokenizer has.
TOLD_BY_TOKENS = ("llama3", "chatml", "codellama70b", "mistral-v7", "mistral-v3")


def find_chat_format(tokenizer: Tokenizer, model_names: Iterable[str] = ()) -> str | None:
    """Return a model's format: its own template, else what its control tokens tell, else what one of its names tells.

    Return None without any of these; where a name decided, the log says so.
    """
    if tokenizer.chat_template:
        return "template"
    told = [name for name in TOLD_BY_TOKENS if not _missing_tokens(tokenizer, name)]
    if told == ["mistral-v7", "mistral-v3"] and 0 < tokenizer.mistral_version < 7:
        return "mistral-v3"  # files of that version have tokens of the next ones, but other models
    if told:
        return told[0]
    known = known_finetune(model_names)
    if known is None:
        return None
    if missing := _missing_tokens(tokenizer, known[0]):
        log.warning(
            "this model is called %s, but its tokenizer lacks %s, which chat format %s needs: give the one that it was "
            "tuned with by --tokenizer_path, or choose another chat_format",
            known[1],
            " and ".join(missing),
            known[0],
        )
        return None
    log.info("chat format %s, as this model is called %s; chat_format chooses another", *known)
    return known[0]


def choose_chat_format(
    tokenizer: Tokenizer, name: str | None = None, template_kwargs: Mapping[str, Any] | None = None
) -> DialogFormat:
    """Return the format named, else the one that `find_chat_format` finds, else a GuessedChat.

    template_kwargs: what a chat template reads beside messages and tools. Raise ValueError where it is no template that
    would read them, and where the tokenizer lacks tokens of the format named.
    """
    name = find_chat_format(tokenizer) if name is None else name
    chat_format = GuessedChat(tokenizer) if name is None else _named_format(tokenizer, name)
    if template_kwargs:
        if not isinstance(chat_format, TemplateChat):
            raise ValueError(
                f"template_kwargs are for a chat template, and chat format {name or 'llama2'} is none: leave them out, "
                "or give a chat_template"
            )
        chat_format.set_arguments(template_kwargs)
    return chat_format


def _named_format(tokenizer: Tokenizer, name: str) -> DialogFormat:
    if name not in CHAT_FORMATS:
        raise ValueError(f"chat_format must be one of {', '.join(CHAT_FORMATS)}, got {name!r}")
    missing = _missing_tokens(tokenizer, name)
    if missing:
        raise ValueError(f"chat_format {name} needs the tokens {', '.join(missing)}, which this tokenizer lacks")
    return CHAT_FORMATS[name](tokenizer)


def _missing_tokens(tokenizer: Tokenizer, name: str) -> list[str]:
    return [token for token in FORMAT_TOKENS.get(name, ()) if token not in tokenizer.special_tokens]


def check_system(chat_format: DialogFormat, system: str) -> None:
    """Raise ValueError where the format refuses a system prompt, or leaves it out."""
    question = Message(role="user", content="Hello")
    prompts = [[Message(role="system", content=text), question] for text in (system, system + "!")]
    if chat_format.encode(prompts[0]) == chat_format.encode(prompts[1]):
        raise ValueError("this model's chat format has no place for a system prompt: leave it out")
