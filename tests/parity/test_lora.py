"""Adapters change logits as peft's own model does: of floats, of quantized weights, on one rank and on several."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

pytest.importorskip("peft", reason="peft is for tests of adapters")

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from llama.config import ModelArgs
from tests.adapters import MODULES, write_gguf_adapter
from tests.checkpoints import BYTE_VOCAB_SIZE, random_state, write_byte_tokenizer, write_meta
from tests.gguf_files import write_gguf_model
from tests.hugging_face import hugging_face_model
from tests.models import build, one_pass, random_tokens
from tests.parity.test_layer_families import LAYERED
from tests.parity.test_layer_families import made as layered
from tests.parity.test_relatives import made as relative
from tests.parity.test_relatives import write_as_gguf

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ARGS = ModelArgs(dim=96, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=BYTE_VOCAB_SIZE, multiple_of=160)
TIED = dataclasses.replace(ARGS, tied_embeddings=True)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = random_tokens(3, 7, vocab_size=ARGS.vocab_size)

CONFIGS: dict[str, tuple[ModelArgs, dict[str, Any]]] = {
    "all": (ARGS, {"r": 3, "lora_alpha": 8, "target_modules": ALL}),
    "rslora": (ARGS, {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    "patterns": (
        ARGS,
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 5, "up_proj": 3},
            "alpha_pattern": {r"layers\.0\..*proj": 1, "^model.layers.1.mlp.up_proj": 7},
        },
    ),
    "tables": (ARGS, {"r": 3, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "a tied table": (TIED, {"r": 3, "lora_alpha": 8, "target_modules": ["embed_tokens", "v_proj"]}),
    "a tied output": (TIED, {"r": 3, "lora_alpha": 8, "target_modules": ["lm_head", "v_proj"]}),
    "saved whole": (
        TIED,
        {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "input_layernorm"], "lora_alpha": 8},
    ),
    "biases": (dataclasses.replace(ARGS, attention_bias=True), {"target_modules": ["q_proj"], "bias": "all"}),
}


def peft_model(args: ModelArgs, state: dict[str, Tensor], config: dict[str, Any], seed: int = 0) -> PeftModel:
    """A model with an adapter whose numbers are random, as after training."""
    model = get_peft_model(
        hugging_face_model(args, state), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **config)
    )
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora" not in name:  # saved whole
            parameter.data += 0.3 * torch.randn(parameter.shape)
        elif parameter.requires_grad:
            parameter.data = 0.6 * torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5
    return model.eval()


@pytest.fixture(autouse=True)
def own_random_numbers() -> Any:
    """peft draws from torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        yield


@torch.no_grad()
def logits_of(model: PeftModel) -> Tensor:
    return model(TOKENS).logits


FAMILIES = ["qwen2", "granite", "phi3", "phi4 mini", "ernie4_5", "helium", "olmo2", "exaone4", "hunyuan"]
FAMILIES += ["nemotron", "apertus"]


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_of_other_families_change_logits_as_pefts_do(tmp_path: Path, name: str) -> None:
    """Of rows in the family's order, of fused tensors, of norms under other names, and beside multipliers."""
    theirs = (layered if name in LAYERED else relative)(name, vocab_size=BYTE_VOCAB_SIZE)
    theirs.save_pretrained(tmp_path / "base")
    write_byte_tokenizer(tmp_path / "base")
    modules = ["qkv_proj", "gate_up_proj", "o_proj"] if name.startswith("phi") else ALL
    modules = [module for module in modules if module != "gate_proj" or name not in ("nemotron", "apertus")]
    whole = {
        "olmo2": ["post_attention_layernorm", "q_norm"],
        "hunyuan": ["key_layernorm"],
        "nemotron": ["input_layernorm"],
        "apertus": ["feedforward_layernorm"],
    }.get(name)
    config = LoraConfig(
        init_lora_weights=False, task_type="CAUSAL_LM", r=3, lora_alpha=8, target_modules=modules, modules_to_save=whole
    )
    adapted = get_peft_model(theirs, config).eval()
    torch.manual_seed(0)
    for parameter in (each for each in adapted.parameters() if each.requires_grad):
        is_norm = parameter.dim() == 1
        parameter.data = is_norm + 0.6 * torch.randn(parameter.shape) / (1 if is_norm else parameter.shape[-1] ** 0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    found = own_logits(tmp_path / "base", str(tmp_path / "adapter"))
    torch.testing.assert_close(found, logits_of(adapted), rtol=1e-5, atol=1e-4)


def test_a_gguf_adapter_of_another_family_is_that_of_peft(tmp_path: Path) -> None:
    """Its rows are in the order of its architecture, as those of the model; once only Llama's was known."""
    theirs: Any = layered("olmo2", vocab_size=BYTE_VOCAB_SIZE)
    (tmp_path / "base").mkdir()
    write_byte_tokenizer(tmp_path / "base")
    write_as_gguf(tmp_path / "base" / "m.gguf", theirs, "olmo2")
    state = {name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    halves = {
        f"{layer}.{module}": (
            torch.randn(3, columns, generator=generator) / 9,
            torch.randn(rows, 3, generator=generator),
        )
        for layer in range(4)
        for module in MODULES
        for rows, columns in [state[f"layers.{layer}.{module}.weight"].shape]
    }
    norm = torch.rand(96, generator=generator)
    write_gguf_adapter(
        tmp_path / "a.gguf", halves, {"blk.0.post_attention_norm.weight": norm}, arch="olmo2", adapter__lora__alpha=6.0
    )
    for name, (a, b) in halves.items():
        state[f"layers.{name}.weight"] += 2 * b @ a
    state["layers.0.post_attention_layernorm.weight"].copy_(norm)
    found = own_logits(tmp_path / "base" / "m.gguf", str(tmp_path / "a.gguf"), max_seq_len=64)
    torch.testing.assert_close(found, theirs(TOKENS).logits, rtol=1e-5, atol=1e-4)


def test_an_adapter_of_a_table_that_is_scaled_is_refused(tmp_path: Path) -> None:
    theirs = relative("granite", vocab_size=BYTE_VOCAB_SIZE)
    theirs.save_pretrained(tmp_path / "base")
    write_byte_tokenizer(tmp_path / "base")
    adapted = get_peft_model(theirs, LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"embed_tokens, which is scaled as .* is loaded: this is not supported"):
        own_logits(tmp_path / "base", str(tmp_path / "adapter"))


def write(folder: Path, args: ModelArgs, form: str) -> tuple[Path, dict[str, Tensor]]:
    """A model in a format, and what its weights are in floats."""
    state = random_state(args)
    if form == "hf":
        model = hugging_face_model(args, state)
        model.config.architectures = ["LlamaForCausalLM"]
        model.save_pretrained(folder)
        write_byte_tokenizer(folder)
        return folder, state
    if form == "meta":
        write_meta(folder, args, shards=2)
        return folder, state
    folder.mkdir()
    write_byte_tokenizer(folder)
    kind = gguf.GGMLQuantizationType[form]
    return folder / "m.gguf", write_gguf_model(folder / "m.gguf", args, state, kind)


@torch.inference_mode()
def own_logits(path: Path, *lora: str, **options: Any) -> Tensor:
    folder = path if path.is_dir() else path.parent
    return one_pass(build(path, tokenizer_path=folder / "tokenizer.model", lora=lora, **options).model, TOKENS)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", ["hf", "F32"])
def test_logits_are_those_of_peft(tmp_path: Path, name: str, form: str) -> None:
    """A merged model's, too, where peft merges exactly: a tied table it changes at both ends."""
    args, config = CONFIGS[name]
    path, state = write(tmp_path / "model", args, form)
    model = peft_model(args, state, config)
    model.save_pretrained(tmp_path / "adapter")
    expected, plain = logits_of(model), own_logits(path)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(own_logits(path, str(tmp_path / "adapter")), expected, rtol=0, atol=1e-4)
    if not args.tied_embeddings:
        torch.testing.assert_close(logits_of(model.merge_and_unload()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["meta", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("name", ["all", "tables"])
def test_logits_of_quantized_weights_are_those_of_peft_on_their_values(tmp_path: Path, name: str, form: str) -> None:
    """Adapters stay beside blocks; the bound is that of activations of 16 bits. Two adapters, one of another scale."""
    args, config = CONFIGS[name]
    path, state = write(tmp_path / "model", args, form)
    first = peft_model(args, state, config)
    first.save_pretrained(tmp_path / "first")
    peft_model(args, state, CONFIGS["rslora"][1], seed=1).save_pretrained(tmp_path / "second")
    first.load_adapter(str(tmp_path / "second"), "second")
    first.base_model.set_adapter(["default", "second"])  # type: ignore[operator]
    for module in first.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("second", 0.5)
    expected = logits_of(first)
    lora = str(tmp_path / "first"), f"{tmp_path / 'second'}:0.5"
    torch.testing.assert_close(own_logits(path, *lora), expected, rtol=0, atol=1e-4 if form == "meta" else 1e-3)


def test_ranks_compute_what_peft_does(tmp_path: Path) -> None:
    """On 1, 2 and 3 ranks, of floats and of blocks, whose hidden features are padded: 5 blocks on 2 or 3 ranks."""
    args, config = CONFIGS["all"]
    config = config | {"target_modules": [*ALL, "lm_head", "embed_tokens"]}
    jobs, expected = [], {}
    for form in ("hf", "Q8_0"):
        path, state = write(tmp_path / form, args, form)
        model = peft_model(args, state, config)
        model.save_pretrained(tmp_path / f"{form}.adapter")
        expected[form] = logits_of(model)
        for size in (1, 2, 3):
            jobs.append(
                {
                    "folder": str(path),
                    "tokenizer": str(tmp_path / form / "tokenizer.model"),
                    "size": size,
                    "out": str(tmp_path / f"{form}.{size}"),
                    "tokens": TOKENS.tolist(),
                    "prompts": [[5, 6, 7]],
                    "options": {"lora": [str(tmp_path / f"{form}.adapter")]},
                }
            )
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    worker = [sys.executable, "-m", "tests.parity.ranks_worker", str(tmp_path / "jobs.json")]
    done = subprocess.run(worker, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for job in jobs:
        form = Path(job["out"]).name.partition(".")[0]
        for rank in range(job["size"]):
            result = torch.load(f"{job['out']}.{rank}")
            bound = 1e-4 if form == "hf" else 1e-3
            torch.testing.assert_close(result["logits"], expected[form], rtol=0, atol=bound)
