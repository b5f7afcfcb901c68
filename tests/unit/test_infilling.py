"""Code Llama's infilling: prompts as Meta's code makes them, and results that fit between prefix and suffix."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from llama import Llama
from llama.chat.infilling import can_infill, infilling_prompt_tokens
from llama.config import ModelArgs
from llama.tokenizer import Tokenizer
from tests.checkpoints import write_meta
from tests.conftest import TEXTS
from tests.models import build

MARKERS = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "example_text_completion.py"
ARGS = ModelArgs(dim=32, n_layers=2, n_heads=4, vocab_size=420, multiple_of=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Code Llama with random weights, whose tokenizer knows the markers."""
    folder = tmp_path_factory.mktemp("codellama")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=ARGS.vocab_size,
        byte_fallback=True,
        user_defined_symbols=MARKERS,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    write_meta(folder, ARGS)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Llama:
    return build(folder)


@pytest.mark.parametrize("suffix_first", [False, True])
@pytest.mark.parametrize(
    ("prefix", "suffix"), [("Hello", " world, how"), ("the quick", "fox"), ("", "lazy"), ("a", "")]
)
def test_prompts_are_those_of_metas_code(folder: Path, prefix: str, suffix: str, suffix_first: bool) -> None:
    """The suffix has no space put before it: Meta encodes a smile with it, and drops the smile's two tokens."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pre, suf, mid, _ = (reference.piece_to_id(marker) for marker in MARKERS)
    smile = len(reference.encode("☺"))
    after = reference.encode("☺" + suffix)[smile:]
    before, bos = reference.encode(prefix), reference.bos_id()
    expected = [bos, pre, suf, *after, mid, *before] if suffix_first else [bos, pre, *before, suf, *after, mid]
    assert infilling_prompt_tokens(Tokenizer(folder / "tokenizer.model"), prefix, suffix, suffix_first) == expected


@pytest.mark.slow
def test_a_filled_text_is_prefix_generation_and_suffix(llm: Llama) -> None:
    prefixes, suffixes = ["Hello", "The quick"], [" world", " dog"]
    results = llm.text_infilling(prefixes, suffixes, 0.8, 0.9, 12, True, seed=5)
    prompts = [infilling_prompt_tokens(llm.tokenizer, *pair) for pair in zip(prefixes, suffixes, strict=True)]
    steps = list(llm.stream(prompts, 12, 0.8, seed=5))
    for row, result in enumerate(results):
        assert result["generation"] == "".join(step.text for step in steps if step.index == row)
        assert result["full_text"] == prefixes[row] + result["generation"] + suffixes[row]
        assert len(result["tokens"]) == len(result["logprobs"]) > 0
        assert result["finish_reason"] in ("stop", "length")
    swapped = llm.text_infilling(prefixes, suffixes, 0.8, 0.9, 12, suffix_first=True, seed=5)
    assert [result["generation"] for result in swapped] != [result["generation"] for result in results]


def test_the_end_of_the_gap_ends_a_generation(llm: Llama) -> None:
    assert llm.tokenizer.special_tokens["▁<EOT>"] in llm.tokenizer.stop_tokens


def test_models_without_the_markers_say_so(llama: Llama) -> None:
    assert not can_infill(llama.tokenizer)
    with pytest.raises(ValueError, match="infilling needs the tokens ▁<PRE>"):
        llama.text_infilling(["a"], ["b"])


def test_every_prefix_needs_a_suffix(llm: Llama) -> None:
    with pytest.raises(ValueError, match="every prefix needs a suffix, got 2 and 1"):
        llm.text_infilling(["a", "b"], ["c"])


def test_a_single_text_is_not_taken_for_a_list_of_characters(llm: Llama) -> None:
    """Two texts of one length were filled letter by letter."""
    with pytest.raises(ValueError, match="prefixes must be a list of texts, got 'ab': put it in a list"):
        llm.text_infilling("ab", "cd")
    with pytest.raises(ValueError, match="suffixes must be a list of texts, number 0 is 5"):
        llm.text_infilling(["ab"], [5])  # type: ignore[list-item]


@pytest.mark.slow
def test_a_mark_on_the_command_line_is_filled(folder: Path, llm: Llama) -> None:
    command = [sys.executable, EXAMPLE, "--ckpt_dir", folder, "--dtype", "float32", "--temperature", "0", "--json"]
    flags = ["--max_gen_len", "6", "--device", "cpu"]
    done = subprocess.run([*command, *flags, "--prompt", "Hello<FILL> world"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = llm.text_infilling(["Hello"], [" world"], temperature=0, max_gen_len=6)[0]
    assert json.loads(done.stdout) == {"prompt": "Hello<FILL> world", **expected}
    done = subprocess.run([*command, *flags, "--prompt", "<FILL>a<FILL>"], capture_output=True, text=True)
    assert done.returncode == 1 and "has 2 marks <FILL>: each needs exactly one" in done.stderr


@pytest.mark.slow
def test_code_llamas_example_fills_its_texts(folder: Path) -> None:
    """Under Meta's name and flags, the first two also as plain words."""
    command = [sys.executable, ROOT / "example_infilling.py", folder, folder / "tokenizer.model", "--device", "cpu"]
    flags = ["--temperature", "0.0", "--top_p", "0.9", "--max_seq_len", "256", "--max_gen_len", "8"]
    done = subprocess.run([*command, *flags, "--max_batch_size", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *texts = done.stdout.split("\n================= Prompt text =================\n\n")
    assert first == "" and len(texts) >= 2
    for text in texts:
        prompt, filled = text.split("\n================= Filled text =================\n\n")
        prefix, suffix = prompt.split("<FILL>")
        assert filled.startswith(prefix) and filled.endswith(suffix)
