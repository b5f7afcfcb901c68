"""Logits equal those of an independent implementation in plain loops."""

from __future__ import annotations

import pytest
import torch

from tests.architectures import ARCHITECTURES, SEQLENS
from tests.checkpoints import random_state
from tests.models import one_pass, random_tokens, transformer
from tests.reference import reference_logits


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_logits_equal_the_reference(name: str) -> None:
    args = ARCHITECTURES[name]
    state = random_state(args)
    tokens = random_tokens(3, SEQLENS[name], vocab_size=args.vocab_size)
    ours = one_pass(transformer(args, state), tokens)
    for row, logits in list(zip(tokens.tolist(), ours, strict=True))[: 1 if args.rope_scaling else 3]:
        theirs = reference_logits(
            state,
            row,
            n_heads=args.n_heads,
            n_kv_heads=args.n_kv_heads,
            norm_eps=args.norm_eps,
            rope_theta=args.rope_theta,
            scaling=args.rope_scaling,
        )
        torch.testing.assert_close(logits.double(), theirs, rtol=0, atol=1e-4)
