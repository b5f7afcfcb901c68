"""Texts do not depend on what the caller has set in torch, before or after the model is built."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from llama import Llama
from llama.backends.cpu.build import library
from llama.config import ModelArgs
from llama.rope import Rotary
from llama.rope_scaling import DynamicScaling
from tests.checkpoints import BYTE_VOCAB_SIZE, random_state, write_byte_tokenizer
from tests.gguf_files import write_gguf_model
from tests.models import BYTE_BOS, build

ARGS = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=BYTE_VOCAB_SIZE, hidden_dim=96)
# One prompt is longer than what the kernels take in one pass over the weights.
PROMPTS = [[BYTE_BOS, *b"a prompt of more than sixteen tokens"], [BYTE_BOS, *b"two"]]

Said = tuple[list[list[list[int]]], list[float]]


@contextlib.contextmanager
def restored(set_value: Callable[..., object], value: object, old: object) -> Iterator[None]:
    set_value(value)
    try:
        yield
    finally:
        set_value(old)


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    **{
        f"default dtype {dtype}": lambda dtype=dtype: restored(torch.set_default_dtype, dtype, torch.float32)  # type: ignore[misc]
        for dtype in (torch.bfloat16, torch.float16, torch.float64)
    },
    "default device": lambda: restored(torch.set_default_device, "meta", None),
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
    "inference": torch.inference_mode,
    "deterministic": lambda: restored(torch.use_deterministic_algorithms, True, False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "matmul precision": lambda: restored(torch.set_float32_matmul_precision, "medium", "highest"),
    "threads": lambda: restored(torch.set_num_threads, 3, torch.get_num_threads()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in blocks, with an embedding that is not tied."""
    path = tmp_path_factory.mktemp("settings")
    write_gguf_model(path / "m.gguf", ARGS, random_state(ARGS), GGMLQuantizationType.Q8_0)
    write_byte_tokenizer(path)
    return path


@pytest.fixture(scope="module", params=["kernels", "no kernels"])
def expected(request: pytest.FixtureRequest, folder: Path) -> Iterator[Said]:
    """What a model says under torch's own settings, with the kernels and without them."""
    with pytest.MonkeyPatch.context() as patch:
        library.cache_clear()
        if request.param == "no kernels":
            patch.setenv("LLAMA_KERNELS", "0")
        elif library() is None:
            pytest.skip("no C++ compiler here")
        yield said(load(folder))
    library.cache_clear()


def load(folder: Path) -> Llama:
    """Quantized, so that scales are searched and packed, and in the dtype that is the default."""
    return build(folder / "m.gguf", tokenizer_path=folder / "tokenizer.model", dtype=None, quantize="int4")


def said(llm: Llama) -> Said:
    """Tokens chosen greedily and drawn, and log-probabilities, also those of the prompts."""
    greedy, scores = llm.generate(PROMPTS, 6, temperature=0, logprobs=True, echo=True)
    drawn, _ = llm.generate(PROMPTS, 6, temperature=0.9, top_p=0.95, seed=5)
    assert scores is not None
    return [greedy, drawn], [score for row in scores for score in row]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", SETTINGS)
def test_texts_do_not_depend_on_torchs_settings(folder: Path, expected: Said, name: str, when: str) -> None:
    """A default dtype of 16 bits, as Meta's loader sets one, once made C++ write beyond the ends of buffers; float64
    drew other random numbers, and autocast computed in bfloat16.
    """
    llm = load(folder) if when == "after" else None
    with SETTINGS[name]():
        tokens, scores = said(llm or load(folder))
    assert tokens == expected[0]
    assert scores == pytest.approx(expected[1], abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rotations_do_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    """Quotients of integers, which dynamic scaling takes of lengths, have torch's default dtype."""
    rotary = Rotary(16, 10000.0, DynamicScaling(factor=3.0, old_context_len=7))
    positions = torch.arange(20)
    expected = rotary(positions)
    with restored(torch.set_default_dtype, dtype, torch.float32):
        assert torch.equal(rotary(positions), expected)
