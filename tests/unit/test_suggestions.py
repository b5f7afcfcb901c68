"""Who comes from another program is told what a flag is called here."""

from __future__ import annotations

import pytest

from llama.cli.chat import main as chat
from llama.cli.chat_commands import CHAT_COMMANDS
from llama.cli.complete import main as complete
from llama.cli.flags import flags_of, parse
from llama.cli.suggestions import ELSEWHERE, suggestion


@pytest.mark.parametrize(
    ("word", "flag"),
    [
        ("--max_tokens", "--max_gen_len"),
        ("--max-new-tokens", "--max_gen_len"),
        ("--temp", "--temperature"),
        ("--model", "--ckpt_dir"),
        ("-m", "--ckpt_dir"),
        ("-p", "--prompt"),
        ("--stop-strings", "--stop"),
        ("--grammar-file", "--grammar"),
        ("--top_logprob", "--top_logprobs"),
        ("--propmt", "--prompt"),
    ],
)
def test_a_flag_of_another_program_is_answered_with_the_one_here(word: str, flag: str) -> None:
    """--max_tokens was answered with --min_tokens, and -m with nothing."""
    with pytest.raises(ValueError, match=rf"{word}.*: did you mean {flag}\?$"):
        parse(complete, [word, "3"])


def test_what_is_like_nothing_has_no_suggestion() -> None:
    assert suggestion("n_gpu_layers", flags_of(complete)) is None
    assert suggestion("/wxyz", CHAT_COMMANDS) is None


def test_every_name_that_is_suggested_exists() -> None:
    assert set(ELSEWHERE.values()) <= {*flags_of(complete), *flags_of(chat), *CHAT_COMMANDS}
