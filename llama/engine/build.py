"""From a path and the user's choices to a model on this rank; every rank of a job calls it alike."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from llama.backends.cpu.build import library
from llama.backends.cpu.layers import FusedLayers, can_fuse
from llama.backends.cuda.available import has_triton
from llama.backends.inductor import CompiledLayers, has_own_kernels
from llama.chat.formats import choose_chat_format
from llama.checkpoint import StoredCheckpoint, load_weights, open_checkpoint
from llama.checkpoint.base import QUANTIZED, dtype_name
from llama.checkpoint.load import WeightFormat, check_vocab_size
from llama.config import ModelArgs
from llama.distributed.device import choose_device, choose_dtype
from llama.distributed.groups import ModelParallel, join_model_parallel
from llama.distributed.job import agree, from_all_ranks, join_job, local_world_size
from llama.memory.available import free_bytes
from llama.memory.estimate import Job
from llama.memory.plan import Planner, check_job, table
from llama.model import Transformer
from llama.quantization.linear import PackedWeight
from llama.quantization.planar import PlanarWeight
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

SAME_FILES = "give every host the same files"
FIXES = {"kernels": "install a C++ compiler, or for GPUs Triton, on every host, or set LLAMA_KERNELS=0 on all"}


def build_model(
    ckpt_dir: str | os.PathLike[str],
    tokenizer_path: str | os.PathLike[str] | None,
    max_seq_len: int,
    max_batch_size: int,
    model_parallel_size: int | None,
    *,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    chat_format: str | None = None,
    quantize: str | None = None,
    compile: bool = False,
) -> tuple[Transformer, Tokenizer]:
    """This rank's share of the model, and the tokenizer that belongs to it; arguments as for `Llama.build`."""
    start = time.perf_counter()
    join_job()
    with agree():
        source = open_source(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, device, dtype, quantize)
        choose_chat_format(source.tokenizer, chat_format)  # checked before gigabytes are read
    check_alike(source)
    ranks = source.with_ffn_multiple(join_model_parallel(model_parallel_size, source.device))
    # In a block of its own: no rank loads before all have seen what is free.
    with agree():
        source.planner(ranks, free_bytes(source.device, local_world_size())).check_can_run()
    with agree():
        with torch.device("meta"):
            model = Transformer(source.args, ranks)
        if quantize is not None:
            log.info("quantizing to %s; scripts/convert_checkpoint.py --quantize does it once for all", quantize)
        changes = load_weights(model, source.checkpoint, source.device, source.storage)
        _speed_up(model, compile)
    for (stored, held), count in sorted(changes.items()):
        log.info("%s held as %s: %d matrices", stored, held, count)
    log.info(
        "loaded %s in %.2f s: %d rank%s of %.2f GB in %s, computing in %s on %s by %s, threads: %d",
        source.checkpoint.path,
        time.perf_counter() - start,
        ranks.size,
        "s" * (ranks.size > 1),
        model.weight_bytes / 1e9,
        " and ".join(model.weight_types),
        dtype_name(source.storage.dtype),
        source.device,
        "own kernels" if has_own_kernels(model) else "torch's operations",
        torch.get_num_threads(),
    )
    return model, source.tokenizer


def _speed_up(model: Transformer, compile: bool) -> None:
    """Set what runs the model's layers here."""
    if can_fuse(model):
        model.fused = FusedLayers(model)
    elif has_triton(model.device):
        from llama.backends.cuda import layers as gpu_layers

        if gpu_layers.can_run(model):
            model.fused = gpu_layers.GpuLayers(model)
    if compile and model.fused is not None:
        log.info("--compile has nothing to add: kernels of our own run the layers, and are compiled")
    elif compile:
        model.fused = CompiledLayers(model)


def plan_run(
    ckpt_dir: str | os.PathLike[str],
    tokenizer_path: str | os.PathLike[str] | None,
    max_seq_len: int,
    max_batch_size: int,
    model_parallel_size: int | None,
    *,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    prompts: Sequence[str] = (),
    max_gen_len: int | None = None,
    scored: bool = False,
    quantize: str | None = None,
) -> tuple[str, bool]:
    """A table of the memory that each rank would need, and whether it has it; no weight is read.

    A process alone plans for any model_parallel_size: for so many CUDA devices like its own, or for so many ranks on
    this host's CPU. With prompts there is a plan of completing them, too; scored: with log-probabilities of prompts.
    """
    join_job()
    world_size = dist.get_world_size()
    with agree():
        source = open_source(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, device, dtype, quantize)
        size = world_size if model_parallel_size is None else model_parallel_size
        if type(size) is not int or size < 1 or (world_size > 1 and world_size % size):
            raise ValueError(f"model_parallel_size must divide the {world_size} ranks of this job, got {size!r}")
        free = free_bytes(source.device, size if world_size == 1 else local_world_size(), local_world_size())
    # The last rank is the one whose share may be padded.
    planner = source.planner(source.with_ffn_multiple(ModelParallel(size - 1, size)), min(from_all_ranks(free)))
    with agree():
        jobs = {"at most": planner.limits()}
        if prompts:
            jobs = {"these prompts": source.job(prompts, max_gen_len, scored), **jobs}
        return table(planner, jobs), planner.plan(next(iter(jobs.values()))).fits


def build_draft(
    ckpt_dir: str | os.PathLike[str],
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    dtype: str | torch.dtype | None,
    quantize: str | None,
    compile: bool,
) -> Transformer:
    """This rank's share of a smaller model that guesses what `model` will say; ValueError if its tokens are others."""
    args = model.args
    with agree():
        draft = open_source(ckpt_dir, None, args.max_seq_len, args.max_batch_size, model.device, dtype)
        sizes = draft.args.vocab_size, args.vocab_size
        if sizes[0] != sizes[1] or not draft.tokenizer.has_tokens_of(tokenizer):
            raise ValueError(
                f"the draft model in {draft.checkpoint.path} has another vocabulary ({sizes[0]} tokens) than the model "
                f"({sizes[1]} tokens): give one of the same family"
            )
    limits = args.max_seq_len, args.max_batch_size, model.parallel.size
    built, _ = build_model(
        ckpt_dir, None, *limits, device=model.device, dtype=dtype, quantize=quantize, compile=compile
    )
    return built


def check_room(model: Transformer, job: Job, kept: int = 0, draft: Transformer | None = None) -> None:
    """ValueError, on every rank if on one, when the memory left by a loaded model is too small for a batch.

    kept: bytes of caches that are there already; draft: a model that reads the same batch.
    """
    with agree():
        check_job(model, job, free_bytes(model.device, local_world_size()) + kept, draft)


def check_alike(source: Source) -> None:
    """ValueError, on every rank, when hosts chose another device or dtype, or have another checkpoint at the path."""
    choices = {
        "device": source.device.type,
        "dtype": dtype_name(source.storage.dtype),
        "quantize": str(source.storage.quantize),
        "kernels": "own kernels" if source.storage.weight_cls else "none",
        "architecture": str(source.args),
        "tokenizer": f"{source.tokenizer.n_words} tokens, ending at {sorted(source.tokenizer.stop_tokens)}",
    }
    everywhere = from_all_ranks(choices)
    for what in choices:
        found = sorted({each[what] for each in everywhere})
        if len(found) > 1:
            fix = f"say which with --{what}" if what in ("device", "dtype", "quantize") else FIXES.get(what, SAME_FILES)
            raise ValueError(f"the ranks differ in {what}, {' against '.join(found)}: {fix}")


@dataclass(frozen=True)
class Source:
    """What is known before ranks join and weights are read."""

    checkpoint: StoredCheckpoint
    tokenizer: Tokenizer
    args: ModelArgs
    device: torch.device
    storage: WeightFormat

    def with_ffn_multiple(self, ranks: ModelParallel) -> ModelParallel:
        """The ranks, sharing out hidden features as the weights' blocks allow."""
        return self.storage.with_ffn_multiple(self.checkpoint, self.args, ranks)

    def planner(self, ranks: ModelParallel, free: int) -> Planner:
        return Planner(self.checkpoint, self.args, ranks, self.storage, self.device, free)

    def job(self, prompts: Sequence[str], max_gen_len: int | None, scored: bool) -> Job:
        """The largest batch of completing prompts."""
        most = self.args.max_seq_len
        longest = max(1, *(len(self.tokenizer.encode(text, bos=self.tokenizer.add_bos, eos=False)) for text in prompts))
        if longest > most:
            raise ValueError(f"a prompt has {longest} tokens, max_seq_len is {most}: raise it or shorten the prompt")
        length = most if max_gen_len is None else min(most, longest + max_gen_len)
        return Job(min(len(prompts), self.args.max_batch_size), longest, length, scored)


def open_source(
    ckpt_dir: str | os.PathLike[str],
    tokenizer_path: str | os.PathLike[str] | None,
    max_seq_len: int,
    max_batch_size: int,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    quantize: str | None = None,
) -> Source:
    if quantize is not None and quantize not in QUANTIZED:
        raise ValueError(f"quantize must be one of {', '.join(QUANTIZED)}, got {quantize!r}")
    place = choose_device(device)
    checkpoint = open_checkpoint(ckpt_dir)
    tokenizer = Tokenizer(tokenizer_path) if tokenizer_path is not None else checkpoint.tokenizer()
    tokenizer = tokenizer.with_stop_tokens(checkpoint.stop_tokens)
    args = dataclasses.replace(
        checkpoint.args,
        vocab_size=check_vocab_size(checkpoint, tokenizer.n_words),
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    computed = choose_dtype(dtype, place, checkpoint.dtype)
    if quantize == "fp8" and not has_triton(place):
        raise ValueError(f"quantize fp8 needs a CUDA device and Triton kernels, got {place}: use int8 instead")
    return Source(checkpoint, tokenizer, args, place, WeightFormat(computed, quantize, _packs(place)))


def _packs(device: torch.device) -> type[PackedWeight] | type[PlanarWeight] | None:
    """What kernels that run there take blocks as."""
    if device.type == "cpu":
        return PackedWeight if library() is not None else None
    return PlanarWeight if has_triton(device) else None
