"""What a damaged file says that the whole one does not, and whether a model may load it without a word.

Weights and vocabularies have no checksums in most formats, so another value there is another model, and fine. But what
describes them must not be ignored: a value of a wrong type, a key that is not known, a tensor that lies elsewhere.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping
from typing import Any

from tests.fuzz.structures import parse_gguf
from tests.fuzz.trial import Outcome

# Keys whose values, where they are valid, decide what a model says: another value may give another text.
MEANINGFUL = {
    "params.json": {
        "norm_eps", "rope_theta", "n_heads", "n_kv_heads", "head_dim", "use_scaled_rope", "quantization_args",
        "lora_args",
    },
    "config.json": {
        "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "num_attention_heads", "num_key_value_heads",
        "head_dim", "eos_token_id", "architectures", "model_type", "sliding_window", "tie_word_embeddings",
        "quantization_config", "use_sliding_window", "max_window_layers", "layer_types", "partial_rotary_factor",
        "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "attention_bias",
        "mlp_bias",
    },
    "quant_config.json": set(),
    "generation_config.json": {"eos_token_id"},
    "tokenizer_config.json": {
        "bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_prefix_space", "legacy",
        "tokenizer_class", "additional_special_tokens", "extra_special_tokens", "added_tokens_decoder",
    },
    "model.gguf": {
        "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base", "llama.attention.head_count",
        "llama.attention.head_count_kv", "llama.embedding_scale", "llama.residual_scale", "llama.attention.scale",
        "llama.logit_scale", "general.architecture", "llama.attention.key_length", "llama.rope.dimension_count",
        "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.scores",
        "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.bos_token_id", "weights",
        "tokenizer.ggml.eos_token_id", "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.remove_extra_whitespaces",
    },
    "tokenizer.json": {"model", "normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens"},
    "special_tokens_map.json": {"bos_token", "eos_token"},
    "safetensors": {"weights", "dtype", "data_offsets"},
}  # fmt: skip

# Keys that are not read, so that their values may be anything; of GGUF, whatever does not begin like these.
UNREAD = {
    "config.json": {
        "bos_token_id", "pad_token_id", "torch_dtype", "dtype", "initializer_range", "use_cache", "sliding_window",
        "transformers_version", "pretraining_tp", "attention_dropout", "max_position_embeddings", "model_type",
    },
    "model.gguf": {"weights", "tensors", "llama.vocab_size", "llama.context_length", "tokenizer.ggml.padding_token_id"},
    "generation_config.json": {"bos_token_id", "pad_token_id"},
    "tokenizer_config.json": {"model_max_length", "clean_up_tokenization_spaces", "tokenizer_class", "add_eos_token"},
    "tokenizer.json": {"version", "truncation", "padding"},
    "model.safetensors.index.json": {"metadata"},
}  # fmt: skip
# Of GGUF's keys, where other families have Llama's under names of their own.
FAMILIES = re.compile("^(qwen2|granite)[.]")
READ_PREFIXES = ("llama.", "tokenizer.", "general.architecture", "general.alignment", "split.")
# How keys begin that are refused, or told of, where they are not known.
TOLD_OF = {"params.json": ("",), "config.json": ("",), "model.gguf": ("llama.", "tokenizer.")}


def silent(file: str, original: bytes, damaged: bytes, outcome: Outcome) -> str:
    """Say what a model that loaded should have told of, or return nothing."""
    if outcome.warnings or original == damaged or file == "tokenizer.model" or file.endswith(".jinja"):
        return ""
    if file.endswith((".pth", ".bin")):
        return "" if _pickle_is_whole(damaged) else "silent: the checksum of the pickle is wrong"
    name = "safetensors" if file.endswith(".safetensors") else file
    before, after = _claims(file, original), _claims(file, damaged)
    changed = {key for key in before.keys() | after.keys() if not _equal(before.get(key), after.get(key))}
    unread = UNREAD.get(name, set())
    wrong = [
        key for key in sorted(changed & after.keys() & before.keys() - unread) if not _fits(before[key], after[key])
    ]
    if wrong:
        return f"silent: {wrong[0]} is {after[wrong[0]]!r:.80}, and was {before[wrong[0]]!r:.80}"
    new = sorted(key for key in after.keys() - before.keys() if key.startswith(TOLD_OF.get(file, ("\0",))))
    if new:
        return f"silent: the key {new[0]!r:.80} is not known"
    if outcome.kind == "changed" and not changed & MEANINGFUL.get(name, set()):
        return f"silent: another text, but the file differs in {sorted(changed)} alone"
    return ""


def _claims(file: str, data: bytes) -> Mapping[str, Any]:
    """Return what a file says, by keys whose values are compared."""
    if file.endswith(".gguf"):
        return _gguf_claims(data)
    if not file.endswith(".safetensors"):
        return dict(json.loads(data))
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    claims: dict[str, Any] = {"weights": data[8 + size :]}
    for key in ("dtype", "data_offsets", "shape"):
        claims[key] = {name: entry[key] for name, entry in header.items()}
    return claims


def _gguf_claims(data: bytes) -> Mapping[str, Any]:
    parts = parse_gguf(data)
    read = {FAMILIES.sub("llama.", key.decode(errors="replace")): (code, value) for key, code, value in parts.values}
    claims: dict[str, Any] = {key: value for key, value in read.items() if key.startswith(READ_PREFIXES)}
    # A block type of the same size makes other weights of the same bytes.
    claims["weights"] = parts.data, sorted((name, code) for name, _, code, _ in parts.tensors)
    claims["tensors"] = sorted((name, dims, offset) for name, dims, _, offset in parts.tensors)
    return claims


def _pickle_is_whole(damaged: bytes) -> bool:
    """Return whether the checksum of a zip archive's pickle is right; the older format has none."""
    if not damaged.startswith(b"PK"):
        return True
    try:
        with zipfile.ZipFile(io.BytesIO(damaged)) as archive:
            [name] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            archive.read(name)
    except zipfile.BadZipFile:
        return False
    return True


def _fits(before: Any, after: Any) -> bool:
    """Return whether a value is of a type that the key may have."""
    if isinstance(before, tuple):  # of GGUF: a type code and bytes
        kinds = _gguf_type(before), _gguf_type(after)
        return kinds[0] == kinds[1] or kinds == ("float", "int")
    if after is None or before is None or type(after) is type(before):
        return True
    if isinstance(before, float):
        return type(after) is int
    return {type(before), type(after)} in ({str, dict}, {int, list})  # a token or its object; an id or several


def _gguf_type(value: Any) -> Any:
    """Return the kind of a value's type: integers of any width are one, as are floats; arrays have their items'."""
    code, data = value
    kinds = {**dict.fromkeys((0, 1, 2, 3, 4, 5, 10, 11), "int"), 6: "float", 12: "float"}
    if code == 9:
        item = int.from_bytes(data[:4], "little")
        return "array", kinds.get(item, item)
    return kinds.get(code, code)


def _equal(a: Any, b: Any) -> bool:
    return repr(a) == repr(b)  # 1, 1.0 and True differ, NaN is itself
