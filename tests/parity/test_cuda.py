"""A CUDA device computes what the CPU does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama import Llama
from llama.backends.cuda.backend import CudaBackend
from llama.config import ModelArgs
from llama.distributed.device import choose_dtype
from llama.engine.speculative import DraftLengthController
from tests.checkpoints import BYTE_VOCAB_SIZE, TINY, write_meta

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

PROMPTS = [[7, 8, 9, 10, 11], [300], [5] * 17]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    write_meta(folder, TINY, shards=2)
    return folder


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Llama, Llama]:
    return tuple(Llama.build(folder, device=device, dtype="float32") for device in ("cpu", "cuda"))  # type: ignore[return-value]


def test_logits_on_cuda_equal_those_on_the_cpu(both: tuple[Llama, Llama]) -> None:
    logits = []
    for llm in both:
        tokens = torch.arange(3 * 7, device=llm.model.device).view(3, 7)
        start_pos = torch.zeros(3, dtype=torch.long, device=llm.model.device)
        with torch.inference_mode():
            logits.append(llm.model(tokens, start_pos, llm.model.new_cache(3, 7)).cpu())
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_and_logprobs_on_cuda_equal_those_on_the_cpu(both: tuple[Llama, Llama], temperature: float) -> None:
    """Random numbers were once drawn on the device, whose generator is another."""
    (cpu_tokens, cpu_scores), (cuda_tokens, cuda_scores) = (
        llm.generate(PROMPTS, 24, temperature, logprobs=True, echo=True, seed=3) for llm in both
    )
    assert cuda_tokens == cpu_tokens
    for cuda_row, cpu_row in zip(cuda_scores or [], cpu_scores or [], strict=True):
        assert cuda_row == pytest.approx(cpu_row, abs=1e-4)


def test_cuda_is_chosen_and_computes_in_bfloat16(folder: Path) -> None:
    llm = Llama.build(folder)
    assert llm.model.device.type == "cuda"
    assert llm.model.norm.weight.dtype == choose_dtype(None, llm.model.device, torch.float32)
    assert all(tensor.device == llm.model.device for tensor in [*llm.model.parameters(), *llm.model.buffers()])


def test_one_rank_of_torchrun_gets_nccl(folder: Path) -> None:
    code = (
        "import sys; from llama import Llama; import torch.distributed as dist;"
        "llm = Llama.build(sys.argv[1]); print(dist.get_backend(llm.model.parallel.group), dist.get_backend());"
        "dist.destroy_process_group()"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--no-python", sys.executable]
    done = subprocess.run(
        [*command, "-c", code, str(folder)], capture_output=True, text=True, env=os.environ, check=True
    )
    assert done.stdout.split() == ["nccl", "gloo"]


def test_more_ranks_than_cuda_devices_end_in_one_line(folder: Path) -> None:
    ranks = torch.cuda.device_count() + 1
    example = str(Path(__file__).parents[2] / "example_text_completion.py")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", example]
    done = subprocess.run([*command, "--ckpt_dir", str(folder), "--device=cuda"], capture_output=True, text=True)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {ranks} ranks on this host, but {ranks - 1} CUDA devices: start {ranks - 1}, or use --device cpu"
    ]


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"quantize": "int4"}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_graphs_give_the_tokens_of_steps_that_are_not_recorded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], temperature: float
) -> None:
    """Rows end apart; the second batch runs on the graphs of the first."""
    llm = Llama.build(folder, dtype="float32", **options)  # type: ignore[arg-type]
    graphed = [llm.generate(prompts, 24, temperature, logprobs=True, seed=3) for prompts in (PROMPTS, PROMPTS[1:])]
    assert llm.engine.room.runners[0].runs_ahead
    monkeypatch.setattr(CudaBackend, "captures_graphs", False)
    plain = Llama(llm.model, llm.tokenizer)
    for (tokens, scores), prompts in zip(graphed, (PROMPTS, PROMPTS[1:]), strict=True):
        expected, wanted = plain.generate(prompts, 24, temperature, logprobs=True, seed=3)
        assert tokens == expected
        for row, other in zip(scores or [], wanted or [], strict=True):
            assert row == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("way", [{"speculate": "lookup"}, {"draft": True}], ids=str)
def test_guesses_on_cuda_change_no_token(
    folder: Path, monkeypatch: pytest.MonkeyPatch, way: dict[str, str | bool]
) -> None:
    monkeypatch.setattr(DraftLengthController, "next_draft_len", lambda self: 5)
    prompt = [[7, 8, 9, 10] * 6]
    expected = Llama.build(folder).generate(prompt, 40, temperature=0.2, seed=1)
    options = {"draft_ckpt_dir": folder} if way.get("draft") else {"speculate": "lookup"}
    llm = Llama.build(folder, **options)  # type: ignore[arg-type]
    assert llm.generate(prompt, 40, temperature=0.2, seed=1) == expected
    assert llm.metrics.proposed > 0


def test_one_graph_serves_all_temperatures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read on the device."""
    llm = Llama.build(folder, dtype="float32")
    ways = [(0.8, 0.9), (0.3, 0.5), (1.5, 0.99)]
    found = [llm.generate(PROMPTS, 12, temperature, top_p, seed=5) for temperature, top_p in ways]
    monkeypatch.setattr(CudaBackend, "captures_graphs", False)
    plain = Llama(llm.model, llm.tokenizer)
    assert found == [plain.generate(PROMPTS, 12, temperature, top_p, seed=5) for temperature, top_p in ways]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_heads_of_any_size_complete_prompts_of_any_length(tmp_path: Path, dtype: str) -> None:
    """Torch's flash attention pads a head of 100 to 104, and its result has gaps; more rows than 8 go to cuBLAS."""
    args = ModelArgs(dim=300, n_layers=2, n_heads=3, n_kv_heads=1, vocab_size=BYTE_VOCAB_SIZE, multiple_of=32)
    write_meta(tmp_path, args)
    llm = Llama.build(tmp_path, dtype=dtype, max_seq_len=600)
    exact = Llama.build(tmp_path, dtype="float32", device="cpu", max_seq_len=600)
    prompts = [[5 + i] * (3 + 13 * i) for i in range(12)]
    found, scores = llm.generate(prompts, 1, temperature=0, logprobs=True, echo=True)
    _, wanted = exact.generate(prompts, 1, temperature=0, logprobs=True, echo=True)
    for row, other, prompt in zip(scores or [], wanted or [], prompts, strict=True):
        assert row[: len(prompt)] == pytest.approx(other[: len(prompt)], abs=0.1)
    assert [len(row) for row in llm.generate(prompts, 300, temperature=0)[0]]  # beyond 256 positions


def test_a_conversation_goes_on_when_its_cache_grows(folder: Path) -> None:
    llm = Llama.build(folder, dtype="float32", max_seq_len=600)
    turns = [[7, 8, 9] * 20, [7, 8, 9] * 90, [7, 8, 9] * 180]
    for turn in turns:
        said = [step.token for step in llm.stream([turn], 9, temperature=0)]
        fresh = Llama(llm.model, llm.tokenizer)
        assert said == [step.token for step in fresh.stream([turn], 9, temperature=0)]
    assert llm.metrics.reused_tokens > 0
