"""Adapters are merged into what is read, or stay beside blocks; one that does not fit is told before weights are."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from llama.backends.cpu.build import library
from llama.backends.eager import EagerBackend
from llama.checkpoint import load_weights, open_checkpoint, with_adapters
from llama.checkpoint.load import WeightFormat, read_part
from llama.checkpoint.lora_files import adapter_scale
from llama.cli.convert import main as convert
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from llama.engine.build import plan_run
from llama.engine.options import BuildOptions
from llama.memory.plan import Planner
from llama.model import Transformer
from llama.quantization.weights import BlockWeight, LowRank, QuantizedWeight
from tests.adapters import ATTENTION, PREFIX, merged, random_halves, write_gguf_adapter, write_peft
from tests.checkpoints import BYTE_VOCAB_SIZE, random_state, write_byte_tokenizer, write_meta
from tests.gguf_files import write_gguf_model
from tests.hugging_face import half_split
from tests.models import build, one_pass, random_tokens, transformer
from tests.parity.test_relatives import made as relative
from tests.unit.test_shards_to_ranks import parts_by_hand

CPU = torch.device("cpu")
ARGS = ModelArgs(dim=96, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=BYTE_VOCAB_SIZE, multiple_of=160)
STATE = random_state(ARGS)
HALVES = random_halves(ARGS, STATE)
FACTOR = 2.0  # alpha 6 of rank 3
TOKENS = random_tokens(2, 7, vocab_size=ARGS.vocab_size)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Meta's folder of STATE."""
    folder = tmp_path_factory.mktemp("base")
    write_meta(folder, ARGS)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's folder of HALVES."""
    return write_peft(tmp_path_factory.mktemp("adapter"), ARGS, HALVES)


def write_quantized(folder: Path, kind: str = "Q4_1") -> tuple[Path, dict[str, Tensor]]:
    """A GGUF file of blocks, with its tokenizer, and the values of its tensors."""
    folder.mkdir(exist_ok=True)
    write_byte_tokenizer(folder)
    return folder / "m.gguf", write_gguf_model(folder / "m.gguf", ARGS, STATE, gguf.GGMLQuantizationType[kind])


def loaded(path: Path, *lora: str | Path, parallel: ModelParallel | None = None, **held: Any) -> Transformer:
    """A model of blocks as any backend without kernels would hold them, in fp32."""
    checkpoint = with_adapters(open_checkpoint(path), list(map(str, lora)))
    weight_format = WeightFormat(torch.float32, None, BlockWeight, True)
    parallel = weight_format.with_ffn_multiple(checkpoint, parallel or ModelParallel())
    with torch.device("meta"):
        model = Transformer(checkpoint.args, parallel)
    load_weights(model, checkpoint, CPU, weight_format)
    return model


def low_rank(model: Transformer, linear: str) -> LowRank:
    found = model.get_submodule(linear).low_rank
    assert isinstance(found, LowRank), linear
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_ranks_part_is_its_slice_of_what_is_merged(base: Path, adapter: Path, size: int) -> None:
    """KV heads repeat on 3 and 6 ranks, and hidden features are padded."""
    checkpoint, expected = with_adapters(open_checkpoint(base), [f"{adapter}:0.5"]), merged(STATE, HALVES, FACTOR / 2)
    for name, whole in expected.items():
        for rank, part in enumerate(parts_by_hand(name, whole, ARGS, size)):
            got = read_part(checkpoint, name, ARGS, ModelParallel(rank, size))
            torch.testing.assert_close(got, part, rtol=0, atol=1e-6)
            assert ("norm" in name or "tok_emb" in name or "output" in name) == torch.equal(whole, STATE[name])


@pytest.mark.parametrize("size", [1, 2, 3])
@torch.inference_mode()
def test_ranks_parts_beside_blocks_make_the_whole(tmp_path: Path, adapter: Path, size: int) -> None:
    """Their sum of wo's and w2's, and one below another of the others', without processes."""
    path, _ = write_quantized(tmp_path / "q")
    nothing = {name: torch.zeros(()) for name in STATE}
    expected = {name.removesuffix(".weight"): w for name, w in merged(nothing, HALVES, FACTOR).items()}
    ranks = [loaded(path, adapter, parallel=ModelParallel(rank, size)) for rank in range(size)]
    for name, module in ranks[0].named_modules():
        if isinstance(module, QuantizedWeight) and "layers" in name:
            linear = name.removesuffix(".weight")
            halves = [low_rank(model, linear) for model in ranks]
            products = [each.b @ each.a for each in halves]
            dim = 1 if linear.endswith(("wo", "w2")) else 0
            whole = torch.cat(products, dim)
            if linear.endswith(("wk", "wv")):  # on three ranks each has the KV heads of its query heads, twice
                whole = whole.unflatten(0, (-1, ARGS.head_dim))[[0, -1]].flatten(0, 1)
            torch.testing.assert_close(whole.narrow(dim, 0, expected[linear].shape[dim]), expected[linear])


@torch.inference_mode()
def test_several_adapters_beside_blocks_add_up(tmp_path: Path, adapter: Path) -> None:
    """One of all modules by half, one of attention alone whose rank is another; in fp32, as merged values compute."""
    path, stored = write_quantized(tmp_path / "q")
    other = random_halves(ARGS, STATE, rank=5, modules=ATTENTION, seed=1)
    write_peft(tmp_path / "other", ARGS, other)
    model = loaded(path, f"{adapter}:0.5", tmp_path / "other")
    dense = transformer(ARGS, merged(merged(stored, HALVES, FACTOR / 2), other, 6 / 5))
    torch.testing.assert_close(one_pass(model, TOKENS), one_pass(dense, TOKENS), rtol=0, atol=1e-4)
    ranks = [len(low_rank(model, f"layers.0.{name}").a) for name in ("attention.wq", "feed_forward.w1")]
    assert ranks == [8, 3]


@pytest.mark.skipif(library() is None, reason="no C++ compiler here")
@torch.inference_mode()
def test_a_prompts_bits_do_not_depend_on_how_it_is_cut(tmp_path: Path, adapter: Path) -> None:
    """Nor on threads, which share the rows of A: of two adapters together, whose ranks are 8 and 5, these are 13.

    Few tokens pass through all layers in one call of the kernels, many through each product: adapters did in one.
    """
    path, _ = write_quantized(tmp_path / "q")
    write_peft(tmp_path / "other", ARGS, random_halves(ARGS, STATE, rank=5, modules=ATTENTION, seed=1))
    lora = str(adapter), str(tmp_path / "other")
    model = build(path, tokenizer_path=path.parent / "tokenizer.model", lora=lora).model
    tokens = random_tokens(1, 90, vocab_size=ARGS.vocab_size)
    threads = torch.get_num_threads()
    found = []
    for step, n_threads in ((90, threads), (64, 1), (64, 3), (7, 2), (7, 5), (1, threads)):
        torch.set_num_threads(n_threads)
        cache = model.new_cache(1, 90)
        parts = [model(part, torch.tensor([i * step]), cache) for i, part in enumerate(tokens.split(step, dim=1))]
        found.append(torch.cat(parts, dim=1))
    torch.set_num_threads(threads)
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.1), ("float16", 0.02)])
@torch.inference_mode()
def test_adapters_beside_blocks_work_in_16_bits(tmp_path: Path, adapter: Path, dtype: str, bound: float) -> None:
    """Of few tokens and of many: kernels take the activations of both as they are."""
    path, stored = write_quantized(tmp_path / "q")
    model = build(path, tokenizer_path=path.parent / "tokenizer.model", lora=(f"{adapter}:0.2",), dtype=dtype).model
    dense, plain = transformer(ARGS, merged(stored, HALVES, FACTOR / 5)), transformer(ARGS, stored)
    for tokens in (TOKENS, random_tokens(1, 90, vocab_size=ARGS.vocab_size)):
        expected = one_pass(dense, tokens)
        torch.testing.assert_close(one_pass(model, tokens), expected, rtol=0, atol=bound)
        assert (expected - one_pass(plain, tokens)).abs().max() > 10 * bound


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_plan_counts_adapters(tmp_path: Path, base: Path, adapter: Path, size: int) -> None:
    """Beside blocks they take memory; inside floats none. On the last rank, whose share is padded."""
    path, _ = write_quantized(tmp_path / "q")
    for file, blocks in ((path, True), (base, False)):
        totals = []
        for lora in ((), (str(adapter),)):
            checkpoint = with_adapters(open_checkpoint(file), lora)
            weight_format = WeightFormat(torch.float32, None, BlockWeight, True)
            parallel = weight_format.with_ffn_multiple(checkpoint, ModelParallel(size - 1, size))
            planner = Planner(checkpoint, ARGS, parallel, weight_format, EagerBackend(CPU), free=10**9)
            with torch.device("meta"):
                model = Transformer(ARGS, parallel)
            load_weights(model, checkpoint, CPU, weight_format)
            totals.append(planner.weights.total)
            held = sum(each.nbytes for each in model.parameters()) + sum(
                each.nbytes for module in model.modules() for each in module.buffers(recurse=False)
            )
            assert planner.weights.total == held - sum(each.nbytes for each in model.rope.buffers())
        assert (totals[0] < totals[1]) == blocks


@pytest.mark.parametrize("changes", [{}, {"adapter__lora__alpha": 0.0}])
def test_a_gguf_adapter_is_that_of_peft(tmp_path: Path, base: Path, changes: dict[str, Any]) -> None:
    """Its rows of Q and K are in the order of GGUF's models; as in llama.cpp, no alpha is a factor of 1."""
    write_gguf_adapter(tmp_path / "a.gguf", HALVES, **changes)
    checkpoint = with_adapters(open_checkpoint(base), [f"{tmp_path / 'a.gguf'}:3"])
    for name, whole in merged(STATE, HALVES, 3 if changes else 3 * FACTOR).items():
        torch.testing.assert_close(checkpoint.read(name), whole, rtol=0, atol=1e-5)


def test_a_gguf_adapter_of_the_table_has_a_row_a_token(tmp_path: Path, base: Path) -> None:
    """As llama.cpp looks rows up: A of tokens, B of features. Norms replace the model's."""
    a, b = torch.randn(ARGS.vocab_size, 2), torch.randn(ARGS.dim, 2)
    tensors = {"token_embd.weight.lora_a": a, "token_embd.weight.lora_b": b, "output_norm.weight": torch.ones(96) * 3}
    write_gguf_adapter(tmp_path / "a.gguf", {}, tensors)
    checkpoint = with_adapters(open_checkpoint(base), [str(tmp_path / "a.gguf")])
    expected = STATE["tok_embeddings.weight"] + 3 * (a @ b.t())
    torch.testing.assert_close(checkpoint.read("tok_embeddings.weight"), expected, rtol=0, atol=1e-4)
    assert torch.equal(checkpoint.read("norm.weight"), torch.ones(96) * 3)


def test_an_adapter_of_fused_modules_is_taken_apart(tmp_path: Path, base: Path) -> None:
    """One A for all; B's rows follow each other, those of Q and K in Hugging Face's order."""
    halves = {name: (HALVES["0.self_attn.q_proj"][0], HALVES[name][1]) for name in HALVES}
    fused = {"self_attn.qkv_proj": ATTENTION[:3], "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
    tensors: dict[str, Tensor] = {}
    for module, parts in fused.items():
        rows = [halves[f"0.{part}"][1] for part in parts]
        rows = [
            half_split(row, ARGS.head_dim) if part[-6] in "qk" else row for part, row in zip(parts, rows, strict=True)
        ]
        tensors[f"{PREFIX}0.{module}.lora_A.weight"] = halves["0.self_attn.q_proj"][0].clone()
        tensors[f"{PREFIX}0.{module}.lora_B.weight"] = torch.cat(rows)
    write_peft(tmp_path, ARGS, {}, tensors)
    checkpoint = with_adapters(open_checkpoint(base), [str(tmp_path)])
    changed = {f"0.{part}": halves[f"0.{part}"] for parts in fused.values() for part in parts}
    for name, whole in merged(STATE, changed, FACTOR).items():
        torch.testing.assert_close(checkpoint.read(name), whole, rtol=0, atol=1e-5)


def test_an_adapter_may_be_a_pickle(tmp_path: Path, base: Path, adapter: Path) -> None:
    """With the adapter's name in the tensors' names, as in a state that was saved by hand."""
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in HALVES.items():
        b = half_split(b, ARGS.head_dim) if name.endswith(("q_proj", "k_proj")) else b
        tensors |= {f"{PREFIX}{name}.lora_A.default.weight": a, f"{PREFIX}{name}.lora_B.default.weight": b}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    shutil.copy(adapter / "adapter_config.json", tmp_path)
    one, other = (with_adapters(open_checkpoint(base), [str(each)]) for each in (tmp_path, adapter))
    assert all(torch.equal(one.read(name), other.read(name)) for name in STATE)


@torch.inference_mode()
def test_blocks_are_quantized_again_where_it_is_asked_for(tmp_path: Path) -> None:
    """Those with an adapter, as its values can be in them no other way; others stay as they are."""
    path, stored = write_quantized(tmp_path / "q")
    halves = random_halves(ARGS, STATE, modules=("mlp.down_proj",))
    write_peft(tmp_path / "a", ARGS, halves)
    options = {"tokenizer_path": tmp_path / "q/tokenizer.model", "lora": (str(tmp_path / "a"),)}
    model = build(path, quantize="int8", **options).model
    kinds = {name: each.block_type.name for name, each in model.named_modules() if isinstance(each, QuantizedWeight)}
    assert {kinds.pop(f"layers.{i}.feed_forward.w2.weight") for i in range(2)} == {"Q8_0"}
    assert set(kinds.values()) == {"Q4_1"}
    assert not any(isinstance(module, LowRank) for module in model.modules())
    dense = transformer(ARGS, merged(stored, halves, FACTOR))
    torch.testing.assert_close(one_pass(model, TOKENS), one_pass(dense, TOKENS), rtol=0, atol=0.1)


@pytest.mark.parametrize("form", ["meta", "hf"])
def test_a_converted_model_has_its_adapters_inside(tmp_path: Path, adapter: Path, form: str) -> None:
    path, stored = write_quantized(tmp_path / "q")
    tokenizer = tmp_path / "q/tokenizer.model"
    convert(path, tmp_path / "out", format=form, dtype="float32", lora=(str(adapter),), tokenizer_path=tokenizer)
    found = open_checkpoint(tmp_path / "out")
    for name, whole in merged(stored, HALVES, FACTOR).items():
        torch.testing.assert_close(found.read(name), whole, rtol=0, atol=1e-5)


def test_the_log_says_what_was_merged(
    tmp_path: Path, base: Path, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "llama")
    write_peft(tmp_path / "a", ARGS, HALVES, base_model_name_or_path="meta-llama/Other-1B")
    model = build(base, lora=(str(tmp_path / "a"), f"{adapter}:0.5")).model
    assert f"lora {tmp_path / 'a'} of rank 3, times 1: 14 matrices, trained on meta-llama/Other-1B" in caplog.messages
    assert f"lora {adapter} of rank 3, times 0.5: 14 matrices" in caplog.messages
    assert not any(isinstance(module, LowRank) for module in model.modules())


def test_a_plan_of_a_run_with_adapters_reads_no_weight(base: Path, adapter: Path) -> None:
    table, fits = plan_run(BuildOptions(base, device="cpu", dtype="float32", lora=(str(adapter),)))
    assert fits and str(base) in table


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a", 1.0), ("a:0.5", 0.5), ("a:-2", -2.0), ("with:colon", 1.0), ("with:colon:3", 3.0), ("a:1e-1", 0.1)],
)
def test_a_scale_follows_the_last_colon(tmp_path: Path, text: str, expected: float) -> None:
    for name in ("a", "with:colon"):
        (tmp_path / name).mkdir()
    path, scale = adapter_scale(f"{tmp_path}/{text}")
    assert path.is_dir() and scale == expected


def halves_but(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    return HALVES | {"1.mlp.up_proj": change(*HALVES["1.mlp.up_proj"])}


def config(**keys: Any) -> Callable[[Path], object]:
    return lambda folder: write_peft(folder, ARGS, HALVES, **keys)


def tensors(more: dict[str, Tensor], **keys: Any) -> Callable[[Path], object]:
    return lambda folder: write_peft(folder, ARGS, HALVES, more, **keys)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: None, "does not exist: give an adapter's folder or file"),
    "a text": (lambda folder: folder.write_text("no adapter at all"), "neither a folder of peft's nor a GGUF file"),
    "an empty folder": (lambda folder: folder.mkdir(), "is no adapter: looked for adapter_config.json .*found nothing"),
    "a whole model": (lambda folder: write_meta(folder, ARGS), "looks like a whole model: give that as --ckpt_dir"),
    "a whole GGUF model": (
        lambda file: write_gguf_model(file, ARGS, STATE),
        "is no adapter but a whole model: give it as --ckpt_dir",
    ),
    "another kind": (config(peft_type="LOHA"), "peft_type 'LOHA' is not supported, only LORA"),
    "dora": (config(use_dora=True), "use_dora True is not supported: merge it"),
    "alora": (config(alora_invocation_tokens=[1, 2]), r"alora_invocation_tokens \[1, 2\] is not supported"),
    "pissa": (config(init_lora_weights="pissa"), "init_lora_weights 'pissa' has changed the base model"),
    "no alpha": (config(lora_alpha="much"), "must have numbers for lora_alpha, got 'much'"),
    "a pattern": (config(alpha_pattern={"(": 1}), "alpha_pattern is no regular expression: "),
    "no weights": (
        lambda folder: write_peft(folder, ARGS, HALVES).joinpath("adapter_model.safetensors").rename(folder / "other"),
        "has no weights: looked for adapter_model.safetensors",
    ),
    "no tensors": (lambda folder: write_peft(folder, ARGS, {}), "has no tensors of an adapter"),
    "another tensor": (tensors({f"{PREFIX}0.mlp.magnitude": torch.ones(3)}), "mlp.magnitude is no tensor"),
    "a half": (
        tensors({f"{PREFIX}0.mlp.gate_proj.extra.lora_A.weight": torch.ones(3, 3)}),
        "one of the two matrices of model.layers.0.mlp.gate_proj.extra alone",
    ),
    "other ranks": (
        lambda folder: write_peft(folder, ARGS, halves_but(lambda a, b: (a[:2].clone(), b))),
        r"the matrices of model.layers.1.mlp.up_proj, A \(2, 96\) and B \(\d+, 3\), do not belong together",
    ),
    "other columns": (
        lambda folder: write_peft(folder, ARGS, halves_but(lambda a, b: (a[:, :64].clone(), b))),
        r"is for another model: its model.layers.1.mlp.up_proj has shape \(\d+, 64\), that of .* \(\d+, 96\)",
    ),
    "other rows": (
        lambda folder: write_peft(
            folder, ARGS, halves_but(lambda a, b: (a, b[:64].clone())), base_model_name_or_path="ada/big"
        ),
        r"is for another model, it was trained on ada/big: its model.layers.1.mlp.up_proj has shape \(64, 96\)",
    ),
    "more layers": (
        lambda folder: write_peft(folder, ARGS, {"2.mlp.up_proj": HALVES["1.mlp.up_proj"]}),
        "is for another model: it has model.layers.2.mlp.up_proj, which .* lacks",
    ),
    "another module": (
        lambda folder: write_peft(folder, ARGS, {"0.self_attn.W_pack": HALVES["1.mlp.up_proj"]}),
        "is for another model: it has model.layers.0.self_attn.W_pack, which .* lacks",
    ),
    "new tokens": (
        tensors({"base_model.model.model.embed_tokens.weight": torch.ones(520, 96)}),
        "replaces model.embed_tokens by one of 520 rows, .* has 512: adapters that add tokens are not supported",
    ),
    "another GGUF type": (
        lambda file: write_gguf_adapter(file, HALVES, adapter__type="control"),
        "adapter.type 'control' is not supported, only 'lora' is",
    ),
    "another GGUF model": (
        lambda file: write_gguf_adapter(file, halves_but(lambda a, b: (a, b[:64].clone()))),
        r"is for another model: its blk.1.ffn_up.weight has shape \(64, 96\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_an_adapter_is_told_in_a_line(tmp_path: Path, base: Path, name: str) -> None:
    """Whichever it is, it is named, and no weight is read."""
    write, message = WRONG[name]
    write(tmp_path / "adapter")
    options = BuildOptions(base, device="cpu", lora=(str(tmp_path / "adapter"),))
    with pytest.raises((ValueError, OSError), match=message) as raised:
        plan_run(options)
    assert str(tmp_path / "adapter") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_wrong_scales_and_adapters_given_twice_are_told(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "link").symlink_to(adapter)
    table = {"base_model.model.model.embed_tokens.weight": torch.ones(512, 96)}
    for name in ("one", "other"):
        write_peft(tmp_path / name, ARGS, {}, table)
    for lora, message in (
        ((f"{adapter}:much",), "must be followed by a number, as in .*adapter0:0.5, got 'much'"),
        ((f"{adapter}:nan",), "must be followed by a number"),
        ((f"{adapter}:",), "must be followed by a number, .* got ''"),
        (("",), "lora '' does not exist"),
        ((str(adapter), f"{tmp_path}/link:2"), "is given twice: give it once, with the sum of its scales"),
        ((f"{tmp_path}/one", f"{tmp_path}/other"), "both replace tok_embeddings.weight: give one of them"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            plan_run(BuildOptions(base, device="cpu", lora=lora))
    for path in (adapter, write_gguf_adapter(tmp_path / "a.gguf", HALVES)):
        with pytest.raises(ValueError, match=r"adapter: give its base model as --ckpt_dir, and this .* as --lora"):
            open_checkpoint(path)
    with pytest.raises(ValueError, match="lora must be a list of adapters, got the text 'a'"):
        BuildOptions(base, lora="a")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["qwen2", "granite", "phi3"])
def test_a_gguf_adapter_of_a_family_is_that_of_peft(tmp_path: Path, name: str) -> None:
    """Rows of Q and K lie in the order of the family's own GGUF files, and Phi-3's matrices are fused there as well."""
    model = relative(name)
    model.save_pretrained(tmp_path / "base")
    checkpoint = open_checkpoint(tmp_path / "base")
    shapes = {key: each.shape for key, each in model.state_dict().items() if "_proj.weight" in key}
    halves = {
        key.removeprefix("model.layers.").removesuffix(".weight"): (torch.randn(3, columns), torch.randn(rows, 3))
        for key, (rows, columns) in shapes.items()
    }
    peft = {
        f"{PREFIX}{module}.lora_{half}.weight": each
        for module, pair in halves.items()
        for half, each in zip("AB", pair, strict=True)
    }
    write_peft(tmp_path / "peft", checkpoint.args, {}, peft)
    if name == "granite":  # in Meta's order, unlike the others
        dim, order = checkpoint.args.head_dim, []
        for i in range(dim):
            order.append(i // 2 + (i % 2) * dim // 2)
        for module, (a, b) in halves.items():
            if module.endswith(("q_proj", "k_proj")):
                halves[module] = a, b.unflatten(0, (-1, dim))[:, order].flatten(0, 1)
    write_gguf_adapter(tmp_path / "a.gguf", halves, general__architecture=name)
    expected, found = (with_adapters(checkpoint, [str(tmp_path / file)]) for file in ("peft", "a.gguf"))
    for key in checkpoint.names():
        assert torch.equal(found.read(key), expected.read(key)), key
        is_adapted = key.endswith(".weight") and ("attention.w" in key or "feed_forward" in key)
        assert is_adapted != torch.equal(found.read(key), checkpoint.read(key))
