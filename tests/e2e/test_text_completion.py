"""example_text_completion.py on one process: what reaches the model, and what comes out where."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.e2e.processes import COMPLETION, Finished, prompts, python, started, without_notices

pytestmark = pytest.mark.slow

LOADED = re.compile(
    r"loaded \S+ in \d+\.\d\d s: 1 rank of \d+\.\d\d GB in \w+( and \w+)*, computing in \w+ on cpu by "
    r"(own kernels|torch's operations), threads: \d+"
)
REPORT = re.compile(
    r"prefill \d+ tokens at [\d.]+ tok/s; decode \d+ tokens at [\d.]+ tok/s, [\d.]+ GB/s of weights; "
    r"peak memory \d+ MiB; context: prompt 5 \+ completion 8 of \d+ tokens"
)
# What fire by itself turns into tuples, sets, numbers, flags or nothing, and what shells and encodings trip over.
VERBATIM = [
    "1,2",
    "None",
    "{a}",
    "True",
    "-5 + 3",
    "--x",
    "--",
    "--prompt",
    "",
    " two  spaces ",
    '["not json',
    "[1, 2]",
    "{'a': 1}",
    "1e3",
    "0x10",
    'it\'s "quoted" \\n',
    "two\nlines\n",
    "🙂 né 你好",
    "<|im_end|>",
    "a=b",
]


@pytest.fixture(scope="module")
def capital(demo_model: Path) -> Finished:
    flags = ["--temperature", "0", "--max_gen_len", "8", "--json"]
    return python(COMPLETION, "--prompt", "The capital of France is", *flags)


def test_json_gives_one_object_a_line_from_real_weights(capital: Finished) -> None:
    assert len(capital.json_lines) == 1
    (answer,) = capital.json_lines
    assert set(answer) == {"prompt", "generation", "tokens", "finish_reason"}
    assert answer["prompt"] == "The capital of France is"
    assert answer["generation"].startswith(" Paris")
    assert len(answer["tokens"]) == 8 and "".join(answer["tokens"]) == answer["generation"]
    assert answer["finish_reason"] == "length"


def test_stderr_says_what_was_loaded_and_what_it_cost_and_nothing_else(capital: Finished) -> None:
    loaded, report = capital.stderr.splitlines()
    assert LOADED.fullmatch(loaded), loaded
    assert REPORT.fullmatch(report), report


def test_prompts_reach_the_model_verbatim(demo_model: Path) -> None:
    """fire parses `1,2` into a tuple, `None` into nothing, and takes `-5 + 3` for a flag."""
    done = python(COMPLETION, *prompts(VERBATIM), "--echo", "--max_gen_len", "0", "--json")
    assert [answer["prompt"] for answer in done.json_lines] == VERBATIM
    # The model's tokens, decoded; an empty prompt is the begin token, and control tokens have no text.
    assert [answer["generation"] for answer in done.json_lines] == VERBATIM


def test_prompts_may_be_a_json_list_or_follow_an_equals_sign(tiny_folder: Path) -> None:
    texts = ["a,b", '["x"]', ""]
    flags = ["--prompt", json.dumps(texts), "--prompt=--json", "--max-gen-len=0", "--json=True"]
    done = python(COMPLETION, "--ckpt_dir", tiny_folder, *flags)
    assert [answer["prompt"] for answer in done.json_lines] == [*texts, "--json"]


def test_the_last_of_repeated_flags_counts_and_none_is_no_limit(tiny_folder: Path) -> None:
    flags = ["--max_gen_len", "3", "--max_gen_len", "None", "--max_seq_len", "16", "--temperature", "0", "--json"]
    (answer,) = python(COMPLETION, "--ckpt_dir", tiny_folder, "--prompt", "hello", *flags).json_lines
    assert len(answer["tokens"]) == 16 - 1 - len("hello")


def test_logprobs_come_for_every_token_when_asked_for(tiny_folder: Path) -> None:
    flags = ["--max_gen_len", "4", "--logprobs", "--echo", "--json"]
    (answer,) = python(COMPLETION, "--ckpt_dir", tiny_folder, "--prompt", "hello", *flags).json_lines
    assert len(answer["logprobs"]) == len(answer["tokens"]) == 1 + len("hello") + 4
    assert answer["logprobs"][0] == 0.0
    assert all(logprob < 0 for logprob in answer["logprobs"][1:])
    assert answer["tokens"][:6] == ["<|begin_of_text|>", *"hello"]


def test_text_output_is_what_people_know(demo_model: Path) -> None:
    """Meta's layout, with logprobs below each completion."""
    flags = ["--temperature", "0", "--max_gen_len", "2"]
    texts = ["The capital of France is", "Two\nlines"]
    plain = python(COMPLETION, *prompts(texts), *flags)
    answers = python(COMPLETION, *prompts(texts), *flags, "--logprobs", "--json").json_lines
    rule = "\n==================================\n\n"
    assert plain.stdout == "".join(f"{answer['prompt']}\n> {answer['generation']}\n{rule}" for answer in answers)
    with_logprobs = python(COMPLETION, *prompts(texts[:1]), *flags, "--logprobs").stdout
    lines = zip(answers[0]["tokens"], answers[0]["logprobs"], strict=True)
    scores = "".join(f"{logprob:10.4f}  {token!r}\n" for token, logprob in lines)
    assert with_logprobs == f"{texts[0]}\n> {answers[0]['generation']}\n{scores}{rule}"


def test_without_a_prompt_there_are_built_in_ones(tiny_folder: Path) -> None:
    answers = python(COMPLETION, "--ckpt_dir", tiny_folder, "--max_gen_len", "0", "--json").json_lines
    assert len(answers) >= 2
    assert answers[0]["prompt"] == "The capital of France is"


def test_more_prompts_than_the_batch_holds_come_in_order(tiny_folder: Path) -> None:
    texts = ["aaaa", "b", "cc", "dddddd", "e"]
    flags = [*prompts(texts), "--max_gen_len", "5", "--json", "--ckpt_dir", tiny_folder, "--dtype", "float32"]
    together = python(COMPLETION, *flags).json_lines
    assert [answer["prompt"] for answer in together] == texts
    assert python(COMPLETION, *flags, "--max_batch_size", "2").json_lines == together


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_a_closed_pipe_ends_quietly(tiny_folder: Path, flags: list[str]) -> None:
    """`| head -1` once ended in a traceback."""
    arguments = [COMPLETION, "--ckpt_dir", tiny_folder, "--max_gen_len", "1", *flags]
    with started([sys.executable, *arguments]) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        stderr = without_notices(process.stderr.read())
        assert process.wait() == 0
    assert [line.split()[0] for line in stderr.splitlines() if not line.startswith("prefill")] == ["loaded"], stderr


def test_help_names_every_flag_once_and_loads_nothing() -> None:
    done = python(COMPLETION, "--ckpt_dir", "/nowhere", "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("usage: example_text_completion.py ")
    flags = re.findall(r"^  --(\w+)", done.stdout, re.MULTILINE)
    assert sorted(flags) == sorted(
        [
            *("ckpt_dir", "tokenizer_path", "prompt", "max_seq_len", "max_batch_size", "max_gen_len", "temperature"),
            *("top_p", "seed", "device", "dtype", "quantize", "imatrix", "lora", "compile", "timeout", "speculate"),
            *(
                "draft_ckpt_dir",
                "draft_quantize",
                "logprobs",
                "echo",
                "json",
                "model_parallel_size",
                "dry_run",
                "prompt_file",
            ),
            *("top_k", "min_p", "repetition_penalty", "stop", "json_schema", "n", "top_logprobs", "show_probs", "html"),
        ]
    )
    assert "python example_text_completion.py --prompt" in done.stdout  # its examples are its own


def test_the_examples_run_from_any_folder(demo_model: Path, tmp_path: Path) -> None:
    done = python(COMPLETION, "--max_gen_len", "0", "--json", cwd=tmp_path)
    assert len(done.json_lines) >= 2
