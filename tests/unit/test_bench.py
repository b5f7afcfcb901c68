"""What `llama bench` measures is work that is done."""

from __future__ import annotations

from pathlib import Path

from llama.cli.bench import measure, random_prompts
from tests.models import build


def test_each_run_computes_a_whole_prompt(tiny_folder: Path) -> None:
    """All runs once had one prompt, which the cache then had: prefill came out at 15,000 tokens a second."""
    llm = build(tiny_folder, max_seq_len=64)
    llm.tokenizer.stop_tokens = frozenset()
    prompts = random_prompts(4, 40, vocab_size=256)
    for prompt in prompts:
        measure(llm, prompt, 2)
    assert llm.metrics.prompt_tokens == 4 * 40
    assert prompts == random_prompts(4, 40, vocab_size=256)
