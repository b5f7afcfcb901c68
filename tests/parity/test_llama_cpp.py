"""The demo model at its own 4 bits says what llama.cpp says with the same weights.

llama_cpp_greedy.json was made with llama-cpp-python 0.3.36 from the demo file turned into fp32 by its own
llama_model_quantize (ftype ALL_F32, the same values), with an fp32 cache: the greedy tokens of each prompt, and the
lead of each over the next best. On Q4_1 itself llama.cpp rounds activations to 8 bits, which moves logits by up to 0.3.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama import Llama

pytestmark = pytest.mark.slow

CASES = json.loads((Path(__file__).parent / "llama_cpp_greedy.json").read_text(encoding="utf-8"))
NEAR_TIE = 0.05


@pytest.fixture(scope="module")
def llm(demo_model: Path) -> Llama:
    return Llama.build(demo_model, max_seq_len=128, dtype="float32", device="cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["prompt"][:20])
def test_greedy_tokens_are_llama_cpps_up_to_a_near_tie(llm: Llama, case: dict[str, Any]) -> None:
    sure = next((i for i, lead in enumerate(case["gaps"]) if lead < NEAR_TIE), len(case["gaps"]))
    expected = [token for token in case["generated"][:sure] if token not in llm.tokenizer.stop_tokens]
    tokens, _ = llm.generate(llm.encode_prompts([case["prompt"]]), len(case["generated"]), temperature=0)
    assert expected and tokens[0][: len(expected)] == expected
