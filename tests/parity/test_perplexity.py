"""`llama perplexity` against transformers, window by window."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.cli import perplexity
from llama.engine.options import BuildOptions
from tests.checkpoints import TINY
from tests.hugging_face import hugging_face_model
from tests.models import BYTE_BOS

pytestmark = pytest.mark.slow

# Figures in docs/benchmarks.md are of this text: with another one they would have to be measured again.
SHA256 = "1d02c76d1b0e07e0aba1f556eceddbfea1d713cfe05d16db8c02acc93136dc60"


@torch.inference_mode()
def expected(model: Any, windows: list[list[int]]) -> tuple[float, int]:
    """Perplexity, and how many tokens were scored."""
    total, n_scored = 0.0, 0
    for window in windows:
        logits = model(torch.tensor([window])).logits[0].double()
        for position, token in enumerate(window[1:]):
            row = logits[position]
            total += float(torch.log(torch.exp(row - row.max()).sum()) + row.max() - row[token])
            n_scored += 1
    return math.exp(total / n_scored), n_scored


def measured(capsys: pytest.CaptureFixture[str], ckpt_dir: Path, **options: Any) -> dict[str, float]:
    perplexity.main(BuildOptions(ckpt_dir, device="cpu", dtype="float32"), json=True, **options)
    result: dict[str, float] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize(("window", "length"), [(7, 45), (7, 43), (40, 39), (2, 5)], ids=str)
def test_perplexity_equals_transformers(
    tiny: tuple[Path, dict[str, Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    window: int,
    length: int,
) -> None:
    """A last window that is shorter weighs by its tokens; a window's BOS takes one of its places and no score."""
    folder, state = tiny
    text = "Wörter, no two windows alike: 0123456789 abcdefghijklm".encode()[:length]
    (tmp_path / "text").write_bytes(text)
    step = window - 1
    windows = [[BYTE_BOS, *text[i : i + step]] for i in range(0, length, step)]
    wanted, n_scored = expected(hugging_face_model(TINY, state), windows)
    found = measured(capsys, text=tmp_path / "text", ckpt_dir=folder, window=window)
    assert found["perplexity"] == pytest.approx(wanted, rel=1e-4)
    assert (found["tokens"], found["windows"]) == (n_scored, len(windows)) == (length, -(-length // step))


def test_the_text_that_is_scored_by_default_never_changes() -> None:
    """It once was made of README and design notes, so that no figure could be compared with an older one."""
    assert hashlib.sha256(perplexity.TEXT.read_bytes()).hexdigest() == SHA256


def test_without_a_text_the_pinned_one_is_scored(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"ckpt_dir": tiny_folder, "window": 50, "max_tokens": 120}
    assert measured(capsys, **options) == measured(capsys, text=perplexity.TEXT, **options)
