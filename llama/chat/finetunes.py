"""Formats of models that were released without a chat template, as data, and the names by which they are known.

The prompts are those of FastChat's conversation templates, and of mistral-common for Mistral's own models. Knows no
tokenizer: `TemplateChat` renders `template`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Turns:
    """A format of turns, as texts around {text}, a message's; {eos} is the end token, by its id.

    {stripped} is a text without the spaces at its end. default_system stands for a system message that is not there;
    None writes nothing. system_in is the user's message that begins with the system's. `opening` begins the answer.
    """

    system: str
    user: str
    answer: str
    opening: str
    default_system: str | None = None
    system_in: Literal["first", "last"] | None = None

    @property
    def template(self) -> str:
        """The format as a chat template, which refuses roles in another order."""
        default = "none" if self.default_system is None else json.dumps(self.default_system)
        system = _written(self.system).replace(" text ", " system ")
        begins = "false" if self.system_in is None else f"loop.{self.system_in} and system is not none"
        return (
            "{{ bos_token }}{% set system = " + default + " %}{% set turns = messages %}"
            "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
            "{% endif %}"
            + ("{% if system is not none %}{{ " + system + " }}{% endif %}" if self.system_in is None else "")
            + "{% for message in turns %}{% set text = message.content %}"
            "{% if message.role != ('user', 'assistant')[loop.index0 % 2]"
            " or add_generation_prompt and loop.last and loop.index0 % 2 %}"
            "{{ raise_exception('roles are an optional system, then user and assistant in turn, ending with user') }}"
            "{% endif %}{% if message.role == 'user' %}"
            "{% if " + begins + " %}{% set text = " + system + " ~ text %}{% endif %}"
            "{{ " + _written(self.user) + " }}{% else %}{{ " + _written(self.answer) + " }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ " + _written(self.opening) + " }}{% endif %}"
        )  # fmt: skip


def _written(form: str) -> str:
    """Return a jinja expression of a form: its text as a literal, so that no newline of it is trimmed."""
    values = {"{text}": "text", "{stripped}": "text.rstrip(' ')", "{eos}": "eos_token"}
    literal = json.dumps(form)
    for name, value in values.items():
        literal = literal.replace(name, f'" ~ {value} ~ "')
    return literal


_CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
FINETUNES = {
    "vicuna": Turns("{text} ", "USER: {text} ", "ASSISTANT: {text}{eos}", "ASSISTANT:", _CURIOUS_USER),
    "alpaca": Turns(
        "{text}\n\n", "### Instruction: {text}\n\n", "### Response: {text}{eos}", "### Response:", _INSTRUCTION
    ),
    "zephyr": Turns(
        "<|system|>\n{text}{eos}\n", "<|user|>\n{text}{eos}\n", "<|assistant|>\n{text}{eos}\n", "<|assistant|>\n", ""
    ),
    "openchat": Turns(
        "{text}<|end_of_turn|>",
        "GPT4 Correct User: {text}<|end_of_turn|>",
        "GPT4 Correct Assistant: {text}<|end_of_turn|>",
        "GPT4 Correct Assistant:",
    ),
    "tulu": Turns("{text}\n", "<|user|>\n{text}\n", "<|assistant|>\n{text}\n", "<|assistant|>\n"),
    "solar": Turns("{text}\n\n", "### User\n{text}\n\n", "### Assistant\n{text}\n\n", "### Assistant\n"),
    "koala": Turns("{text} ", "USER: {text} ", "GPT: {text}{eos}", "GPT:", "BEGINNING OF CONVERSATION:"),
    "mistral-v1": Turns("{text}\n\n", "[INST] {text} [/INST]", " {text}{eos}", "", system_in="first"),
    "mistral-v3": Turns("{text}\n\n", "[INST]{text}[/INST]", "{stripped}{eos}", "", system_in="last"),
    "mistral-v7": Turns("[SYSTEM_PROMPT]{text}[/SYSTEM_PROMPT]", "[INST]{text}[/INST]", "{stripped}{eos}", ""),
}
# Patterns of the models' names in lower case, and the format of each; the first that is found counts.
_NAMES = {
    r"(?<!stable-)vicuna(?!.*v0)|longchat|xwin-lm|wizardlm.*(13|30|70)b": "vicuna",
    r"(?<!chinese-)(?<!chinese_)alpaca|wizardcoder|nous-hermes|open-instruct": "alpaca",
    r"zephyr|notus|tinyllama.*chat": "zephyr",
    r"openchat.*3\.5|starling-lm": "openchat",
    r"tulu": "tulu",
    r"solar.*instruct": "solar",
    r"koala": "koala",
    r"mi[sx]tral.*instruct": "mistral-v1",  # those of later versions have tokens that tell it
    r"llama-?2.*chat|codellama.*instruct": "llama2",
}


def known_finetune(names: Iterable[str]) -> tuple[str, str] | None:
    """Return a model's format, and the one of its names that tells it; None where none is known.

    names: what the model's folder, file or configuration calls it.
    """
    for name in names:
        for pattern, chat_format in _NAMES.items():
            if re.search(pattern, name.lower()):
                return chat_format, name
    return None
