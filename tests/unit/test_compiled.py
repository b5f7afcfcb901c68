"""Layers run by what torch compiles are the model's own, and a compiler that fails ends nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.backends.inductor import InductorBackend
from llama.config import ModelArgs
from llama.model import Transformer
from tests.checkpoints import random_state
from tests.models import random_tokens, transformer

pytestmark = pytest.mark.slow

ARGS = ModelArgs(dim=48, n_layers=1, n_heads=6, n_kv_heads=2, vocab_size=64, hidden_dim=72, sliding_window=7)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What torch has compiled is kept by code, which tests share."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps(model: Transformer) -> list[Tensor]:
    """Logits of prompts of two lengths, and of one token after another, for more rows and then for fewer."""
    cache = model.new_cache(3, 32)
    tokens = random_tokens(3, 20, vocab_size=ARGS.vocab_size)
    start_pos = torch.tensor([5, 3, 5])
    found = [model(tokens[:, :5], torch.zeros(3, dtype=torch.long), cache)]
    for step in range(4):
        rows = 3 if step < 2 else 2
        found.append(model(tokens[:rows, 5 + step : 6 + step], start_pos[:rows] + step, cache))
    return found


def broken(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no\ncompiler here")


@torch.inference_mode()
def test_compiled_steps_give_the_models_own_logits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llama")
    model = transformer(ARGS, random_state(ARGS))
    expected = steps(model)
    InductorBackend(model.device, "aot_eager").bind(model)
    for found, plain in zip(steps(model), expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
    assert [record.getMessage().split(" in ")[0] for record in caplog.records] == [
        "compiling the decode step: a minute or so the first time, seconds from the cache",
        "compiled the decode step",
    ]


@torch.inference_mode()
def test_a_compiler_that_fails_is_told_once_and_the_layers_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    model = transformer(ARGS, random_state(ARGS))
    expected = steps(model)
    InductorBackend(model.device, broken).bind(model)  # type: ignore[arg-type]  # torch takes functions, too
    for found, plain in zip(steps(model), expected, strict=True):
        assert torch.equal(found, plain)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith("--compile failed, so the layers run as they are: ")
    assert "no compiler here" in record.getMessage()
