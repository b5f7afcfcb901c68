"""A plan's figures are those of the code they describe: its parameters, its cache, and what torch's profiler counts."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import gguf
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from llama import Llama
from llama.backends.base import backend_of
from llama.backends.cpu.backend import CpuBackend
from llama.backends.cpu.build import library
from llama.backends.eager import EagerBackend
from llama.cache import PAGE_SIZE, pages_for
from llama.checkpoint import load_weights, open_checkpoint
from llama.checkpoint.load import WeightFormat
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from llama.engine.build import open_source
from llama.engine.metrics import Metrics
from llama.engine.options import BuildOptions
from llama.engine.page_pool import PagePool
from llama.engine.runner import EagerRunner
from llama.engine.scheduler import Scheduler
from llama.engine.sequence import Sequence
from llama.memory.available import PROCESS, UNKNOWN, _vm_stat_free, cgroups_free, commitable, free_bytes
from llama.memory.estimate import HEAP, BatchShape, activation_bytes, cache_bytes
from llama.memory.plan import Planner, page_limit, table
from llama.model import Transformer
from llama.rope_scaling import QueryScaling
from llama.sampling import SamplingParams
from tests.checkpoints import TINY, random_state, write_byte_tokenizer, write_meta
from tests.gguf_files import write_gguf_model

NO_TEXT = cast(Any, None)  # tokens stay tokens here
CPU = torch.device("cpu")
ODD = dataclasses.replace(TINY, vocab_size=515)  # padded on 2 ranks and more
BLOCKS = dataclasses.replace(TINY, hidden_dim=192)  # rows of whole Q8_0 blocks
GB = 10**9


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same kind of model as one Meta shard, as four, in Hugging Face's format, and as quantized GGUF."""
    top = tmp_path_factory.mktemp("formats")
    write_meta(top / "meta", TINY, dtype=torch.bfloat16)
    write_meta(top / "meta4", TINY, 4, dtype=torch.bfloat16)
    write_meta(top / "odd", ODD, dtype=torch.bfloat16)
    write_hugging_face(top / "hf", TINY, list(range(TINY.n_layers)))
    write_gguf_model(top / "model.gguf", BLOCKS, random_state(BLOCKS), gguf.GGMLQuantizationType.Q8_0)
    return {name: top / name for name in ("meta", "meta4", "odd", "hf", "model.gguf")}


def write_hugging_face(folder: Path, args: ModelArgs, layers: list[int]) -> None:
    """A bf16 folder in Hugging Face's format, a file for each layer, whose weights are holes: no bytes on the disk."""
    folder.mkdir()
    q_dim, kv_dim, hidden = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim, args.hidden_dim
    layer = {
        "self_attn.q_proj": (q_dim, args.dim),
        "self_attn.k_proj": (kv_dim, args.dim),
        "self_attn.v_proj": (kv_dim, args.dim),
        "self_attn.o_proj": (args.dim, q_dim),
        "mlp.gate_proj": (hidden, args.dim),
        "mlp.up_proj": (hidden, args.dim),
        "mlp.down_proj": (args.dim, hidden),
        "input_layernorm": (args.dim,),
        "post_attention_layernorm": (args.dim,),
    }
    vocab = (args.vocab_size, args.dim)
    files: list[dict[str, tuple[int, ...]]] = [
        {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()} for i in layers
    ]
    files.append({"model.embed_tokens.weight": vocab, "model.norm.weight": (args.dim,), "lm_head.weight": vocab})
    weight_map = {}
    for number, shapes in enumerate(files):
        header, end = {}, 0
        for name, shape in shapes.items():
            start, end = end, end + 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
            weight_map[name] = f"model-{number}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # as the library pads it
        with (folder / f"model-{number}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "intermediate_size": hidden,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_byte_tokenizer(folder)


def planner_of(path: Path, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.bfloat16, **limits: Any) -> Planner:
    checkpoint = open_checkpoint(path)
    args = dataclasses.replace(checkpoint.args, **limits)
    return Planner(checkpoint, args, ModelParallel(rank, size), WeightFormat(dtype), EagerBackend(CPU), free=GB)


def file_pages(addresses: dict[str, int]) -> set[str]:
    """Those of the named addresses that lie in a mapped file."""
    found = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in span.split("-"))
        if path.endswith((".pth", ".safetensors", ".gguf")):
            found |= {name for name, address in addresses.items() if first <= address < last}
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["meta", "meta4", "odd", "hf", "model.gguf"])
def test_planned_weights_are_what_loading_assigns(
    folders: dict[str, Path], name: str, size: int, dtype: torch.dtype
) -> None:
    """Padding, repeated KV heads, norms, and which weights stay in the mapped file, for the first and last rank."""
    for rank in {0, size - 1}:
        planner = planner_of(folders[name], rank, size, dtype)
        with torch.device("meta"):
            model = Transformer(planner.args, planner.parallel)
        load_weights(model, planner.checkpoint, CPU, planner.weight_format)
        weights = dict(model.named_parameters())
        mapped = file_pages({name: weight.data_ptr() for name, weight in weights.items()})
        assert planner.weights.total == sum(weight.nbytes for weight in weights.values())
        assert planner.weights.mapped == sum(weights[name].nbytes for name in mapped)


def test_planned_weights_count_a_shared_table_once(tmp_path: Path) -> None:
    write_meta(tmp_path, dataclasses.replace(TINY, tied_embeddings=True))
    tied = planner_of(tmp_path, dtype=torch.float32).weights.total
    write_meta(tmp_path, TINY)
    assert planner_of(tmp_path, dtype=torch.float32).weights.total - tied == 4 * TINY.vocab_size * TINY.dim


def test_decoded_blocks_need_one_tensor_beside_the_weights(folders: dict[str, Path]) -> None:
    """The largest table in fp32; on two ranks half of it, but w2 is split by columns and decoded whole."""
    table, w2 = 4 * TINY.vocab_size * TINY.dim, 4 * TINY.dim * BLOCKS.hidden_dim
    assert planner_of(folders["model.gguf"]).weights.tensor == table
    assert planner_of(folders["model.gguf"], 0, 2).weights.tensor == max(table // 2, w2)
    assert planner_of(folders["meta"]).weights.tensor == 0
    assert planner_of(folders["meta"], dtype=torch.float32).weights.tensor == 0  # from the mapped file


@pytest.mark.parametrize("size", [1, 2, 8])
def test_planned_cache_is_what_the_model_allocates(size: int) -> None:
    parallel = ModelParallel(size - 1, size)
    cache = Transformer(TINY, parallel).new_cache(3, 50)
    assert cache_bytes(TINY, parallel, torch.float32, BatchShape(3, 7, 50)) == cache.nbytes


SHAPES = {
    "wide": ModelArgs(dim=256, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=512, hidden_dim=704),
    "narrow": ModelArgs(dim=256, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=512, hidden_dim=64),
    "many heads": ModelArgs(dim=64, n_layers=2, n_heads=32, n_kv_heads=32, vocab_size=512, hidden_dim=64, head_dim=16),
    "window": ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=512, hidden_dim=64, sliding_window=100),
    "several rotations": ModelArgs(
        dim=64,
        n_layers=2,
        n_heads=32,
        n_kv_heads=8,
        vocab_size=512,
        hidden_dim=64,
        head_dim=32,
        sliding_window=100,
        full_layers=(0,),
        unrotated_layers=(0,),
        query_scaling=QueryScaling(0.1, 64),
        qk_norm="all heads",
        output_norms=True,
    ),
    "layer norms, no gate": ModelArgs(
        dim=256,
        n_layers=2,
        n_heads=8,
        n_kv_heads=2,
        vocab_size=512,
        hidden_dim=704,
        activation="relu2",
        layer_norms=True,
    ),
    "layer norms, narrow": ModelArgs(
        dim=512, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, vocab_size=512, hidden_dim=64, layer_norms=True
    ),
    "xielu": ModelArgs(
        dim=256, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=512, hidden_dim=704, activation="xielu", qk_norm="head"
    ),
    "vocabulary": ModelArgs(dim=64, n_layers=1, n_heads=4, vocab_size=60_000, hidden_dim=64),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Each thread has half a megabyte of its own in attention: nothing for a model, much for one this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(1000, 1008), (2300, 2308)], ids=["one pass", "chunks"])
@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("name", SHAPES)
def test_planned_activations_are_what_a_run_allocates(
    name: str, kernels: bool, lengths: tuple[int, int], dtype: torch.dtype
) -> None:
    """Within 10 % of the allocator's own count, whatever part of the computation holds most; 15 % by kernels.

    Prompts begin in pages of another text, and have so much of their own that one step computes it: that needs most.
    The layers run by kernels held keys and queries until the next layer, and 1.8 times what was planned.
    """
    args = SHAPES[name]
    job = BatchShape(8, 40, 48, scored=True) if name == "vocabulary" else BatchShape(2, *lengths)
    model = Transformer(dataclasses.replace(args, max_seq_len=job.length, max_batch_size=job.bsz))
    for weight in model.parameters():
        weight.data = torch.randn_like(weight).div(weight.shape[-1] ** 0.5).to(dtype)
    if kernels:
        if library() is None:
            pytest.skip("no C++ compiler here")
        CpuBackend(CPU).bind(model)
    own = min(job.prompt_len - PAGE_SIZE, backend_of(model).max_prefill_tokens // job.bsz)
    shared = pages_for(job.prompt_len - own) * PAGE_SIZE
    beginning, *ends = (
        torch.randint(1, args.vocab_size, (n,)).tolist() for n in (shared, *[job.prompt_len - shared] * job.bsz)
    )
    scheduler, runner = Scheduler(model.args, Metrics()), EagerRunner(model, model.new_cache(2 * job.bsz, job.length))
    scheduler.restart(PagePool(runner.cache.n_pages, runner.cache.n_pages), [runner.cache])
    read_prompts(scheduler, runner, [[*beginning, 0]], SamplingParams())
    scheduler.finish(scheduler.running[0])
    params = SamplingParams(0.6, 0.99, logprobs=job.scored, echo=job.scored)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        read_prompts(scheduler, runner, [[*beginning, *end] for end in ends], params)
    allocated = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(allocated, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    planned = activation_bytes(args, ModelParallel(), dtype, backend_of(model), job)
    planned = max(
        planned - (HEAP // 2 if kernels else HEAP), planned // 3
    )  # less what the allocator keeps; the profiler does not see it
    assert planned == pytest.approx(peak, rel=0.15 if kernels else 0.1)


def read_prompts(scheduler: Scheduler, runner: EagerRunner, prompts: list[list[int]], params: SamplingParams) -> None:
    """Have prompts computed, and a token sampled after each."""
    for i, prompt in enumerate(prompts, len(scheduler.requests)):
        scheduler.add(Sequence(i, prompt, params, 8, frozenset(), (1, i, 0), NO_TEXT, [], False))
    while any(sequence.n_cached < len(sequence.prompt) for sequence in (*scheduler.waiting, *scheduler.running)):
        chunks = scheduler.schedule(backend_of(runner.model).max_prefill_tokens)
        runner.launch(chunks)
        scheduler.pool.written()
        for chunk in chunks:
            chunk.sequence.n_cached = chunk.stop


def test_advice_is_the_largest_that_fits(folders: dict[str, Path]) -> None:
    planner = planner_of(folders["meta"], max_seq_len=100_000, max_batch_size=100)
    assert not planner.plan(planner.limits()).fits
    length, batch = planner.advice().split(" or ")
    for words, limits in ((length, lambda n: planner.limits(length=n)), (batch, lambda n: planner.limits(bsz=n))):
        most = int(words.split()[1])
        assert planner.plan(limits(most)).fits
        assert not planner.plan(limits(most + 1)).fits


def test_a_plan_tells_how_many_requests_fit_at_once(folders: dict[str, Path]) -> None:
    planner = planner_of(folders["meta"], max_seq_len=2000, max_batch_size=100)
    some = dataclasses.replace(planner, free=planner.plan(planner.limits(bsz=7)).needed)
    assert some.at_once(some.limits()) == 7
    assert ["fits", "7", "at", "once"] in [line.split() for line in table(some, {"": some.limits()}).splitlines()]
    none = dataclasses.replace(planner, free=planner.plan(planner.limits(bsz=1)).needed - 1)
    assert none.at_once(none.limits()) == 0
    assert planner.at_once(planner.limits(bsz=3)) == 3


def test_what_cannot_run_names_the_fewest_ranks_that_could(folders: dict[str, Path]) -> None:
    planner = planner_of(folders["meta"], dtype=torch.float32)
    dataclasses.replace(planner, free=700_000).check_can_run()
    with pytest.raises(ValueError, match=r"cpu memory per rank, 260\.00 KB are free: use 4 ranks with"):
        dataclasses.replace(planner, free=260_000).check_can_run()
    with pytest.raises(ValueError, match="use a smaller model"):
        dataclasses.replace(planner, free=1000).check_can_run()


def test_mapped_weights_larger_than_memory_are_told_and_run(folders: dict[str, Path]) -> None:
    """A rank reads them from the file again and again, but it can."""
    planner = dataclasses.replace(planner_of(folders["meta"]), free=100_000)
    planner.check_can_run()
    assert not planner.plan(BatchShape(1, 1, 1)).fits


def test_pages_are_what_memory_has_room_for(tiny_model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the activations of a batch; one row that does not fit alone is refused."""
    monkeypatch.setattr("llama.memory.plan.free_bytes", lambda *args: 300_000_000)
    model, shape = tiny_model.model, BatchShape(4, 50, 60)
    page = model.new_cache(1, 1).nbytes
    beside = activation_bytes(model.args, model.parallel, model.dtype, backend_of(model), shape)
    assert page_limit(model, shape) == (300_000_000 - beside) // page
    assert page_limit(model, shape, n_pages=10) == (300_000_000 - beside) // page + 10
    with pytest.raises(ValueError, match=r"999999999 with what follows, needs \d.* GB of cache per rank, there"):
        page_limit(model, BatchShape(4, 50, 999_999_999))


@pytest.fixture(scope="module")
def tiny_model(folders: dict[str, Path]) -> Llama:
    return Llama.build(folders["meta"], device="cpu", dtype="float32")


def test_planning_reads_no_weights(tmp_path: Path) -> None:
    """Of 7B parameters only headers come into memory, and a page or its neighbourhood where safetensors begins each."""
    args = ModelArgs(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=512, hidden_dim=14336)
    write_hugging_face(tmp_path / "8b", args, list(range(32)))
    source = open_source(BuildOptions(tmp_path / "8b", max_batch_size=1, device="cpu", dtype="bfloat16"))
    planner = source.planner(ModelParallel(), GB)
    assert planner.weights.total == pytest.approx(14e9, rel=0.01)
    files, touched, inside = set(), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(".safetensors") and str(tmp_path) in line  # and not what other tests have open
            files |= {line.split()[-1]} if inside else set()
        if inside and line.startswith("Rss:"):
            touched += int(line.split()[1]) * 1024
    assert len(files) == 33
    assert touched < 0.002 * planner.weights.total


def test_ranks_share_the_memory_of_their_host() -> None:
    alone, shared, to_start = free_bytes(CPU, 1), free_bytes(CPU, 4), free_bytes(CPU, 4, started=1)
    assert shared == pytest.approx(alone / 4, rel=0.05)
    assert to_start == pytest.approx((alone - 3 * PROCESS) / 4, rel=0.05)


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_leaves_what_its_limit_and_file_pages_allow(tmp_path: Path, version: int) -> None:
    """The tightest of a group and its parents counts, and a group that the container does not see does not."""
    names = [("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"), ("memory.max", "memory.current", "")]
    limit, used, prefix = names[version - 1]
    mounted = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    (tmp_path / "proc/self").mkdir(parents=True)
    line = "7:cpu:/x\n4:memory:/pod/box/unseen\n" if version == 1 else "0::/pod/box/unseen\n"
    (tmp_path / "proc/self/cgroup").write_text(line)
    for folder, most in ((mounted, "max"), (mounted / "pod", "5000"), (mounted / "pod/box", "9000")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text("3000\n")
        (folder / "memory.stat").write_text(f"{prefix}inactive_file 500\n{prefix}active_file 100\nanon 7\n")
    assert min(cgroups_free(tmp_path)) == 5000 - 3000 + 600


def test_a_limit_of_addresses_is_one_of_memory() -> None:
    """A cache is allocated before it is written: beyond `ulimit -v` that failed."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux tells what addresses are used")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000, limits[1]))
        free = free_bytes(CPU, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert free == pytest.approx(200_000_000, rel=0.1)


@pytest.mark.parametrize(("mode", "free"), [(0, UNKNOWN), (2, 500 * 1024)])
def test_where_no_more_is_promised_than_there_is_half_of_that_is_free(tmp_path: Path, mode: int, free: int) -> None:
    (tmp_path / "proc/sys/vm").mkdir(parents=True)
    (tmp_path / "proc/sys/vm/overcommit_memory").write_text(f"{mode}\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nCommitLimit:  3000 kB\nCommitted_AS:   2000 kB\n")
    assert commitable(tmp_path) == free
    assert commitable(tmp_path / "elsewhere") == UNKNOWN


def test_no_control_groups_are_no_limit(tmp_path: Path) -> None:
    assert cgroups_free(tmp_path) == []


def test_macos_counts_free_and_inactive_pages() -> None:
    text = (
        "Mach Virtual Memory Metrics: (page size of 16384 bytes)\n"
        "Pages free:                               10.\nPages active:                            400.\n"
        "Pages inactive:                           20.\nPages speculative:                         3.\n"
    )
    assert _vm_stat_free(text) == 33 * 16384
    assert _vm_stat_free("") == UNKNOWN
