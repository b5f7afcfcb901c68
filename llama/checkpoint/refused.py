"""Families of models that are no Llama inside, and why: for the message that refuses them."""

_NORMS = "norms queries and keys"
_EXPERTS = "is a mixture of experts"
_SIGHT = "sees pictures: only text models are supported"
# What others compute that is not Llama's computation, by the model_type of config.json, GGUF's name or both.
REFUSED = {
    "olmo": "has layer norms without weights",
    "phi": "has layer norms, and attention beside the feed-forward",
    "phi2": "has layer norms, and attention beside the feed-forward",
    "starcoder2": "has another activation (GELU) and no gate",
    "gemma": "has another activation (GELU), and norms of another kind",
    "gemma2": "has another activation (GELU), norms of outputs and capped scores",
    "gemma3_text": f"{_NORMS}, and has another activation (GELU)",
    "gemma3": f"{_NORMS}, and has another activation (GELU)",
    "cohere": "has layer norms, and attention beside the feed-forward",
    "cohere2": "has layer norms, and attention beside the feed-forward",
    "command-r": "has layer norms, and attention beside the feed-forward",
    "minicpm3": "has latent attention",
    "deepseek_v2": f"has latent attention, and {_EXPERTS}",
    "deepseek_v3": f"has latent attention, and {_EXPERTS}",
    "deepseek2": f"has latent attention, and {_EXPERTS}",
    **dict.fromkeys(
        (
            "qwen2_moe", "qwen2moe", 
            "granitemoeshared", "granitemoehybrid", "phimoe", "ernie4_5_moe", "ernie4_5-moe", "exaone_moe",
            "gpt_oss", "gpt-oss", "minimax",
        ),
        _EXPERTS,
    ),
    **dict.fromkeys(("mllama", "llava", "qwen2_vl", "qwen2vl", "qwen2_5_vl", "idefics3"), _SIGHT),
}  # fmt: skip
