"""Whatever way tokens come in - at once, in pieces, one by one, in a batch - their logits are the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from llama.cache import PAGE_SIZE, ForwardBatch, KVCache
from llama.model import Transformer
from llama.rope_scaling import DynamicScaling
from tests.architectures import ARCHITECTURES, SEQLENS
from tests.checkpoints import random_state
from tests.models import one_pass, random_tokens, transformer


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Transformer:
    args = ARCHITECTURES[request.param]
    return transformer(args, random_state(args))


def seqlen_of(model: Transformer) -> int:
    return next(SEQLENS[name] for name, args in ARCHITECTURES.items() if args == model.args)


def assert_same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_one_token_at_a_time_equals_one_pass(model: Transformer) -> None:
    seqlen = seqlen_of(model)
    tokens = random_tokens(3, seqlen, vocab_size=model.args.vocab_size)
    expected = one_pass(model, tokens)
    for prefilled in (0, 1, 3):
        cache = model.new_cache(3, seqlen)
        logits = [model(tokens[:, :prefilled], torch.zeros(3, dtype=torch.long), cache)] if prefilled else []
        for position in range(prefilled, seqlen):
            logits.append(model(tokens[:, position : position + 1], torch.full((3,), position), cache))
        assert_same(torch.cat(logits, dim=1), expected)


@torch.inference_mode()
def test_ragged_pieces_equal_one_pass(model: Transformer) -> None:
    """Each row goes on from a position of its own, with more than one token: the case of chunks and of drafts."""
    seqlen = seqlen_of(model)
    tokens = random_tokens(3, seqlen, vocab_size=model.args.vocab_size)
    expected = one_pass(model, tokens)
    lengths, cache = [0, 0, 0], model.new_cache(3, seqlen + 2)  # padding has a place, too
    for pieces in ((2, 1, 3), (1, 3, 2), (3, 2, 1)):
        longest = max(pieces)
        fed = torch.zeros(3, longest, dtype=torch.long)
        for row, size in enumerate(pieces):
            fed[row, :size] = tokens[row, lengths[row] : lengths[row] + size]
        logits = model(fed, torch.tensor(lengths), cache)
        for row, size in enumerate(pieces):
            assert_same(logits[row, :size], expected[row, lengths[row] : lengths[row] + size])
            lengths[row] += size


@torch.inference_mode()
def test_a_ragged_batch_equals_each_row_alone(model: Transformer) -> None:
    """Short rows are padded with a token that could be real, and then overwrite what it left in the cache."""
    seqlen = seqlen_of(model)
    rows = [tokens.tolist() for tokens in random_tokens(3, seqlen, vocab_size=model.args.vocab_size)]
    rows = [rows[0][:-3], rows[1], rows[2][:1]]
    padded = torch.tensor([row + [99] * (seqlen - len(row)) for row in rows])
    cache = model.new_cache(3, seqlen + 4)
    logits = model(padded, torch.zeros(3, dtype=torch.long), cache)
    for row, row_logits in zip(rows, logits, strict=True):
        assert_same(row_logits[: len(row)], one_pass(model, torch.tensor([row]))[0])
    for newest in ([5, 6, 7], [8, 9, 10], [11, 12, 13]):
        start_pos = torch.tensor([len(row) for row in rows])
        logits = model(torch.tensor(newest)[:, None], start_pos, cache)
        for row, token, row_logits in zip(rows, newest, logits, strict=True):
            row.append(token)
            assert_same(row_logits[0], one_pass(model, torch.tensor([row]))[0, -1])


@torch.inference_mode()
def test_what_the_cache_held_before_does_not_matter(model: Transformer) -> None:
    tokens = random_tokens(3, 7, vocab_size=model.args.vocab_size)
    cache: KVCache = model.new_cache(5, 11)
    cache.keys.fill_(1e4)
    cache.values.fill_(-1e4)
    start = model(tokens[:, :4], torch.zeros(3, dtype=torch.long), cache)
    rest = model(tokens[:, 4:], torch.full((3,), 4), cache)
    assert_same(torch.cat([start, rest], dim=1), one_pass(model, tokens))


@torch.inference_mode()
def test_rows_read_their_own_pages_wherever_they_are(model: Transformer) -> None:
    """Pages in any order, one of them shared, one copied; with tokens of several rows and lengths in one pass."""
    tokens = random_tokens(3, 40, vocab_size=model.args.vocab_size)
    tokens[1, :PAGE_SIZE] = tokens[0, :PAGE_SIZE]
    tokens[2, : PAGE_SIZE + 3] = tokens[0, : PAGE_SIZE + 3]
    cache = model.new_cache(1, 12 * PAGE_SIZE)
    expected = one_pass(model, tokens)

    def run(pages: list[list[int]], rows: list[int], starts: list[int], counts: list[int], run: bool = False) -> None:
        table = torch.tensor(pages, dtype=torch.int32)
        first_pages = [row[0] if run else None for row in pages]
        batch = ForwardBatch.of(cache, table, starts, counts, first_pages)
        new = [tokens[row, start : start + n] for row, start, n in zip(rows, starts, counts, strict=True)]
        logits = model.logits(model.hidden(torch.cat(new), batch)).split(counts)
        for row, start, n, row_logits in zip(rows, starts, counts, logits, strict=True):
            assert_same(row_logits, expected[row, start : start + n])

    run([[3, 4, 5]], [0], [0], [20], run=True)
    run([[3, 4, 5], [3, 9, 1]], [0, 1], [20, PAGE_SIZE], [1, 20])
    cache.copy_page(4, 7, 3)
    run([[3, 4, 5], [3, 9, 1], [3, 7, 8]], [0, 1, 2], [21, PAGE_SIZE + 20, PAGE_SIZE + 3], [1, 1, 18])
    run([[3, 4, 5], [3, 9, 1], [3, 7, 8]], [0, 1, 2], [22, PAGE_SIZE + 21, PAGE_SIZE + 21], [1, 1, 1])


@torch.inference_mode()
def test_dynamic_scaling_takes_each_row_by_its_own_length() -> None:
    """A short row was once stretched as if it were as long as the batch made it."""
    args = dataclasses.replace(ARCHITECTURES["grouped"], rope_scaling=DynamicScaling(4.0, 8))
    model = transformer(args, random_state(args))
    tokens = random_tokens(2, 30, vocab_size=args.vocab_size)
    cache, starts, counts = model.new_cache(2, 32), [0, 0], [30, 5]
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    lengths = torch.tensor(counts).repeat_interleave(torch.tensor(counts))
    batch = ForwardBatch.of(cache, table, starts, counts, [0, 2], lengths)
    long, short = model.logits(model.hidden(torch.cat([tokens[0], tokens[1, :5]]), batch)).split(counts)
    torch.testing.assert_close(short, one_pass(model, tokens[1:, :5])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(long, one_pass(model, tokens[:1])[0], rtol=0, atol=1e-5)
    assert (one_pass(model, tokens)[1, :5] - short).abs().max() > 1e-3
