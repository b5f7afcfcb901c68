"""From a path and the user's choices to a model on this rank; every rank of a job calls it alike."""

from __future__ import annotations

import dataclasses
import logging
import os
import time

import torch

from llama import parallel
from llama.checkpoint import load_weights, open_checkpoint
from llama.model import Transformer
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")


def build_model(
    ckpt_dir: str | os.PathLike[str],
    tokenizer_path: str | os.PathLike[str] | None,
    max_seq_len: int,
    max_batch_size: int,
    model_parallel_size: int | None,
    *,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
) -> tuple[Transformer, Tokenizer]:
    """This rank's share of the model, and the tokenizer that belongs to it; arguments as for `Llama.build`."""
    start = time.perf_counter()
    parallel.join_job()
    with parallel.agree():
        place = parallel.choose_device(device)
        checkpoint = open_checkpoint(ckpt_dir)
        tokenizer = Tokenizer(tokenizer_path) if tokenizer_path is not None else checkpoint.tokenizer()
        if checkpoint.args.vocab_size not in (-1, tokenizer.n_words):
            raise ValueError(
                f"the tokenizer has {tokenizer.n_words} tokens, but the weights in {checkpoint.path} have "
                f"{checkpoint.args.vocab_size}: give the model's own with --tokenizer_path"
            )
        args = dataclasses.replace(
            checkpoint.args,
            vocab_size=tokenizer.n_words,
            tied_embeddings="output.weight" not in checkpoint.names(),
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
        )
        chosen = parallel.choose_dtype(dtype, place, checkpoint.dtype)
    ranks = parallel.join_model_parallel(model_parallel_size, place)
    with parallel.agree():
        with torch.device("meta"):
            model = Transformer(args, ranks)
        load_weights(model, checkpoint, place, chosen)
    log.info(
        "loaded %s in %.2f s: %d rank%s of %.2f GB, %s, %s, threads: %d",
        checkpoint.path,
        time.perf_counter() - start,
        ranks.size,
        "s" * (ranks.size > 1),
        model.weight_bytes / 1e9,
        place,
        str(chosen).removeprefix("torch."),
        torch.get_num_threads(),
    )
    return model, tokenizer
