"""`llama bench --compare`: what it prints of several systems, never how fast anything is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.checkpoints import TINY, random_state
from tests.e2e.processes import llama

pytestmark = pytest.mark.slow

FIGURES = {"prefill_tok_s", "ttft_s", "decode_tok_s", "bandwidth_gb_s", "bytes_per_token", "peak_mib"}
OF_A_SYSTEM = FIGURES | {"system", "weights", "weight_bytes"}
RATIOS = {"decode_ratio", "prefill_ratio"}
NEEDS_LLAMA_CPP = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama_cpp is not installed: pip install '.[bench]'"
)


def test_a_comparison_has_the_figures_of_all_systems_and_their_ratios(tiny_folder: Path) -> None:
    """transformers reads the same weights, of any format, so that its tokens read as many bytes."""
    sizes = ("--prompt_len", "160", "--gen_len", "5", "--batch_size", "2", "--runs", "1", "--device", "cpu")
    compared = ("--compare", "transformers", "--dtype", "float32", "--json")
    (found,) = llama("bench", "--ckpt_dir", tiny_folder, *sizes, *compared).json_lines
    about_the_run = {"machine", "date", "device", "threads", "ckpt_dir", "prompts", "prompt_len", "gen_len"}
    about_the_run |= {"batch_size", "runs", "read_gb_s", "dtype", "peers"}
    assert found.keys() == OF_A_SYSTEM | about_the_run
    (peer,) = found["peers"]
    assert peer.keys() == OF_A_SYSTEM | RATIOS
    systems = [(each["system"], each["weights"]) for each in (found, peer)]
    assert systems == [("ours", "fp32"), ("transformers", "fp32")]
    weights = sum(tensor.nbytes for name, tensor in random_state(TINY).items() if name != "tok_embeddings.weight")
    assert found["weight_bytes"] == peer["weight_bytes"] == weights
    assert found["bytes_per_token"] == weights / 2  # two rows a step
    assert peer["decode_ratio"] == [found["decode_tok_s"] / peer["decode_tok_s"]] * 3


@NEEDS_LLAMA_CPP
def test_llama_cpp_gives_the_same_figures(demo_model: Path) -> None:
    sizes = ("--prompt_len", "80", "--gen_len", "4", "--runs", "1", "--device", "cpu")
    done = llama("bench", "--ckpt_dir", demo_model, "--compare", "llama_cpp", *sizes, "--copy", "--json")
    (peer,) = json.loads(done.stdout)["peers"]
    assert peer.keys() == OF_A_SYSTEM | RATIOS | {"copied_percent"}
    assert peer["weights"] == "Q4_1"
