"""What `llama bench` measures is work that is done, by those who are said to have done it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from llama.benchmark import peer_worker, prompts, roofline
from llama.benchmark.compare import Workload, choose_peers, measure, started_systems, summarise
from llama.benchmark.ours import Ours
from llama.benchmark.workers import dense_bytes, find_peers, started, stored_weights
from llama.checkpoint import open_checkpoint
from llama.cli.bench import checkpoints, main, system_table
from llama.config import ModelArgs
from llama.engine.options import BuildOptions
from llama.tokenizer import Tokenizer
from tests.checkpoints import random_state, write_byte_tokenizer
from tests.gguf_files import write_gguf_model

# Rows of whole blocks of Q8_0.
BLOCKS = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, hidden_dim=128)
COPIED = "".join(f"{i} bottles of {'beer' * (i % 3)} on the wall.\n" for i in range(40))
# A system of the tests in a worker's process, by what it does with a job.
SYSTEM = f"""\
import sys
sys.path.insert(0, {str(Path(peer_worker.__file__).parent)!r})
import peer_worker
class System:
    vocab_size = 7
    def __init__(self, options): print('loaded', options)
    def run(self, prompts, gen_len):
        %s
    peak_mib = staticmethod(peer_worker.resident_peak_mib)
peer_worker.serve(System, Exception)"""
KNOWN = {"weights": "bf16", "weight_bytes": 10}


def worker(does: str) -> Any:
    return started([sys.executable, "-c", SYSTEM % does, "{}"], "peer", KNOWN, quiet=True)


def result(name: str, peers: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """What is measured of one checkpoint, with invented figures."""
    figures = {"bytes_per_token": 1e6, "decode_tok_s": 50.0, "prefill_tok_s": 400.0, "bandwidth_gb_s": 5.0}
    job = {"prompts": "random", "prompt_len": 8, "gen_len": 4, "batch_size": 1, "runs": 3}
    about = {"ckpt_dir": name, "machine": "one", "date": "2026-01-31", "read_gb_s": 10.0, **job}
    return {**about, "system": "ours", "weights": "bf16", "peak_mib": 90.0, **figures, "peers": peers, **changes}


def test_each_run_computes_a_whole_prompt(tiny_folder: Path) -> None:
    """All runs once had one prompt, which the cache then had: prefill came out at 15,000 tokens a second."""
    ours = Ours(BuildOptions(tiny_folder, max_seq_len=64))
    workload = Workload(prompt_len=40, gen_len=2, batch_size=1, runs=3)
    figures = measure([ours], workload, open_checkpoint(tiny_folder))
    assert ours.llm.metrics.prompt_tokens == 4 * 40 and len(figures) == 3


def test_ratios_are_taken_run_by_run(tiny_folder: Path) -> None:
    """A machine that is slow for a while slows both systems: medians of each would come from different times."""
    systems = [Ours(BuildOptions(tiny_folder, max_seq_len=8), name) for name in ("ours", "other")]
    runs = [[speeds(6, 60), speeds(2, 30)], [speeds(8, 10), speeds(4, 10)], [speeds(4, 40), speeds(4, 10)]]
    ours, other = summarise(systems, runs)
    assert ours["decode_tok_s"] == 6 and "decode_ratio" not in ours
    assert other["decode_ratio"] == [2.0, 1.0, 3.0] and other["prefill_ratio"] == [2.0, 1.0, 4.0]


def speeds(decode: float, prefill: float) -> dict[str, float]:
    return {"decode_tok_s": decode, "prefill_tok_s": prefill}


def test_a_worker_answers_whatever_its_library_prints() -> None:
    """Of memory, too, for itself: getrusage's peak of a new process begins with that of the one that started it."""
    with worker("print('noise'); return {'tokens': prompts, 'prefill_s': gen_len}") as system:
        assert system.vocab_size == 7 and system.loaded == KNOWN
        assert system.run([[1, 2]], 5) == {"tokens": [[1, 2]], "prefill_s": 5}
        if sys.platform == "linux":
            assert 0 < system.peak_mib() < 60 < peer_worker.resident_peak_mib()


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("raise RuntimeError('no\\n memory')", "^peer: RuntimeError: no memory$"),
        ("sys.exit('its last words')", "^peer ended early, with exit code 1: its last words$"),
        ("import os; os.kill(os.getpid(), 9)", "^peer ended early, with SIGKILL$"),
    ],
    ids=["raises", "exits", "killed"],
)
def test_a_worker_that_fails_says_why_in_one_line(does: str, words: str) -> None:
    with worker(does) as system, pytest.raises(ValueError, match=words):
        system.run([[1]], 2)


def test_peers_are_looked_for_in_every_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that happens to have a library's name is not the library."""
    (tmp_path / "vllm").mkdir()
    for name in ("bare", "other"):
        python = tmp_path / name
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
        python.chmod(0o755)
    (tmp_path / "llama_cpp.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert find_peers([f"{tmp_path}/bare", f"{tmp_path}/other"]) == {"llama_cpp": f"{tmp_path}/bare"}
    with pytest.raises(ValueError, match="--peer_python /no/python is no Python that runs"):
        find_peers(["/no/python"])


def test_what_is_compared_is_what_was_asked_for() -> None:
    found = {"vllm": "a", "transformers": "b"}
    assert choose_peers("all", found, ["a", "b"]) == ["vllm", "transformers"]
    assert choose_peers("plain,vllm", found, ["a", "b"]) == ["plain", "vllm"]
    with pytest.raises(ValueError, match=r"llama_cpp cannot be imported by a, b: pip install '.\[bench\]', or name an"):
        choose_peers("vllm,llama_cpp", found, ["a", "b"])
    with pytest.raises(ValueError, match="llama_cpp or transformers or vllm cannot be imported by a"):
        choose_peers("all", {}, ["a"])
    with pytest.raises(ValueError, match=r"names separated by commas of .* and plain, got 'lama\.cpp'"):
        choose_peers("lama.cpp", found, ["a"])


@pytest.mark.parametrize(
    ("changes", "words"), [({}, "llama_cpp reads GGUF files"), ({"max_batch_size": 2}, "with one prompt")], ids=str
)
def test_a_peer_that_cannot_run_a_checkpoint_says_so(changes: dict[str, Any], words: str, tiny_folder: Path) -> None:
    """And before anything is started, so that no time is lost."""
    options = BuildOptions(tiny_folder, **{"device": "cpu", "max_batch_size": 1, **changes})
    systems = started_systems(options, ["llama_cpp"], {"llama_cpp": "/no/python"}, all_must_run=True)
    with pytest.raises(ValueError, match=words), systems:
        pass


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gen_len": 1}, "--gen_len must be at least 2, got 1"),
        ({"prompt_len": 3, "batch_size": 4}, "--prompt_len must be at least 4, got 3"),
        ({"batch_size": 0}, "--batch_size must be at least 1, got 0"),
        ({"runs": 0}, "--runs must be at least 1, got 0"),
        ({"plot": Path("a.jpg")}, r"must be a \.png|a picture needs matplotlib: pip install"),
        ({"compare": "all", "peer_python": ["/no/python"]}, "--peer_python /no/python is no Python that runs"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_says_so(changes: dict[str, Any], words: str, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=words):
        main(BuildOptions(tiny_folder, device="cpu"), **changes)


def test_several_checkpoints_are_separated_by_commas(tmp_path: Path) -> None:
    """But for a path that has one in its name."""
    (tmp_path / "a,b").mkdir()
    assert checkpoints(f"{tmp_path}/a,b") == [f"{tmp_path}/a,b"]
    assert checkpoints("x.gguf,~/y") == ["x.gguf", str(Path.home() / "y")]


def test_a_table_has_a_line_for_each_system() -> None:
    ratios = {"decode_ratio": [1.5, 1.25, 2.0], "prefill_ratio": [0.5, 0.25, 0.75]}
    peer = {**result("", []), "system": "llama_cpp", **ratios, "copied_percent": 97.0}
    lines = system_table(result("models/a.gguf", [peer]), with_heading=False).splitlines()
    assert [line.split() for line in lines] == [
        ["a.gguf"],
        ["ours", "bf16", "50.0", "5.0", "(50%", "of", "10.0)", "400.0", "90"],
        ["llama_cpp", "bf16", "50.0", "5.0", "(50%", "of", "10.0)", "400.0", "90"]
        + ["1.50", "(1.25-2.00)", "0.50", "(0.25-0.75)", "copied", "97", "%"],
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_a_token_reads_are_counted(tied: bool, tmp_path: Path) -> None:
    """An embedding table is read whole only where it is the output, too."""
    args = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=96, hidden_dim=128, tied_embeddings=tied)
    file, kind = tmp_path / "model.gguf", gguf.LlamaFileType.MOSTLY_Q8_0
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    write_gguf_model(file, args, random_state(args), q8_0, general__file_type=int(kind))
    tensors = [each for each in gguf.GGUFReader(file).tensors if tied or each.name != "token_embd.weight"]
    assert stored_weights(file) == {"weights": "Q8_0", "weight_bytes": sum(int(each.n_bytes) for each in tensors)}
    assert dense_bytes(open_checkpoint(file)) == 2 * sum(int(each.n_elements) for each in tensors)


def test_a_copy_prompt_ends_in_the_passage_that_it_holds(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_byte_tokenizer(tmp_path))
    lengths, generator = [150, 300], torch.Generator().manual_seed(3)
    made, copies = prompts.copy_prompts(COPIED, lengths, 20, tokenizer, generator)
    assert [len(prompt) for prompt in made] == lengths and [len(copy) for copy in copies] == [20, 20]
    for prompt, copy in zip(made, copies, strict=True):
        assert prompt[0] == tokenizer.bos_id
        text = tokenizer.decode(prompt[1:])
        begun = text[-prompts.BEGUN :]
        assert text.startswith(prompts.BEFORE + begun + tokenizer.decode(copy))
        assert text.endswith(prompts.BETWEEN + begun)
    other, _ = prompts.copy_prompts(COPIED, lengths, 20, tokenizer, generator)
    assert other != made


@pytest.mark.parametrize("length", [129, 5000])
def test_a_passage_that_is_too_short_or_too_long_is_refused(length: int, tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_byte_tokenizer(tmp_path))
    most = 58 + 2 * len(tokenizer.encode(COPIED, bos=False, eos=False))
    with pytest.raises(ValueError, match=f"--copy of 20 tokens takes prompts of 130 to {most} tokens, got {length}"):
        prompts.copy_prompts(COPIED, [length], 20, tokenizer, torch.Generator())


def test_a_picture_has_a_point_for_each_system_of_each_checkpoint() -> None:
    """And says of which model it is where there are several."""
    peer = {"system": "llama_cpp", "weights": "Q4_0", "bytes_per_token": 300_000.0, "decode_tok_s": 150.0}
    both = roofline.points([result("m/a.gguf", [peer]), result("b", [], weights="int8")])
    assert both == [
        ("ours", "a", "bf16", 1.0, 50.0),
        ("llama_cpp", "a", "Q4_0", 0.3, 150.0),
        ("ours", "b", "int8", 1.0, 50.0),
    ]
    assert [point.model for point in roofline.points([result("m/a.gguf", [peer])])] == ["", ""]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[bench]'")
    roofline.draw_roofline([result("a", []), result("b", [], decode_tok_s=80.0)], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
