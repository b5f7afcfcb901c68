"""`llama perplexity` on the real demo model, on several ranks, and on what it cannot score."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama.checkpoint import open_checkpoint
from llama.checkpoint.export.tokenizer import tokenizer_source
from llama.checkpoint.export.writer import write_checkpoint, writer
from llama.cli import perplexity
from llama.engine.options import BuildOptions
from tests.e2e.processes import LLAMA, torchrun
from tests.parity.test_perplexity import expected, measured

pytestmark = pytest.mark.slow

TEXT = perplexity.TEXT


def test_the_demo_models_perplexity_equals_transformers(
    demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo model's tokenizer has no BOS: the first token of each window is not scored."""
    checkpoint = open_checkpoint(demo_model)
    made = writer(checkpoint, tokenizer_source(checkpoint), "hf", dtype="float32")
    write_checkpoint(made, tmp_path / "model", lambda n_bytes: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = checkpoint.tokenizer().encode(TEXT.read_bytes().decode(), bos=False, eos=False)
    windows = [tokens[i : i + 64] for i in (0, 64)] + [tokens[128:131]]
    wanted, n_scored = expected(model, windows)
    found = measured(capsys, ckpt_dir=demo_model, window=64, max_tokens=131)
    assert found["perplexity"] == pytest.approx(wanted, rel=1e-3)
    assert (found["tokens"], found["windows"]) == (n_scored, 3) == (63 + 63 + 2, 3)


def test_ranks_print_one_result_and_it_is_that_of_one_process(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--ckpt_dir", tiny_folder, "--window", 50, "--max_tokens", 120, "--json")
    done = torchrun(2, *LLAMA, "perplexity", *flags, "--device", "cpu", "--dtype", "float32")
    (found,) = done.json_lines
    alone = measured(capsys, ckpt_dir=tiny_folder, window=50, max_tokens=120)
    assert found == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"", {}, "text is empty"),
        (b"a\n\xff", {}, "not UTF-8 from byte 2"),
        (b"a text", {"window": 1}, "--window must be at least 2"),
        (b"a text", {"max_tokens": 1}, "--max_tokens must be at least 2"),
    ],
    ids=["empty", "latin-1", "window", "max_tokens"],
)
def test_what_cannot_be_scored_says_so(content: bytes, options: dict[str, int], words: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        perplexity.main(BuildOptions("/nowhere"), text=tmp_path / "text", **options)


def test_a_text_of_one_token_has_no_perplexity_without_bos(demo_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a")
    with pytest.raises(ValueError, match="text has 1 token: the first cannot be scored"):
        perplexity.main(BuildOptions(demo_model, device="cpu", dtype="bfloat16"), text=tmp_path / "text")
