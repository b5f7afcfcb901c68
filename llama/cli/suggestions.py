"""Which name somebody may have meant who gave another: one that is written alike, or what other programs call so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What flags and commands of a chat are called in llama.cpp, mlx-lm, vLLM, transformers and ollama, where spelling alone
# does not tell.
ELSEWHERE = {
    **dict.fromkeys(("model", "model_path", "m", "hf", "hf_repo"), "ckpt_dir"),
    **dict.fromkeys(("max_tokens", "max_new_tokens", "n_predict", "num_predict"), "max_gen_len"),
    **dict.fromkeys(("ctx_size", "n_ctx", "num_ctx", "max_model_len", "max_length", "max_kv_size", "c"), "max_seq_len"),
    **dict.fromkeys(("tensor_parallel_size", "tp"), "model_parallel_size"),
    **dict.fromkeys(("max_num_seqs", "batch_size"), "max_batch_size"),
    **dict.fromkeys(("adapter", "adapter_path"), "lora"),
    **dict.fromkeys(("draft_model", "model_draft", "speculative_model"), "draft_ckpt_dir"),
    "repeat_penalty": "repetition_penalty",
    "repeat_last_n": "penalty_last_n",
    "reverse_prompt": "stop",
    "guided_json": "json_schema",
    "num_return_sequences": "n",
    "quantization": "quantize",
    "chat_template_kwargs": "template_kwargs",
    "p": "prompt",
    "file": "prompt_file",
    "f": "prompt_file",
    **dict.fromkeys(("/quit", "/bye", "/q"), "/exit"),
    **dict.fromkeys(("/clear", "/new"), "/reset"),
    **dict.fromkeys(("/regen", "/regenerate"), "/retry"),
    "/?": "/help",
}
LEAST_BEGINNING = 3  # characters of a name from which on they tell it


def suggestion(word: str, names: Iterable[str]) -> str | None:
    """Return the one of the names that a word may have been meant for; None where it is like none of them.

    It is what other programs call so, or one that begins so or that the word goes on from, or one that is alike.
    """
    names = list(names)
    if ELSEWHERE.get(word) in names:
        return ELSEWHERE[word]
    longer = [name for name in names if name.startswith(word) and len(word) >= LEAST_BEGINNING]
    shorter = sorted(
        (name for name in names if len(name) >= LEAST_BEGINNING and word.startswith(f"{name}_")), key=len, reverse=True
    )
    return next(iter([*longer, *shorter, *difflib.get_close_matches(word, names, 1)]), None)
