"""What a run cost: tokens, seconds and bytes, counted where the work is done and worded for people."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch


@dataclass
class Metrics:
    """Sums over all calls. A decode step reads every weight once and makes a token or more for each running row."""

    prompt_tokens: int = 0  # computed
    reused_tokens: int = 0  # of prompts that began like one in the cache
    prefill_seconds: float = 0.0
    decoded_tokens: int = 0  # by decode steps: a row's first token comes out of its prefill
    decode_steps: int = 0
    decode_seconds: float = 0.0
    proposed: int = 0  # tokens that speculation proposed, and those of them that were right
    accepted: int = 0
    plain_tokens: int = 0  # of decoded_tokens, by steps without proposals where speculation is on
    plain_seconds: float = 0.0
    backoff_tokens: int = 0  # of plain_tokens, while speculation backed off because it lost

    def add_speculative_step(self, seconds: float, tokens: int, proposed: int, accepted: int, backs_off: bool) -> None:
        """Count a step that could propose, and the tokens that it made."""
        self.decode_seconds += seconds
        self.decode_steps += 1
        self.decoded_tokens += tokens
        self.proposed += proposed
        self.accepted += accepted
        if proposed == 0:
            self.plain_seconds += seconds
            self.plain_tokens += tokens
            self.backoff_tokens += tokens * backs_off

    @property
    def speculation_gain(self) -> float:
        """Tokens a second of all decode steps against those of plain ones; 0 where one of them is not known."""
        plain_tok_s = self.plain_tokens / self.plain_seconds if self.plain_seconds else 0.0
        return self.decode_tok_s / plain_tok_s if plain_tok_s else 0.0

    @property
    def prefill_tok_s(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tok_s(self) -> float:
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def bandwidth_gb_s(self, weight_bytes: int) -> float:
        """GB/s of weights read while decoding, by a rank that holds `weight_bytes`."""
        return weight_bytes * self.decode_steps / self.decode_seconds / 1e9 if self.decode_seconds else 0.0


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: allocated on a CUDA device, else resident in this process; 0 where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # macOS counts bytes, Linux KiB
