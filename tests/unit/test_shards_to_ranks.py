"""Any number of shards gives any number of ranks the parts that slicing the whole tensors gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.checkpoint.load import read_part
from llama.checkpoint.meta import MetaCheckpoint
from llama.config import ModelArgs
from llama.distributed.groups import ModelParallel
from tests.checkpoints import TINY, write_meta

NINE = ModelArgs(dim=72, n_layers=1, n_heads=9, n_kv_heads=3, vocab_size=512, multiple_of=10)
TWELVE = ModelArgs(dim=96, n_layers=1, n_heads=12, n_kv_heads=4, vocab_size=512, multiple_of=20, head_dim=6)


def parts_by_hand(name: str, whole: Tensor, args: ModelArgs, size: int) -> list[Tensor]:
    """Every rank's part of a whole tensor. KV heads: the one that each query head uses, repeats merged afterwards."""
    if "norm" in name:
        return [whole] * size
    if ".wk." in name or ".wv." in name:
        heads, per_rank, group = whole.split(args.head_dim), args.n_heads // size, args.n_heads // args.n_kv_heads
        parts = []
        for rank in range(size):
            used = [query // group for query in range(rank * per_rank, (rank + 1) * per_rank)]
            for merged in range(per_rank, 0, -1):  # as many equal neighbours as can always be merged
                runs = [used[i : i + merged] for i in range(0, per_rank, merged)]
                if per_rank % merged == 0 and all(len(set(run)) == 1 for run in runs) and group % merged == 0:
                    parts.append(torch.cat([heads[run[0]] for run in runs]))
                    break
        return parts
    dim = 1 if ".wo." in name or ".w2." in name else 0
    missing = -whole.shape[dim] % size
    padded = F.pad(whole, (0, missing) if dim == 1 else (0, 0, 0, missing))
    return list(padded.chunk(size, dim))


@pytest.fixture(scope="module")
def sharded(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[int, int], tuple[MetaCheckpoint, dict[str, Tensor]]]:
    """TINY in every number of shards and both layouts of embeddings."""
    opened = {}
    for shards in (1, 2, 4, 8, 16):
        for embedding_dim in (0, 1):
            folder = tmp_path_factory.mktemp("shards")
            state = write_meta(folder, TINY, shards, embedding_dim=embedding_dim)
            opened[shards, embedding_dim] = MetaCheckpoint(folder), state
    return opened


@pytest.mark.parametrize("embedding_dim", [0, 1])
@pytest.mark.parametrize("shards", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_every_rank_gets_its_slice_of_the_whole(sharded, shards: int, ranks: int, embedding_dim: int) -> None:  # type: ignore[no-untyped-def]
    checkpoint, state = sharded[shards, embedding_dim]
    assert set(checkpoint.names()) == set(state)
    for name, whole in state.items():
        assert checkpoint.shape(name) == whole.shape
        expected = parts_by_hand(name, whole, TINY, ranks)
        for rank in range(ranks):
            part = read_part(checkpoint, name, TINY, ModelParallel(rank, ranks))
            assert torch.equal(part, expected[rank]), (name, rank)


@pytest.mark.parametrize(
    ("args", "shards", "ranks"),
    [(NINE, 1, 3), (NINE, 1, 9), (NINE, 3, 9), (NINE, 3, 1), (TWELVE, 2, 3), (TWELVE, 4, 6), (TWELVE, 1, 12)],
    ids=["9h-1to3", "9h-1to9", "9h-3to9", "9h-3to1", "12h-2to3", "12h-4to6", "12h-1to12"],
)
def test_parts_that_do_not_divide_are_padded_with_zeros(
    tmp_path: Path, args: ModelArgs, shards: int, ranks: int
) -> None:
    """9 ranks of 512 tokens are 57 each, and the last rank's last is none."""
    if shards == 3:  # 512 tokens and 200 hidden features in three: Meta never wrote such shards, but whole heads split
        args = ModelArgs(dim=72, n_layers=1, n_heads=9, n_kv_heads=3, vocab_size=510, multiple_of=6)
    state = write_meta(tmp_path, args, shards)
    checkpoint = MetaCheckpoint(tmp_path)
    for name, whole in state.items():
        for rank, expected in enumerate(parts_by_hand(name, whole, args, ranks)):
            part = read_part(checkpoint, name, args, ModelParallel(rank, ranks))
            assert torch.equal(part, expected), (name, rank)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_parts_sum_and_join_to_the_whole_layer(tmp_path: Path, size: int) -> None:
    """Attention and feed-forward by hand over all ranks' parts, without processes: the sum is the whole layer's."""
    args = TWELVE
    state = write_meta(tmp_path, args)
    checkpoint = MetaCheckpoint(tmp_path)
    ranks = [
        {name: read_part(checkpoint, name, args, ModelParallel(rank, size)).double() for name in state}
        for rank in range(size)
    ]
    whole = {name: tensor.double() for name, tensor in state.items()}
    x = torch.randn(7, args.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layer in (feed_forward, attention):
        expected = layer(whole, x, args)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(sum(layer(rank, x, args) for rank in ranks), expected)
    logits = torch.cat([x @ rank["output.weight"].T for rank in ranks], dim=-1)[:, : args.vocab_size]
    torch.testing.assert_close(logits, x @ whole["output.weight"].T)


def feed_forward(w: dict[str, Tensor], x: Tensor, args: ModelArgs) -> Tensor:
    w1, w2, w3 = (w[f"layers.0.feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
    return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def attention(w: dict[str, Tensor], x: Tensor, args: ModelArgs) -> Tensor:
    """Uncached and without rotation, over however many heads the weights hold."""
    wq, wk, wv, wo = (w[f"layers.0.attention.{name}.weight"] for name in ("wq", "wk", "wv", "wo"))
    q, k, v = ((x @ weight.T).split(args.head_dim, dim=-1) for weight in (wq, wk, wv))
    heads = []
    for i, query in enumerate(q):
        j = i * len(k) // len(q)
        heads.append(torch.softmax(query @ k[j].T / args.head_dim**0.5, dim=-1) @ v[j])
    return torch.cat(heads, dim=-1) @ wo.T


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "size", "expected"),
    [
        (8, 2, 1, [[0, 1]]),
        (8, 2, 2, [[0], [1]]),
        (8, 2, 4, [[0], [0], [1], [1]]),  # each head repeats, not the block 0 1 0 1
        (8, 8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (9, 3, 9, [[0], [0], [0], [1], [1], [1], [2], [2], [2]]),
        (12, 4, 6, [[0, 0], [0, 1], [1, 1], [2, 2], [2, 3], [3, 3]]),  # a rank's heads straddle two groups
        (12, 4, 3, [[0, 0, 0, 1], [1, 1, 2, 2], [2, 3, 3, 3]]),
        (12, 2, 4, [[0], [0], [1], [1]]),
        (6, 1, 3, [[0], [0], [0]]),
    ],
)
def test_kv_slots_hold_the_heads_that_their_query_heads_use(
    n_heads: int, n_kv_heads: int, size: int, expected: list[list[int]]
) -> None:
    assert [ModelParallel(rank, size).kv_heads(n_heads, n_kv_heads) for rank in range(size)] == expected


@pytest.mark.parametrize("total", [0, 1, 7, 8, 49, 512])
@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_spans_cover_everything_once(total: int, size: int) -> None:
    covered: list[int] = []
    for rank in range(size):
        start, stop = ModelParallel(rank, size).span(total)
        assert stop - start <= ModelParallel(rank, size).part(total)
        covered += range(start, stop)
    assert covered == list(range(total))
