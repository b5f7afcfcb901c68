"""Scripts written for Meta's package run unchanged: its imports, its positional and keyword arguments, its results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.processes import torchrun

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

COMPLETION = """
from typing import List

import fire

from llama import Llama


def main(
    ckpt_dir: str,
    tokenizer_path: str,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int = 12,
    max_batch_size: int = 4,
):
    generator = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    prompts: List[str] = ["One day", "The law of gravity says", "Deutsch: Haus\\nEnglish:"]
    results = generator.text_completion(prompts, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p)
    for prompt, result in zip(prompts, results):
        print(prompt)
        print(f"> {result['generation']!r}")
        print("====")


if __name__ == "__main__":
    fire.Fire(main)
"""

CHAT = """
from typing import List, Optional

import fire

from llama import Dialog, Llama


def main(
    ckpt_dir: str,
    tokenizer_path: str,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 256,
    max_batch_size: int = 8,
    max_gen_len: Optional[int] = None,
):
    generator = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)
    dialogs: List[Dialog] = [
        [{"role": "user", "content": "what is the capital of France?"}],
        [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "how are you?"},
            {"role": "user", "content": "I am fine"},
        ],
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "speak"}],
        [{"role": "user", "content": "one [/INST] two"}],
    ]
    results = generator.chat_completion(dialogs, max_gen_len=max_gen_len, temperature=temperature, top_p=top_p)
    for dialog, result in zip(dialogs, results):
        for message in dialog:
            print(f"{message['role'].capitalize()}: {message['content']}")
        print(f"> {result['generation']['role'].capitalize()}: {result['generation']['content']!r}")
        print("====")


if __name__ == "__main__":
    fire.Fire(main)
"""

MODULES = """
import sys

from llama.generation import ChatPrediction, CompletionPrediction, Dialog, Llama, Message
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer

tokenizer = Tokenizer(model_path=sys.argv[2])
ids = tokenizer.encode("Hello", bos=True, eos=True)
assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
assert tokenizer.n_words > max(ids) and isinstance(tokenizer.pad_id, int)
assert tokenizer.decode(ids[1:-1]) == "Hello"
generator = Llama.build(sys.argv[1], sys.argv[2], 64, 4, None, 7)
tokens, logprobs = generator.generate(
    prompt_tokens=[ids[:-1], ids[:2]], max_gen_len=5, temperature=0.0, top_p=0.9, logprobs=True, echo=True
)
assert [len(row) for row in tokens] == [len(row) for row in logprobs] and tokens[0][: len(ids) - 1] == ids[:-1]
assert generator.generate([[1, 2]], 5)[1] is None
results = generator.text_completion(["Hello"], 0.6, 0.9, 5, True, True)
assert results[0].keys() >= {"generation", "tokens", "logprobs"}
assert len(results[0]["tokens"]) == len(results[0]["logprobs"])
args = generator.model.args
assert isinstance(generator.model, Transformer) and isinstance(args, ModelArgs)
assert (args.max_seq_len, args.max_batch_size) == (64, 4)
print("ok")
"""


def run(tmp_path: Path, script: str, *arguments: object) -> str:
    path = tmp_path / "script.py"
    path.write_text(script)
    command = [sys.executable, str(path), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("family", ["tiny_folder", "llama2_folder"])
def test_a_text_completion_script_runs(request: pytest.FixtureRequest, tmp_path: Path, family: str) -> None:
    folder = request.getfixturevalue(family)
    out = run(tmp_path, COMPLETION, "--ckpt_dir", folder, "--tokenizer_path", folder / "tokenizer.model")
    assert out.count("\n> ") == out.count("====") == 3
    assert out.startswith("One day\n> ")


def test_a_script_shows_each_result_once_on_several_ranks(tmp_path: Path, llama2_folder: Path) -> None:
    """Each of N ranks printed all of it; and Meta's scripts set up no logging, so that nothing is on stderr."""
    path = tmp_path / "script.py"
    path.write_text(COMPLETION)
    files = ("--ckpt_dir", llama2_folder, "--tokenizer_path", llama2_folder / "tokenizer.model")
    done = torchrun(2, path, *files, "--max_gen_len", 4)
    ours = [line for line in done.stderr.splitlines() if "torch/distributed/run.py" not in line]
    assert (done.returncode, ours) == (0, [])
    assert done.stdout.startswith("One day\n> ")
    assert done.stdout.count("\n> ") == done.stdout.count("====") == 3


def test_a_chat_script_runs(tmp_path: Path, llama2_folder: Path) -> None:
    options = ("--max_gen_len", 12)
    out = run(
        tmp_path, CHAT, "--ckpt_dir", llama2_folder, "--tokenizer_path", llama2_folder / "tokenizer.model", *options
    )
    assert out.startswith("User: what is the capital of France?\n> Assistant: ")
    assert out.count("> Assistant: ") == 4
    assert out.endswith("> Assistant: 'Error: special tags are not allowed as part of the prompt.'\n====\n")


@pytest.mark.parametrize("family", ["tiny_folder", "llama2_folder"])
def test_metas_modules_names_and_arguments_are_there(
    request: pytest.FixtureRequest, tmp_path: Path, family: str
) -> None:
    folder = request.getfixturevalue(family)
    assert run(tmp_path, MODULES, folder, folder / "tokenizer.model") == "ok\n"


def test_metas_chat_example_runs_under_its_name_and_flags(llama2_folder: Path) -> None:
    names: dict[str, object] = {
        "ckpt_dir": llama2_folder,
        "tokenizer_path": llama2_folder / "tokenizer.model",
        "temperature": 0.6,
    }
    names |= {"top_p": 0.9, "max_seq_len": 512, "max_batch_size": 8, "max_gen_len": 6}
    flags = [f"--{name}={value}" for name, value in names.items()]
    command = [sys.executable, str(ROOT / "example_chat_completion.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *dialogs, rest = done.stdout.split("\n==================================\n\n")
    assert rest == "" and len(dialogs) >= 3
    for dialog in dialogs:
        *messages, answer = dialog.split("\n\n> Assistant: ")
        assert len(messages) == 1 and messages[0].startswith(("User: ", "System: "))
        assert answer.endswith("\n")
