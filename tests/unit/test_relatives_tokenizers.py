"""Folders of families that are a Llama inside have tokenizers of other kinds: ids and chats are transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Tokenizer, Qwen2Tokenizer

from llama.chat.dialog import Message
from llama.chat.formats import choose_chat_format
from llama.tokenizer import Tokenizer
from tests.chat_tokenizers import TEXTS, base_model

# In the manner of Qwen2's, with its system message where there is none, and of Granite's.
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROLES = (
    "{%- for m in messages %}{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] "
    "+ '<|end_of_text|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
)
KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "qwen2": (
        Qwen2Tokenizer,
        CHATML,
        {"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    ),
    "granite": (
        GPT2Tokenizer,
        ROLES,
        {
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|end_of_text|>"),
            "extra_special_tokens": ["<|start_of_role|>", "<|end_of_role|>"],
        },
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_ids_and_chats_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """Qwen2 normalizes to NFC and splits numbers digit by digit, which Llama's do not."""
    made, template, specials = KINDS[name]
    base = base_model()
    theirs = made(vocab=dict(base["vocab"]), merges=[tuple(merge) for merge in base["merges"]], **specials)
    theirs.chat_template = template
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer(tmp_path)
    for text in [*TEXTS, "e\u0301 123456", "   spaces\n\n\nnew 1234"]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, bos=False, eos=False) == ids
        assert ours.decode(ids) == theirs.decode(ids)
    for text in TEXTS:
        messages: list[Message] = [{"role": "user", "content": text}]
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert choose_chat_format(ours).encode(messages) == expected
    assert theirs.eos_token_id in ours.stop_tokens
