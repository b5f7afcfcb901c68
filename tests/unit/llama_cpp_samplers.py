"""Writes llama_cpp_samplers.json, what llama.cpp's samplers give, which test_filters.py and test_history.py read.

With llama-cpp-python 0.3.36 and the demo model, whose vocabulary DRY's breakers need:
`python tests/unit/llama_cpp_samplers.py FILE.gguf`.
"""

from __future__ import annotations

import ctypes
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import llama_cpp as lc

OUT = Path(__file__).with_suffix(".json")
TEXTS = {
    "a list": "- one apple\n- one pear\n- one",
    "a passage": "The cat sat on the mat and the cat sat on the mat and the cat sat on the",
    "a colon": "Tom said yes: Tom said yes: Tom said",
    "the same again": " no no no no no no no",
    "nothing": "Every word here is another.",
    "code": "x = f(x, y)\ny = f(x, y)\nz = f(x,",
}

# Of DRY: dry_allowed_length, dry_base, dry_last_n, and breakers beside its own, one of them of two tokens.
DRY: list[tuple[int, float, int, list[str]]] = [
    (2, 1.75, 500, []), (1, 1.2, 500, []), (3, 2.0, 8, []), (2, 1.5, 500, [" sat on"]),
]  # fmt: skip


def applied(samplers: list[Any], logits: list[float]) -> dict[int, float]:
    """Return the tokens that samplers leave, with their logits."""
    data = (lc.llama_token_data * len(logits))(*[lc.llama_token_data(i, x, 0.0) for i, x in enumerate(logits)])
    array = lc.llama_token_data_array(data, len(logits), -1, False)
    for sampler in samplers:
        lc.llama_sampler_apply(sampler, ctypes.byref(array))
        lc.llama_sampler_free(sampler)
    return {array.data[i].id: array.data[i].logit for i in range(array.size)}


def fed(sampler: Any, tokens: list[int]) -> Any:
    for token in tokens:
        lc.llama_sampler_accept(sampler, token)
    return sampler


def filters(rng: random.Random) -> dict[str, Any]:
    given = [
        {"top_k": 7, "top_p": 1.0},
        {"top_k": 30, "top_p": 0.9},
        {"top_p": 0.7, "min_p": 0.05},
        {"top_p": 1.0, "min_p": 0.2},
        {"top_p": 1.0, "typical_p": 0.4},
        {"top_k": 50, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.8},
        {"top_p": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.08},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "xtc_probability": 1.0, "xtc_threshold": 0.05},
    ]
    rows: list[list[float]] = []
    cases = []
    for spread in (1.0, 3.0):
        logits = [round(spread * rng.gauss(0, 1), 2) + i * 1e-4 for i in range(120)]
        rows.append(logits)
        for temperature in (0.7, 1.2):
            for params in given:
                chain = [lc.llama_sampler_init_temp(temperature)]
                if params.get("top_k"):
                    chain.append(lc.llama_sampler_init_top_k(params["top_k"]))
                chain.append(lc.llama_sampler_init_top_p(params["top_p"], 1))
                chain.append(lc.llama_sampler_init_min_p(params.get("min_p", 0.0), 1))
                chain.append(lc.llama_sampler_init_typical(params.get("typical_p", 1.0), 1))
                xtc = params.get("xtc_probability", 0.0), params.get("xtc_threshold", 0.1)
                chain.append(lc.llama_sampler_init_xtc(*xtc, 1, 1))
                kept = sorted(applied(chain, logits))
                row = len(rows) - 1
                cases.append({"row": row, "params": {"temperature": temperature, **params}, "kept": kept})
    return {"rows": rows, "cases": cases}


def penalties(rng: random.Random) -> list[dict[str, Any]]:
    cases = []
    for last_n, repetition, presence, frequency in [
        (None, 1.3, 0.0, 0.0), (None, 1.0, 0.5, 0.3), (None, 1.2, -0.4, 0.1), (9, 1.5, 0.7, 0.2), (0, 1.5, 0.7, 0.2),
    ]:  # fmt: skip
        logits = [round(rng.gauss(0, 2), 3) for _ in range(30)]
        prompt, completion = ([rng.randrange(15) for _ in range(n)] for n in (10, 7))
        window = len(prompt + completion) if last_n is None else last_n
        of_completion = completion[max(0, len(completion) - window) :]
        first = lc.llama_sampler_init_penalties(len(logits), window, repetition, 0.0, 0.0)
        second = lc.llama_sampler_init_penalties(len(logits), len(of_completion), 1.0, frequency, presence)
        left = applied([fed(first, prompt + completion), fed(second, of_completion)], logits)
        names = {"penalty_last_n": last_n, "repetition_penalty": repetition}
        names |= {"presence_penalty": presence, "frequency_penalty": frequency}
        result = [left[i] for i in range(len(logits))]
        cases.append({"logits": logits, "prompt": prompt, "completion": completion, "params": names, "result": result})
    return cases


def dry(vocab: Any) -> list[dict[str, Any]]:
    n_vocab, cases = lc.llama_vocab_n_tokens(vocab), []
    breakers = ["\n", ":", '"', "*"]
    for text in TEXTS.values():
        raw, buffer = text.encode(), (lc.llama_token * 200)()
        tokens = list(buffer[: lc.llama_tokenize(vocab, raw, len(raw), buffer, 200, False, False)])
        for length, base, last_n, extra in DRY:
            given = [each.encode() for each in breakers + extra]
            c_breakers = (ctypes.c_char_p * len(given))(*given)
            sampler = lc.llama_sampler_init_dry(vocab, 0.8, base, length, last_n, c_breakers, len(given))
            left = applied([fed(sampler, tokens)], [0.0] * n_vocab)
            params: dict[str, Any] = {
                "dry_multiplier": 0.8,
                "dry_base": base,
                "dry_allowed_length": length,
                "dry_last_n": last_n,
            }
            params["dry_breakers"] = breakers + extra
            penalties = {token: -x for token, x in left.items() if x}
            assert all(map(math.isfinite, penalties.values()))
            cases.append({"tokens": tokens, "params": params, "penalties": penalties})
    return cases


def main(model_file: str) -> None:
    params = lc.llama_model_default_params()
    params.vocab_only = True
    vocab = lc.llama_model_get_vocab(lc.llama_model_load_from_file(model_file.encode(), params))
    of_dry = dry(vocab)
    texts = {}
    for token in sorted({token for case in of_dry for token in case["tokens"]}):
        piece = ctypes.create_string_buffer(64)
        n = lc.llama_token_to_piece(vocab, token, piece, 64, 0, True)
        texts[token] = piece.raw[:n].decode()
    rng = random.Random(14)
    found = {"filters": filters(rng), "penalties": penalties(rng), "dry": of_dry, "texts": texts}
    OUT.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
