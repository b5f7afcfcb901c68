"""A peer as a worker of peers.py: options as JSON in argv; each line of stdin asks for a run, and its ms a step.

Its weights are random, in the same shape and dtype.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SEQLENS_ABOVE = 8  # positions more than are used, as gpt-fast rounds their number up


class Peer(Protocol):
    def begin(self) -> None:
        """Read the context anew."""
        ...

    def run(self) -> None:
        """Make the tokens; the device may still be at it."""
        ...


class Transformers:
    """Its model over a static cache, its decode step compiled as its `generate` does."""

    def __init__(self, options: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        import transformers

        args = options["args"]
        config = transformers.LlamaConfig(
            vocab_size=args["vocab_size"],
            hidden_size=args["dim"],
            intermediate_size=args["hidden_dim"],
            num_hidden_layers=args["n_layers"],
            num_attention_heads=args["n_heads"],
            num_key_value_heads=args["n_kv_heads"],
            head_dim=args["head_dim"],
            rms_norm_eps=args["norm_eps"],
            max_position_embeddings=args["max_seq_len"],
            tie_word_embeddings=args["tied_embeddings"],
            rope_parameters={"rope_type": "default", "rope_theta": args["rope_theta"]},
        )
        with device:
            self.model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.n_steps = options["n_steps"]
        self.prompt = torch.randint(args["vocab_size"], (1, options["context"]), device=device)
        self.cache = transformers.StaticCache(config=config, max_cache_len=options["context"] + self.n_steps + 1)
        self.step: Callable[[torch.Tensor], torch.Tensor] = self.plain_step
        if device.type == "cuda":
            self.step = torch.compile(self.plain_step, mode="reduce-overhead")

    def plain_step(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def begin(self) -> None:
        self.cache.reset()
        self.token = self.plain_step(self.prompt)

    def run(self) -> None:
        for _ in range(self.n_steps):
            torch.compiler.cudagraph_mark_step_begin()
            self.token = self.step(self.token).clone()  # the next step writes over what this one gave


class GptFast:
    """The `model.py` and `generate.py` of a checkout of gpt-fast."""

    def __init__(self, options: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        sys.path.insert(0, options["path"])
        model_module = cast(Any, importlib.import_module("model"))
        self.generate = cast(Any, importlib.import_module("generate"))
        args = options["args"]
        shape = {
            "block_size": options["context"] + options["n_steps"] + SEQLENS_ABOVE,
            "vocab_size": args["vocab_size"],
            "n_layer": args["n_layers"],
            "n_head": args["n_heads"],
            "n_local_heads": args["n_kv_heads"],
            "dim": args["dim"],
            "intermediate_size": args["hidden_dim"],
            "rope_base": args["rope_theta"],
            "norm_eps": args["norm_eps"],
        }
        known = {field.name for field in dataclasses.fields(model_module.ModelArgs)}
        assert shape.keys() <= known, f"its ModelArgs has no {', '.join(shape.keys() - known)}"
        with torch.device("meta"):
            model = model_module.Transformer(model_module.ModelArgs(**shape))
        self.model = model.to(dtype).to_empty(device=device).eval()
        for weight in self.model.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5)
        with device:
            self.model.setup_caches(max_batch_size=1, max_seq_length=shape["block_size"])
        if device.type == "cuda":
            step = torch.compile(self.generate.decode_one_token, mode="reduce-overhead", fullgraph=True)
            self.generate.decode_one_token = step
        self.device, self.context, self.n_steps = device, options["context"], options["n_steps"]

    def begin(self) -> None:
        """Nothing: what keys hold takes no time."""

    def run(self) -> None:
        token = torch.ones(1, 1, dtype=torch.int, device=self.device)
        position = torch.tensor([self.context], dtype=torch.int, device=self.device)
        self.generate.decode_n_tokens(self.model, token, position, self.n_steps, temperature=0.8, top_k=200)


KINDS: dict[str, Callable[..., Peer]] = {"transformers": Transformers, "gpt_fast": GptFast}


@torch.no_grad()
def serve(options: dict[str, Any], said: Any) -> None:
    device = torch.device(options["device"])
    peer = KINDS[options["peer"]](options, device, DTYPES[options["dtype"]])
    for _ in range(3):  # it compiles, records, and is warm
        peer.begin()
        peer.run()
    print(json.dumps({"ready": True}), file=said, flush=True)
    for _ in sys.stdin:
        peer.begin()
        synchronize(device)
        start = time.perf_counter()
        peer.run()
        synchronize(device)
        print(json.dumps({"ms": 1e3 * (time.perf_counter() - start) / options["n_steps"]}), file=said, flush=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    said = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):  # a peer may print
            serve(json.loads(sys.argv[1]), said)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        print(json.dumps({"error": f"{type(error).__name__}: {text}"}), file=said, flush=True)


if __name__ == "__main__":
    main()
