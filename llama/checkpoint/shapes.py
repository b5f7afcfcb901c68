"""Names and shapes of the tensors that an architecture has, whole, under Meta's names."""

from __future__ import annotations

from llama.config import ModelArgs


def global_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every whole tensor of a model.

    The largest, tables of tokens, are first: while they are loaded, little else is in memory.
    """
    q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    attention = {
        "attention.wq": (q_dim, args.dim),
        "attention.wk": (kv_dim, args.dim),
        "attention.wv": (kv_dim, args.dim),
        "attention.wo": (args.dim, q_dim),
    }
    kinds = ("weight", "bias") if args.layer_norms else ("weight",)
    vectors = {f"{norm}.{kind}": (args.dim,) for norm in ("attention_norm", "ffn_norm") for kind in kinds}
    if args.activation == "xielu":
        vectors["feed_forward.xielu.weight"] = (4,)
    biased = {"attention": args.attention_bias, "feed_forward": args.mlp_bias}
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (args.vocab_size, args.dim)}
    if not args.tied_embeddings:
        shapes["output.weight"] = (args.vocab_size, args.dim)
    for i in range(args.n_layers):
        for name, shape in (attention | _feed_forward_shapes(args, i)).items():
            shapes[f"layers.{i}.{name}.weight"] = shape
            if biased[name.partition(".")[0]] and name != "feed_forward.gate":
                shapes[f"layers.{i}.{name}.bias"] = shape[:1]
        if args.norms_heads(i) and args.qk_norm != "unit":
            dims = (q_dim, kv_dim) if args.qk_norm == "all heads" else (args.head_dim, args.head_dim)
            shapes |= {
                f"layers.{i}.attention.{name}.weight": (dim,)
                for name, dim in zip(("q_norm", "k_norm"), dims, strict=True)
            }
        shapes |= {f"layers.{i}.{name}": shape for name, shape in vectors.items()}
    shapes["norm.weight"] = (args.dim,)
    if args.layer_norms:
        shapes["norm.bias"] = (args.dim,)
    return shapes


def _feed_forward_shapes(args: ModelArgs, layer: int) -> dict[str, tuple[int, ...]]:
    """Return the matrices of a layer's feed-forward, or of its experts: names, without the layer, and shapes."""
    experts = args.experts_of(layer)

    def one(prefix: str, hidden_dim: int) -> dict[str, tuple[int, ...]]:
        up, down = (hidden_dim, args.dim), (args.dim, hidden_dim)
        shapes = {"w1": up, "w2": down, "w3": up} if args.is_gated else {"w2": down, "w3": up}
        return {f"{prefix}.{name}": shape for name, shape in shapes.items()}

    if experts is None:
        return one("feed_forward", args.hidden_dim)
    shapes: dict[str, tuple[int, ...]] = {"feed_forward.gate": (experts.n_experts, args.dim)}
    if experts.shared_hidden_dim is not None:
        shapes |= one("feed_forward.shared", experts.shared_hidden_dim)
    for number in range(experts.n_experts):
        shapes |= one(f"feed_forward.experts.{number}", experts.hidden_dim)
    return shapes
