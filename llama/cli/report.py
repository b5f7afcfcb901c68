"""What a run cost, worded for people."""

from __future__ import annotations

import logging

from llama.engine.metrics import peak_memory_mib
from llama.generation import Llama

log = logging.getLogger("llama")


def report(llm: Llama) -> None:
    """Log speeds, bandwidth and peak memory of this rank, and what speculation gave."""
    statistics = llm.statistics
    log.info(
        "prefill %d tokens%s at %.1f tok/s; decode %d tokens at %.1f tok/s, %.2f GB/s of weights; peak memory %.0f MiB",
        statistics.prompt_tokens,
        f" ({statistics.reused_tokens} more reused)" if statistics.reused_tokens else "",
        statistics.prefill_tok_s,
        statistics.decoded_tokens,
        statistics.decode_tok_s,
        statistics.bandwidth_gb_s(llm.model.weight_bytes),
        peak_memory_mib(llm.model.device),
    )
    if statistics.proposed:
        log.info(
            "speculation: %d of %d proposals accepted (%.0f %%)%s%s",
            statistics.accepted,
            statistics.proposed,
            100 * statistics.accepted / statistics.proposed,
            f", {statistics.speculation_gain:.2f} x the plain speed" if statistics.speculation_gain else "",
            f"; off for {statistics.resting_tokens} tokens, as it lost" if statistics.resting_tokens else "",
        )
