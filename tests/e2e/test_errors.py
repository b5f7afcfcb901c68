"""What bad input gets: one line on stderr that names the value, the limit and the fix, exit code 1, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import write_meta
from tests.e2e.processes import CHAT, COMPLETION, Finished, elsewhere, llama, python, torchrun

pytestmark = pytest.mark.slow

# A case makes its bad files in a folder of its own, next to good/ (one shard) and good8/ (eight), and returns the
# flags. The error must hold the words, in which {folder} stands for that folder.
Flags = list[object]
CASES: dict[str, tuple[Callable[[Path], Flags], list[str]]] = {}


def case(*words: str) -> Callable[[Callable[[Path], Flags]], Callable[[Path], Flags]]:
    def add(make: Callable[[Path], Flags]) -> Callable[[Path], Flags]:
        CASES[make.__name__] = (make, list(words))
        return make

    return add


def good(folder: Path, *flags: object) -> Flags:
    return ["--ckpt_dir", folder / "good", *flags]


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Flags:
    """A copy of the good checkpoint whose tensors were edited."""
    copy = shutil.copytree(folder / "good", folder / "edited")
    state = torch.load(copy / "consolidated.00.pth")
    edit(state)
    torch.save(state, copy / "consolidated.00.pth")
    return ["--ckpt_dir", copy]


def with_params(folder: Path, text: str) -> Flags:
    copy = shutil.copytree(folder / "good", folder / "edited")
    (copy / "params.json").write_text(text)
    return ["--ckpt_dir", copy]


def with_param(folder: Path, **changes: Any) -> Flags:
    params = json.loads((folder / "good" / "params.json").read_text())
    return with_params(folder, json.dumps(params | changes))


def with_shard(folder: Path, change: Callable[[bytes], bytes]) -> Flags:
    copy = shutil.copytree(folder / "good", folder / "edited")
    shard = copy / "consolidated.00.pth"
    shard.write_bytes(change(shard.read_bytes()))
    return ["--ckpt_dir", copy]


# --- files ---------------------------------------------------------------------------------------------------------


@case("{folder}/goood does not exist", "{folder} has good/, good8/")
def missing_folder(folder: Path) -> Flags:
    return ["--ckpt_dir", folder / "goood"]


@case("{folder}/a/b.gguf does not exist", "neither does {folder}/a")
def missing_gguf(folder: Path) -> Flags:
    return ["--ckpt_dir", folder / "a" / "b.gguf"]


@case("{folder}/empty has no checkpoint", "looked for consolidated.*.pth", "*.gguf", "found nothing")
def folder_without_checkpoint(folder: Path) -> Flags:
    (folder / "empty").mkdir()
    return ["--ckpt_dir", folder / "empty"]


@case("{folder}/good/consolidated.00.pth is a single file", "give its folder {folder}/good")
def shard_instead_of_folder(folder: Path) -> Flags:
    return ["--ckpt_dir", folder / "good" / "consolidated.00.pth"]


@case("{folder}/good/params.json is a single file: give its folder {folder}/good")
def another_file(folder: Path) -> Flags:
    return ["--ckpt_dir", folder / "good" / "params.json"]


@case("no params.json", "copy it")
def missing_params(folder: Path) -> Flags:
    flags = edited(folder, dict)
    (folder / "edited" / "params.json").unlink()
    return flags


@case("{folder}/edited", "without a gap", "00, 02")
def gap_between_shards(folder: Path) -> Flags:
    flags = edited(folder, dict)
    shutil.copy(folder / "edited" / "consolidated.00.pth", folder / "edited" / "consolidated.02.pth")
    return flags


# --- tensors -------------------------------------------------------------------------------------------------------


@case("{folder}/edited lacks tensors layers.1.attention.wk.weight")
def missing_tensor(folder: Path) -> Flags:
    return edited(folder, lambda state: state.pop("layers.1.attention.wk.weight"))


@case("{folder}/edited has unexpected tensors layers.0.attention.wq.bias")
def unexpected_tensor(folder: Path) -> Flags:
    return edited(folder, lambda state: state.update({"layers.0.attention.wq.bias": torch.zeros(64)}))


@case("layers.0.feed_forward.w2.weight has shape (64, 100)", "asks for (64, 176)")
def misshapen_tensor(folder: Path) -> Flags:
    return edited(folder, lambda state: state.update({"layers.0.feed_forward.w2.weight": torch.zeros(64, 100)}))


@case("norm.weight has dtype torch.int64, which is not supported")
def tensor_of_integers(folder: Path) -> Flags:
    return edited(folder, lambda state: state.update({"norm.weight": torch.ones(64, dtype=torch.int64)}))


@case("{folder}/edited: tok_embeddings.weight has shape (448, 64)", "asks for (512, 64)", "some files are missing")
def missing_last_shard(folder: Path) -> Flags:
    copy = shutil.copytree(folder / "good8", folder / "edited")
    (copy / "consolidated.07.pth").unlink()
    return ["--ckpt_dir", copy]


@case("{folder}/edited", "shards 00 and 03 do not belong together", "norm.weight")
def shard_of_another_model(folder: Path) -> Flags:
    copy = shutil.copytree(folder / "good8", folder / "edited")
    shard = copy / "consolidated.03.pth"
    torch.save(torch.load(shard) | {"norm.weight": torch.ones(32)}, shard)
    return ["--ckpt_dir", copy]


# --- damage --------------------------------------------------------------------------------------------------------


@case("{folder}/edited/consolidated.00.pth is truncated", "download it again")
def truncated_shard(folder: Path) -> Flags:
    return with_shard(folder, lambda content: content[: len(content) // 2])


@case("{folder}/edited/consolidated.00.pth is empty", "download it again")
def empty_shard(folder: Path) -> Flags:
    return with_shard(folder, lambda content: b"")


@case("{folder}/edited/consolidated.00.pth", "download it again")
def corrupt_shard(folder: Path) -> Flags:
    return with_shard(folder, lambda content: content.replace(b"torch._utils", b"t\0\xffch._utils"))


@case("{folder}/edited/consolidated.00.pth", "download it again")
def shard_that_is_a_web_page(folder: Path) -> Flags:
    return with_shard(folder, lambda content: b"<!DOCTYPE html><html>404</html>\n" * 100)


class RunsCode:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.target),)

    def __init__(self, target: Path) -> None:
        self.target = target


@case("{folder}/edited/consolidated.00.pth is refused: it would run code when loaded", "posix.mkdir")
def pickle_that_runs_code(folder: Path) -> Flags:
    return edited(folder, lambda state: state.update({"norm.weight": RunsCode(folder / "it_ran")}))


@case("{folder}/a.gguf is not a usable GGUF file", "truncated")
def truncated_gguf_header(folder: Path) -> Flags:
    (folder / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 10, 10))
    return ["--ckpt_dir", folder / "a.gguf"]


@case("{folder}/a.gguf is not a usable GGUF file", "version 99 is not supported")
def gguf_of_another_version(folder: Path) -> Flags:
    (folder / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 99, 0, 0))
    return ["--ckpt_dir", folder / "a.gguf"]


@case("{folder}/a.gguf", "general.architecture must be of type str, found nothing")
def gguf_without_an_architecture(folder: Path) -> Flags:
    (folder / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    return ["--ckpt_dir", folder / "a.gguf"]


@case("{folder}/a.gguf is not a usable GGUF file")
def corrupt_gguf_header(folder: Path) -> Flags:
    (folder / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + b"\xff" * 4000)
    return ["--ckpt_dir", folder / "a.gguf"]


# --- params.json and tokenizers ------------------------------------------------------------------------------------


@case("{folder}/edited/params.json is not valid JSON", "line 1")
def malformed_params(folder: Path) -> Flags:
    return with_params(folder, '{"dim": 64,')


@case("{folder}/edited/params.json must hold a JSON object, got list")
def params_of_another_kind(folder: Path) -> Flags:
    return with_params(folder, "[64]")


@case("{folder}/edited/params.json has unknown keys q_lora_rank")
def unknown_param(folder: Path) -> Flags:
    return with_param(folder, q_lora_rank=4096)


@case("{folder}/edited/params.json: dim must be an integer from 1", "got '64'")
def param_of_the_wrong_type(folder: Path) -> Flags:
    return with_param(folder, dim="64")


@case("{folder}/edited/params.json", "dim 64 is not a multiple of n_heads 7")
def params_that_contradict_each_other(folder: Path) -> Flags:
    return with_param(folder, n_heads=7)


@case("the tokenizer has 513 tokens", "the weights in {folder}/good have 512", "--tokenizer_path")
def tokenizer_of_another_size(folder: Path) -> Flags:
    ranks = (folder / "good" / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(ranks + b"YWI= 256\n")
    return good(folder, "--tokenizer_path", folder / "tokenizer.model")


@case("{folder}/good/params.json is JSON, but no tokenizer that works here", "its model is missing: expected an object")
def file_that_is_no_tokenizer(folder: Path) -> Flags:
    return good(folder, "--tokenizer_path", folder / "good" / "params.json")


@case("no tokenizer file {folder}/tokenizer.model", "{folder} holds good, good8")
def missing_tokenizer_path(folder: Path) -> Flags:
    return good(folder, "--tokenizer_path", folder / "tokenizer.model")


@case("{folder}/edited", "tokenizer.model", "--tokenizer_path")
def no_tokenizer_beside_the_weights(folder: Path) -> Flags:
    flags = edited(folder, dict)
    (folder / "edited" / "tokenizer.model").unlink()
    return flags


# --- what is asked of the model ------------------------------------------------------------------------------------


@case("prompt 2 of 2 has 18 tokens, max_seq_len is 16", "raise it or shorten the prompt")
def prompt_longer_than_max_seq_len(folder: Path) -> Flags:
    return good(folder, "--prompt", "a", "--prompt", "hello hello hello", "--max_seq_len", 16)


@case("the list of prompts is empty", "give at least one")
def empty_prompt_list(folder: Path) -> Flags:
    return good(folder, "--prompt", "[]")


@case("temperature must be a number from 0 to 1e+15, got -1.0")
def negative_temperature(folder: Path) -> Flags:
    return good(folder, "--temperature", -1)


@case("temperature must be a number from 0 to 1e+15, got nan")
def temperature_that_is_no_number(folder: Path) -> Flags:
    return good(folder, "--temperature", "nan")


@case("top_p must be a number from 0 to 1, got -0.1")
def top_p_below_nothing(folder: Path) -> Flags:
    return good(folder, "--top_p", -0.1)


@case("temperature must be a number from 0 to 1e+15, got 1e+300")
def temperature_that_no_device_holds(folder: Path) -> Flags:
    return good(folder, "--temperature", "1e300")


@case("top_p must be a number from 0 to 1, got 1.5")
def top_p_above_one(folder: Path) -> Flags:
    return good(folder, "--top_p", 1.5)


@case("max_gen_len must be an integer of at least 0, got -1")
def negative_max_gen_len(folder: Path) -> Flags:
    return good(folder, "--max_gen_len", -1)


@case("max_seq_len must be an integer from 1", "got 0")
def max_seq_len_of_nothing(folder: Path) -> Flags:
    return good(folder, "--max_seq_len", 0)


@case("prompt 0: the logits are NaN or infinite", "the weights are damaged", "--dtype float32")
def weights_that_give_nan(folder: Path) -> Flags:
    return edited(folder, lambda state: state["norm.weight"].fill_(float("nan")))


@case("device cuda was asked for", "no CUDA device", "--device cpu")
def cuda_asked_for_and_absent(folder: Path) -> Flags:
    return good(folder, "--device", "cuda")


@case("device must be cuda, mps or cpu, got 'tpu'")
def unknown_device(folder: Path) -> Flags:
    return good(folder, "--device", "tpu")


@case("dtype must be one of float32, bfloat16, float16, got 'int8'")
def unknown_dtype(folder: Path) -> Flags:
    return good(folder, "--dtype", "int8")


# --- the command line ----------------------------------------------------------------------------------------------


@case("unknown flag --promt", "did you mean --prompt?")
def misspelt_flag(folder: Path) -> Flags:
    return good(folder, "--promt", "hello")


@case("unexpected argument 'hello'", "as in --prompt 'hello'")
def value_without_its_flag(folder: Path) -> Flags:
    return good(folder, "hello")


@case("--prompt needs a value")
def flag_without_its_value(folder: Path) -> Flags:
    return good(folder, "--prompt")


@case("--ckpt_dir must be a path, got ''")
def variable_that_is_not_set(folder: Path) -> Flags:
    """It was once taken for the current folder."""
    return ["--ckpt_dir", ""]


@case("{folder}/latin1.txt is not UTF-8 from byte 7 on", "iconv")
def prompts_in_another_encoding(folder: Path) -> Flags:
    (folder / "latin1.txt").write_bytes(b"One\ncaf\xe9\n")
    return good(folder, "--prompt_file", folder / "latin1.txt")


@case("{folder}/blank.txt holds no prompts: give one a line")
def file_without_prompts(folder: Path) -> Flags:
    (folder / "blank.txt").write_text("\n \n")
    return good(folder, "--prompt_file", folder / "blank.txt")


@case("--max_gen_len must be an integer, got 'many'")
def words_for_a_number(folder: Path) -> Flags:
    return good(folder, "--max_gen_len", "many")


@case("--json is on or off", "got 'perhaps'")
def words_for_a_switch(folder: Path) -> Flags:
    return good(folder, "--json=perhaps")


# -------------------------------------------------------------------------------------------------------------------


def check(done: Finished, words: list[str]) -> None:
    """One error line with these words, exit code 1, and nothing from this program that is not for its user."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert len(done.errors) == 1, done.stderr
    (error,) = done.errors
    assert error.startswith("error: ")
    assert [word for word in words if word not in error] == [], error
    ours = done.stderr.partition(error)[0].splitlines()  # torchrun's own account follows
    assert [line for line in ours if not line.startswith(("loaded ", "W"))] == [], done.stderr
    assert "[rank" not in done.stderr


@pytest.fixture(scope="module")
def good_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_meta(folder / "good")
    write_meta(folder / "good8", shards=8)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_line(name: str, good_checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(good_checkpoints, tmp_path, dirs_exist_ok=True)
    make, words = CASES[name]
    check(python(COMPLETION, *make(tmp_path)), [word.format(folder=tmp_path) for word in words])
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("part", [0.01, 0.5, 0.999])
def test_a_truncated_gguf_says_so(part: float, demo_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    with demo_model.open("rb") as whole:
        path.write_bytes(whole.read(int(part * demo_model.stat().st_size)))
    check(python(COMPLETION, "--ckpt_dir", path), [str(path), "truncated", "download it again"])


@pytest.mark.parametrize("name", ["complete", "chat", "plan", "bench"])
def test_without_a_demo_model_commands_say_how_to_get_it(name: str, tmp_path: Path) -> None:
    done = llama(name, cwd=elsewhere(tmp_path), env={"PYTHONPATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache")})
    check(done, ["no --ckpt_dir given", f"{tmp_path}/cache/llama/SmolLM2", "`llama get`"])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["comlete", "--prompt", "a"], "unknown command 'comlete': did you mean complete?"),
        (["serve"], "unknown command 'serve': see llama --help"),
        (["--prompt", "a"], "a command comes before its flags, as in llama complete --prompt: see llama --help"),
        (["plan", "--seed", "1"], "unknown flag --seed: see --help"),
        (["chat", "--max_batch_size", "2", "--temperature", "0"], "unknown flag --max_batch_size: see --help"),
        (["get", "models"], "'models' is no model's name: give org/name, as on the hub, or demo"),
        (["bench", "--gen_len", "1"], "--gen_len must be at least 2, got 1"),
    ],
    ids=str,
)
def test_a_command_that_is_mistyped_says_what_was_meant(words: list[str], error: str) -> None:
    check(llama(*words), [error])


def test_a_chat_says_what_is_wrong_too(tiny_folder: Path) -> None:
    flags = ["--ckpt_dir", tiny_folder]
    formats = (
        "chat_format must be one of template, llama2, llama3, chatml, codellama70b, vicuna, alpaca, zephyr, openchat, "
        "tulu, solar, koala, mistral-v1, mistral-v3, mistral-v7, got 'mine'"
    )
    check(python(CHAT, *flags, "--chat_format", "mine"), [formats])
    too_long = python(CHAT, *flags, "--max_seq_len", 20, stdin="hello hello hello\n")
    check(too_long, ["max_seq_len is 20"])


# --- ranks ---------------------------------------------------------------------------------------------------------


def check_ranks(done: Finished, words: list[str]) -> None:
    """The same on several ranks; torchrun had to kill none of them."""
    check(done, words)
    assert "forcefully" not in done.stderr
    assert done.stderr.count("error: ") == 1


def test_three_ranks_say_once_that_they_cannot_share_the_heads(tiny_folder: Path) -> None:
    words = ["16 heads cannot be split over 3 ranks", "use one of 1, 2, 4, 8, 16"]
    check_ranks(torchrun(3, COMPLETION, "--ckpt_dir", tiny_folder), words)


@pytest.mark.parametrize("name", ["pickle_that_runs_code", "prompt_longer_than_max_seq_len", "weights_that_give_nan"])
def test_two_ranks_say_once_what_is_wrong(name: str, tmp_path: Path) -> None:
    write_meta(tmp_path / "good")
    make, words = CASES[name]
    done = torchrun(2, COMPLETION, *make(tmp_path))
    check_ranks(done, [word.format(folder=tmp_path) for word in words])
    assert not (tmp_path / "it_ran").exists()


ONE_RANK_DIFFERS = """
import os, runpy, sys

if os.environ["RANK"] == "3":
    sys.argv[sys.argv.index("--ckpt_dir") + 1] = sys.argv[1]
del sys.argv[1]
runpy.run_path({example!r}, run_name="__main__")
"""


@pytest.mark.parametrize("wrong", ["missing_folder", "missing_tensor"])
def test_what_is_wrong_on_one_rank_alone_is_said_once_and_ends_all(wrong: str, tmp_path: Path) -> None:
    """A host that lacks a file once left the others waiting for it. One is found on opening, one on loading."""
    write_meta(tmp_path / "good")
    write_meta(tmp_path / "good8", shards=8)
    make, words = CASES[wrong]
    _, bad_folder = make(tmp_path)
    script = tmp_path / "one_rank_differs.py"
    script.write_text(ONE_RANK_DIFFERS.format(example=str(COMPLETION)))
    done = torchrun(4, script, bad_folder, "--ckpt_dir", tmp_path / "good")
    check_ranks(done, [word.format(folder=tmp_path) for word in words])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_ranks_than_cuda_devices_say_how_many_there_are(tiny_folder: Path) -> None:
    found = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(str(i) for i in range(found)))
    flags = ["--ckpt_dir", tiny_folder, "--device", "cuda"]
    done = torchrun(found + 1, COMPLETION, *flags, env={"CUDA_VISIBLE_DEVICES": visible})
    check_ranks(done, [f"{found + 1} ranks on this host, but {found} CUDA devices", f"start {found}", "--device cpu"])
