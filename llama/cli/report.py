"""What a run cost, worded for people."""

from __future__ import annotations

import logging

from llama.engine.metrics import peak_memory_mib
from llama.generation import Llama

log = logging.getLogger("llama")


def report(llm: Llama, longest: tuple[int, int] | None = None) -> None:
    """Log speeds, bandwidth and peak memory of this rank, how full the context is, and what speculation gave.

    longest: tokens of the prompt and of the completion of the longest text.
    """
    metrics = llm.metrics
    context = ""
    if longest is not None:
        limit = llm.model.args.max_seq_len
        context = f"; context: prompt {longest[0]} + completion {longest[1]} of {limit} tokens"
    log.info(
        "prefill %d tokens%s at %.1f tok/s; decode %d tokens at %.1f tok/s, %.2f GB/s of weights; "
        "peak memory %.0f MiB%s",
        metrics.prompt_tokens,
        f" ({metrics.reused_tokens} more reused)" if metrics.reused_tokens else "",
        metrics.prefill_tok_s,
        metrics.decoded_tokens,
        metrics.decode_tok_s,
        metrics.bandwidth_gb_s(llm.model.weight_bytes),
        peak_memory_mib(llm.model.device),
        context,
    )
    if metrics.proposed:
        log.info(
            "speculation: %d of %d proposals accepted (%.0f %%)%s%s",
            metrics.accepted,
            metrics.proposed,
            100 * metrics.accepted / metrics.proposed,
            f", {metrics.speculation_gain:.2f} x the plain speed" if metrics.speculation_gain else "",
            f"; off for {metrics.backoff_tokens} tokens, as it lost" if metrics.backoff_tokens else "",
        )
