"""Checkpoints that many tests share: tiny ones, written once a session and never again, and the demo model."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import sentencepiece
import torch
from torch import Tensor

from llama import Llama
from llama.config import ModelArgs
from llama.hub import demo
from tests.checkpoints import write_meta
from tests.models import build

# Read when triton is imported: without a GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Workers of pytest-xdist share the cores, and threads of several that wait for each other take them from one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# For trained tokenizers: words that tests use, and characters that need several bytes.
TEXTS = [
    "Hello world, how are you today? I am fine, and what is the capital of France?",
    "The quick brown fox jumps over the lazy dog, user and assistant speak in turn.",
    "Zürich, naïve café, Привет, 你好，世界！",
    "[INST] <<SYS>> be brief <</SYS>> [/INST]",
]
SENTENCEPIECE_VOCAB_SIZE = 400
# Multi-head attention, and a vocabulary and a hidden size of Llama 2's kind.
TINY_LLAMA2 = ModelArgs(
    dim=32, n_layers=2, n_heads=4, vocab_size=SENTENCEPIECE_VOCAB_SIZE, multiple_of=16, max_seq_len=256
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU the tests of kernels are among those that `-m gpu` selects: there they run on it."""
    if torch.cuda.is_available():
        for item in items:
            if item.path.name.startswith("test_gpu_") and item.path.parent.name == "unit":
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The real model that scripts/test gets: tests that need it fail there without it, and are skipped elsewhere."""
    try:
        return demo.demo_model()
    except FileNotFoundError as error:
        if os.environ.get("LLAMA_REQUIRE_DEMO_MODEL"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder with one shard of Llama 3's kind (a token is a byte), and its whole tensors."""
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_meta(folder)


@pytest.fixture(scope="session")
def tiny_folder(tiny: tuple[Path, dict[str, Tensor]]) -> Path:
    return tiny[0]


@pytest.fixture
def llama(tiny_folder: Path) -> Llama:
    """A model of its own for each test, because a model counts the rows that it has seeded."""
    return build(tiny_folder, max_seq_len=64, max_batch_size=4)


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    """A tokenizer.model of Llama 2's kind: BPE with bytes to fall back on and a space before the first word."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=SENTENCEPIECE_VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def llama2_folder(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: bytes) -> Path:
    """A folder of Llama 2's kind: SentencePiece, and embeddings split by feature over two shards."""
    folder = tmp_path_factory.mktemp("llama2")
    write_meta(folder, TINY_LLAMA2, shards=2, embedding_dim=1)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    return folder
