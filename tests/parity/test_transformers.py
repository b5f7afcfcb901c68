"""Logits equal those of transformers on the same random weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.architectures import ARCHITECTURES, SEQLENS
from tests.checkpoints import random_state
from tests.hugging_face import hugging_face_model
from tests.models import one_pass, random_tokens, transformer


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_logits_equal_transformers(name: str) -> None:
    args, seqlen = ARCHITECTURES[name], SEQLENS[name]
    state = random_state(args)
    tokens = random_tokens(3, seqlen, vocab_size=args.vocab_size)
    theirs = hugging_face_model(args, state)(tokens).logits
    torch.testing.assert_close(one_pass(transformer(args, state), tokens), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", [{"factor": 1.0}, {"old_context_len": 8192}, {"low_freq_factor": 0.5}], ids=str)
@torch.inference_mode()
def test_every_number_of_the_rope_scaling_counts(change: dict[str, float]) -> None:
    """If scaling were ignored on both sides, the comparison above would still pass."""
    args = ARCHITECTURES["scaled_rope"]
    assert args.rope_scaling is not None
    state, tokens = random_state(args), random_tokens(1, SEQLENS["scaled_rope"], vocab_size=args.vocab_size)
    changed = dataclasses.replace(args, rope_scaling=dataclasses.replace(args.rope_scaling, **change))
    theirs = hugging_face_model(args, state)(tokens).logits
    assert (one_pass(transformer(changed, state), tokens) - theirs).abs().max() > 1e-2
