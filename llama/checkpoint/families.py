"""Families of models that are a Llama inside: a row of a table says what each calls otherwise, and folds.

Knows nothing of files. Readers take the differences away, so that `llama.model` has one computation for all of them.
"""

from __future__ import annotations

from dataclasses import replace

from llama.checkpoint.family import ATTENTION, FEED_FORWARD, LLAMA_BIASES, Family

_MIXTRAL_NAMES = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}


# Names of norms of what attention and feed-forward add, and of those that Llama has in their place.
_OUTPUT_NORMS = {
    "hf": {
        ".post_attention_layernorm.": ".input_layernorm.",
        ".post_feedforward_layernorm.": ".post_attention_layernorm.",
    },
    "gguf": {".post_attention_norm.": ".attn_norm.", ".post_ffw_norm.": ".ffn_norm."},
}


# What names of a model of text have more, where it is part of one that sees pictures.
_BESIDE_PICTURES = {"language_model.": ""}

_OLMO = Family(
    ("Olmo2ForCausalLM",),
    defaults={"rms_norm_eps": 1e-5},
    biases=dict.fromkeys(ATTENTION, "attention_bias"),
    fields={"qk_norm": "all heads", "output_norms": True},
    hf_names=_OUTPUT_NORMS["hf"],
    gguf="olmo2",
    gguf_rows="halves",
    gguf_names=_OUTPUT_NORMS["gguf"],
)

# Every key that a config.json of these always has needs no default here.
FAMILIES: dict[str, Family] = {
    "llama": Family(("LlamaForCausalLM", "LLaMAForCausalLM")),
    "mistral": Family(
        ("MistralForCausalLM",),
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        window="all",
        hf_names=_BESIDE_PICTURES,
    ),
    "ministral": Family(
        ("MinistralForCausalLM",),
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        biases={},
        window="listed",
    ),
    "ministral3": Family(
        ("Ministral3ForCausalLM",),
        defaults={
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "num_key_value_heads": 8,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        biases={},
        window="all",
        rope_keys=("llama_4_scaling_beta",),
        hf_names=_BESIDE_PICTURES,
        gguf="mistral3",
    ),
    "qwen2": Family(
        ("Qwen2ForCausalLM",),
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},
        biases=dict.fromkeys(("wq", "wk", "wv"), True),
        window="if used",
        gguf="qwen2",
        gguf_rows="halves",
    ),
    "qwen3": Family(
        ("Qwen3ForCausalLM",),
        defaults={"head_dim": 128, "num_key_value_heads": 32, "sliding_window": 4096},
        biases=dict.fromkeys(ATTENTION, "attention_bias"),
        fields={"qk_norm": "head"},
        window="if used",
        gguf="qwen3",
        gguf_rows="halves",
    ),
    "olmo2": _OLMO,
    "olmo3": replace(
        _OLMO,
        architectures=("Olmo3ForCausalLM",),
        defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 500000.0},
        window="before last of four",
        rope_keys=("sliding_attention",),
    ),
    "exaone4": Family(
        ("Exaone4ForCausalLM",),
        defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": 32, "sliding_window": 4096, "sliding_window_pattern": 4},
        biases={},
        fields={"qk_norm": "head", "output_norms": True},
        window="pattern",
        unrotated="without window",
        hf_names=_OUTPUT_NORMS["hf"],
        gguf="exaone4",
        gguf_rows="halves",
        gguf_names=_OUTPUT_NORMS["gguf"],
    ),
    "hunyuan_v1_dense": Family(
        ("HunYuanDenseV1ForCausalLM",),
        defaults={"rms_norm_eps": 1e-5},
        biases=dict.fromkeys(ATTENTION, "attention_bias"),
        fields={"qk_norm": "rotated head"},
        rope_keys=("alpha",),
        hf_names={".query_layernorm.": ".q_norm.", ".key_layernorm.": ".k_norm."},
        gguf="hunyuan-dense",
        gguf_rows="halves",
    ),
    "smollm3": Family(
        ("SmolLM3ForCausalLM",),
        defaults={"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2000000.0},
        window="unrotated if used",
        unrotated="listed",
        gguf="smollm3",
    ),
    "seed_oss": Family(
        ("SeedOssForCausalLM",),
        defaults={"attention_bias": True, "head_dim": 128, "num_key_value_heads": 8},
        biases={**LLAMA_BIASES, "wo": "attention_out_bias"},
        gguf="seed_oss",
        gguf_rows="halves",
        gguf_names={".post_attention_norm.": ".ffn_norm."},
    ),
    "granite": Family(("GraniteForCausalLM",), is_scaled=True, gguf="granite"),
    "minicpm": Family(
        ("MiniCPMForCausalLM",),
        defaults={"tie_word_embeddings": True},
        biases=dict.fromkeys(ATTENTION, "attention_bias"),
        refused=dict.fromkeys(("num_experts", "sparse_config"), "only dense models with full attention are"),
        is_scaled=True,
        gguf="minicpm",
    ),
    "phi3": Family(
        ("Phi3ForCausalLM",),
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        biases={},
        window="all",
        is_partly_rotated=True,
        gguf="phi3",
        gguf_rows="halves",
        gguf_gate_in_up=True,
    ),
    "internlm3": Family(
        ("InternLM3ForCausalLM", "LlamaForCausalLM"),
        keys={"attention_bias": "qkv_bias", "mlp_bias": "bias"},
        defaults={"rms_norm_eps": 1e-5, "head_dim": 128, "num_key_value_heads": 2, "max_position_embeddings": 32768},
        biases={**LLAMA_BIASES, "wo": "mlp_bias"},
    ),
    "ernie4_5": Family(
        ("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
        keys={"attention_bias": "use_bias", "mlp_bias": "use_bias"},
        defaults={
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "head_dim": 128,
            "num_key_value_heads": 2,
            "rope_theta": 500000.0,
        },
        hf_rows="neighbours",
        gguf="ernie4_5",
    ),
    "helium": Family(
        ("HeliumForCausalLM",),
        defaults={"rms_norm_eps": 1e-8, "head_dim": 128, "num_key_value_heads": 20, "rope_theta": 100000.0},
        biases={**dict.fromkeys(("wq", "wk", "wv"), "attention_bias"), **dict.fromkeys(FEED_FORWARD, "mlp_bias")},
        hf_rows="neighbours",
    ),
    "cwm": Family(
        ("CwmForCausalLM",),
        defaults={
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "num_key_value_heads": 8,
            "sliding_window": 8192,
            "rope_theta": 1000000.0,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1000000.0,
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        biases=dict.fromkeys(FEED_FORWARD, "mlp_bias"),
        window="after first of four",
    ),
    "exaone": Family(
        ("ExaoneForCausalLM",),
        keys={
            "num_hidden_layers": "num_layers",
            "rms_norm_eps": "layer_norm_epsilon",
            "hidden_act": "activation_function",
        },
        defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": True},
        biases={},
        hf_names={
            "transformer.h.": "model.layers.",
            "transformer.wte.": "model.embed_tokens.",
            "transformer.ln_f.": "model.norm.",
            ".attn.attention.out_proj.": ".self_attn.o_proj.",
            ".attn.attention.": ".self_attn.",
            ".mlp.c_fc_0.": ".mlp.gate_proj.",
            ".mlp.c_fc_1.": ".mlp.up_proj.",
            ".mlp.c_proj.": ".mlp.down_proj.",
            ".ln_1.": ".input_layernorm.",
            ".ln_2.": ".post_attention_layernorm.",
        },
        gguf="exaone",
        gguf_rows="halves",
    ),
    "iquestcoder": Family(
        ("IQuestCoderForCausalLM", "LlamaForCausalLM"),
        defaults={"rms_norm_eps": 1e-5, "head_dim": 128, "num_key_value_heads": 8},
    ),
    "mixtral": Family(
        ("MixtralForCausalLM",),
        keys={"moe_intermediate_size": "intermediate_size"},
        defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "rope_theta": 1e6},
        biases={},
        window="all",
        router="softmax of chosen",
        hf_names=_MIXTRAL_NAMES,
    ),
    "qwen3_moe": Family(
        ("Qwen3MoeForCausalLM",),
        defaults={"num_key_value_heads": 4, "norm_topk_prob": False},
        biases=dict.fromkeys(ATTENTION, "attention_bias"),
        fields={"qk_norm": "head"},
        router="softmax of chosen",
        gguf="qwen3moe",
        gguf_rows="halves",
    ),
    "olmoe": Family(
        ("OlmoeForCausalLM",),
        keys={"moe_intermediate_size": "intermediate_size"},
        defaults={"rms_norm_eps": 1e-5, "norm_topk_prob": False},
        biases=dict.fromkeys(ATTENTION, "attention_bias"),
        fields={"qk_norm": "all heads"},
        router="softmax",
        gguf="olmoe",
        gguf_rows="halves",
    ),
    "granitemoe": Family(
        ("GraniteMoeForCausalLM",),
        keys={"moe_intermediate_size": "intermediate_size"},
        biases=dict.fromkeys(ATTENTION, "attention_bias"),
        is_scaled=True,
        router="softmax of chosen",
        hf_names={
            ".block_sparse_moe.input_linear.": ".mlp.experts.gate_up_proj.",
            ".block_sparse_moe.output_linear.": ".mlp.experts.down_proj.",
            ".block_sparse_moe.router.layer.": ".mlp.gate.",
            ".block_sparse_moe.": ".mlp.",
        },
        gguf="granitemoe",
    ),
    "llama4_text": Family(
        ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
        keys={
            "moe_intermediate_size": "intermediate_size",
            "shared_expert_intermediate_size": "intermediate_size",
            "intermediate_size": "intermediate_size_mlp",
        },
        defaults={
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "num_key_value_heads": 8,
            "rope_theta": 500000.0,
            "attention_chunk_size": 8192,
        },
        biases=dict.fromkeys(ATTENTION, "attention_bias"),
        unrotated="listed",
        router="sigmoid of input",
        hf_rows="neighbours",
        hf_names={**_BESIDE_PICTURES, ".feed_forward.": ".mlp.", ".mlp.router.": ".mlp.gate."},
        hf_transposes_experts=True,
        gguf="llama4",
    ),
    "telechat3": Family(("TeleChat3ForCausalLM", "Telechat3ForCausalLM")),
    "arcee": Family(
        ("ArceeForCausalLM",), defaults={"rms_norm_eps": 1e-5}, fields={"activation": "relu2"}, gguf="arcee"
    ),
    "nemotron": Family(
        ("NemotronForCausalLM",),
        keys={"rms_norm_eps": "norm_eps"},
        defaults={"rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
        fields={"activation": "relu2", "layer_norms": True},
        is_partly_rotated=True,
        hf_norm_offset=1.0,
        gguf="nemotron",
        gguf_rows="halves",
    ),
    "apertus": Family(
        ("ApertusForCausalLM",),
        defaults={
            "rms_norm_eps": 1e-5,
            "rope_theta": 12000000.0,
            "max_position_embeddings": 65536,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 12000000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
        },
        biases=dict.fromkeys(ATTENTION, "attention_bias"),
        fields={"activation": "xielu", "qk_norm": "head"},
        refused={"post_norm": "only norms of what goes into a layer's parts are"},
        hf_names={
            ".attention_layernorm.": ".input_layernorm.",
            ".feedforward_layernorm.": ".post_attention_layernorm.",
        },
        gguf="apertus",
        gguf_rows="halves",
    ),
    "stablelm": Family(
        ("StableLmForCausalLM",),
        keys={"rms_norm_eps": "layer_norm_eps", "attention_bias": "use_qkv_bias"},
        defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": 32, "partial_rotary_factor": 0.25},
        biases=dict.fromkeys(("wq", "wk", "wv"), "attention_bias"),
        fields={"layer_norms": True},
        refused={
            "use_parallel_residual": "only attention before the feed-forward is",
            "qk_layernorm": "only models without norms of queries and keys are",
        },
        is_partly_rotated=True,
        gguf="stablelm",
        gguf_rows="halves",
    ),
}
# OLMo 3 is OLMo 2 in GGUF, with windows.
GGUF_FAMILIES = {"llama": FAMILIES["llama"]} | {row.gguf: row for row in FAMILIES.values() if row.gguf}


def supported() -> str:
    """Return the names of all families, for a message."""
    return ", ".join(FAMILIES)
