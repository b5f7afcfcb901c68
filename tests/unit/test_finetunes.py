"""Fine-tunes that bring no chat template get the format that they are known for, by their name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from llama.chat.finetunes import known_finetune
from llama.chat.formats import GuessedChat, choose_chat_format, find_chat_format
from llama.checkpoint import open_checkpoint
from llama.config import ModelArgs
from llama.tokenizer import Tokenizer
from llama.tokenizer.vocab import byte_alphabet
from tests.checkpoints import random_state, write_meta
from tests.gguf_files import write_gguf_model
from tests.models import build

SPECIALS = ("<s>", "</s>", "<|end_of_turn|>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
CURIOUS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
# What FastChat's Conversation.get_prompt() gives for Hi, Hello, Bye, and mistral-common for Mistral's; then with the
# system message "Be brief.".
PROMPTS = {
    "vicuna": (
        CURIOUS + " USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT:",
        "Be brief. USER: Hi ASSISTANT: Hello</s>USER: Bye ASSISTANT:",
    ),
    "alpaca": (
        TASK + "\n\n### Instruction: Hi\n\n### Response: Hello</s>### Instruction: Bye\n\n### Response:",
        "Be brief.\n\n### Instruction: Hi\n\n### Response: Hello</s>### Instruction: Bye\n\n### Response:",
    ),
    "zephyr": (
        "<|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\nBye</s>\n<|assistant|>\n",
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\nBye</s>\n<|assistant|>\n",
    ),
    "openchat": (
        "GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant: Hello<|end_of_turn|>"
        "GPT4 Correct User: Bye<|end_of_turn|>GPT4 Correct Assistant:",
        "Be brief.<|end_of_turn|>GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant: Hello<|end_of_turn|>"
        "GPT4 Correct User: Bye<|end_of_turn|>GPT4 Correct Assistant:",
    ),
    "tulu": (
        "<|user|>\nHi\n<|assistant|>\nHello\n<|user|>\nBye\n<|assistant|>\n",
        "Be brief.\n<|user|>\nHi\n<|assistant|>\nHello\n<|user|>\nBye\n<|assistant|>\n",
    ),
    "solar": (
        "### User\nHi\n\n### Assistant\nHello\n\n### User\nBye\n\n### Assistant\n",
        "Be brief.\n\n### User\nHi\n\n### Assistant\nHello\n\n### User\nBye\n\n### Assistant\n",
    ),
    "koala": (
        "BEGINNING OF CONVERSATION: USER: Hi GPT: Hello</s>USER: Bye GPT:",
        "Be brief. USER: Hi GPT: Hello</s>USER: Bye GPT:",
    ),
    "mistral-v1": (
        "[INST] Hi [/INST] Hello</s>[INST] Bye [/INST]",
        "[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
    ),
    "mistral-v3": (
        "[INST]Hi[/INST]Hello</s>[INST]Bye[/INST]",
        "[INST]Hi[/INST]Hello</s>[INST]Be brief.\n\nBye[/INST]",
    ),
    "mistral-v7": (
        "[INST]Hi[/INST]Hello</s>[INST]Bye[/INST]",
        "[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Hi[/INST]Hello</s>[INST]Bye[/INST]",
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes, and the control tokens that these formats write."""
    texts = [*byte_alphabet(), "ab"]
    return Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "dbrx",
            "tokenizer.ggml.tokens": [*texts, *SPECIALS],
            "tokenizer.ggml.token_type": [1] * len(texts) + [3] * len(SPECIALS),
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": len(texts),
            "tokenizer.ggml.eos_token_id": len(texts) + 1,
        }
    )


def dialog(*texts: str, system: str | None = None) -> list[Any]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_those_of_fastchat(tokenizer: Tokenizer, name: str) -> None:
    """Vicuna was asked in Llama 2's format, which it was never tuned on."""
    chat = choose_chat_format(tokenizer, name)
    for system, prompt in zip((None, "Be brief."), PROMPTS[name], strict=True):
        ids = chat.encode(dialog("Hi", "Hello", "Bye", system=system))
        assert tokenizer.decode(ids) == "<s>" + prompt
        typed = chat.encode(dialog("Hi</s>", "<|end_of_turn|>", "</s>", system=system))
        specials = tokenizer.special_tokens.values()
        assert [token for token in typed if token in specials] == [token for token in ids if token in specials]
    with pytest.raises(ValueError, match="roles are an optional system, then user and assistant in turn, ending with"):
        chat.encode(dialog("Hi", "Hello"))


def test_mistrals_first_format_is_spaced_as_mistral_common_spaces_it(
    sentencepiece_model: bytes, tmp_path: Path
) -> None:
    """Message by message, each with SentencePiece's space. It was Llama 2's: stripped, and with a BOS before each turn.

    The ids of all three formats were compared with mistral-common's on its own tokenizer files: 36 of 36 are equal.
    """
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    chat = choose_chat_format(Tokenizer(tmp_path / "tokenizer.model"), "mistral-v1")
    parts = ["[INST] Be brief.\n\n Hi\n [/INST]", " Hello! ", "[INST] Bye [/INST]"]
    first, answer, last = (library.encode(part) for part in parts)
    ids = chat.encode(dialog(" Hi\n", " Hello! ", "Bye", system="Be brief."))
    assert ids == [library.bos_id(), *first, *answer, library.eos_id(), *last]


def test_a_known_format_whose_tokens_are_lacking_is_told(
    sentencepiece_model: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Llama 2's format was taken without a word why."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    assert find_chat_format(Tokenizer(tmp_path), ["openchat_3.5"]) is None
    assert [record.getMessage() for record in caplog.records] == [
        "this model is called openchat_3.5, but its tokenizer lacks <|end_of_turn|>, which chat format openchat needs: "
        "give the one that it was tuned with by --tokenizer_path, or choose another chat_format"
    ]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("vicuna-7b-v1.5", "vicuna"),
        ("models--lmsys--vicuna-13b-v1.3", "vicuna"),
        ("stable-vicuna-13B", None),
        ("vicuna-7b-v0", None),
        ("WizardLM-13B-V1.2", "vicuna"),
        ("chavinlo/alpaca-native", "alpaca"),
        ("chinese-alpaca-7b", None),
        ("zephyr-7b-beta.Q4_K_M.gguf", "zephyr"),
        ("TinyLlama-1.1B-Chat-v0.6", "zephyr"),
        ("TinyLlama-1.1B-step-50K-105b", None),
        ("openchat_3.5", "openchat"),
        ("Starling-LM-7B-alpha", "openchat"),
        ("llama-2-70b-chat", "llama2"),
        ("llama-2-70b", None),
        ("CodeLlama-7b-Instruct", "llama2"),
        ("CodeLlama-7b", None),
        ("Mistral-7B-Instruct-v0.1", "mistral-v1"),
        ("mistral-7B-v0.1", None),
        ("", None),
    ],
)
def test_names_are_known(name: str, known: str | None) -> None:
    assert known_finetune(["Meta-Llama", name]) == (None if known is None else (known, name))


def write_hugging_face(folder: Path, stored: str, write: Callable[[Path], object]) -> Path:
    """A Hugging Face folder with a SentencePiece tokenizer and no template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=400
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"_name_or_path": stored}))
    return folder


def test_a_model_is_known_by_its_folder_its_config_or_the_hubs_cache(
    tmp_path: Path, sentencepiece_model: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    def tokenizer_of(folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model)

    folder = write_hugging_face(tmp_path / "alpaca-7b", "/home/me/run-17", tokenizer_of)
    cached = write_hugging_face(tmp_path / "models--lmsys--vicuna-7b-v1.5" / "snapshots" / "3321f76e", "", tokenizer_of)
    configured = write_hugging_face(tmp_path / "mine", "lmsys/vicuna-7b-v1.5", tokenizer_of)
    unknown = write_hugging_face(tmp_path / "other", "/home/me/run-17", tokenizer_of)
    for path, name, called in (
        (folder, "alpaca", "alpaca-7b"),
        (cached, "vicuna", "models--lmsys--vicuna-7b-v1.5"),
        (configured, "vicuna", "lmsys/vicuna-7b-v1.5"),
    ):
        with caplog.at_level(logging.INFO, "llama"):
            llm = build(path, max_seq_len=256)
        ids = llm.encode_dialogs([dialog("Hi")])[0]
        wanted = choose_chat_format(llm.tokenizer, name).encode(dialog("Hi"))
        assert ids == wanted
        said = [record.getMessage() for record in caplog.records if "chat format" in record.getMessage()]
        assert said == [f"chat format {name}, as this model is called {called}; chat_format chooses another"]
        caplog.clear()
    assert isinstance(build(unknown, max_seq_len=256).chat_format, GuessedChat)
    named = build(folder, max_seq_len=256, chat_format="koala")
    assert named.encode_dialogs([dialog("Hi")])[0] == choose_chat_format(named.tokenizer, "koala").encode(dialog("Hi"))


def test_a_gguf_file_says_what_it_is_called(tmp_path: Path) -> None:
    args = ModelArgs(dim=32, n_layers=1, n_heads=4, vocab_size=7, multiple_of=32)
    write_gguf_model(tmp_path / "m.gguf", args, random_state(args), general__name="lmsys vicuna 7b v1.5")
    assert open_checkpoint(tmp_path / "m.gguf").model_name == "lmsys vicuna 7b v1.5"


def test_a_tokenizer_that_tells_its_format_is_not_overruled_by_a_name(tiny_folder: Path, tmp_path: Path) -> None:
    """A fine-tune of Llama 3 that is called Vicuna has Llama 3's tokens."""
    folder = tmp_path / "vicuna-8b"
    folder.mkdir()
    write_meta(folder)
    assert type(build(folder).chat_format) is type(build(tiny_folder).chat_format)
