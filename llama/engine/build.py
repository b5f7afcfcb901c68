"""Builds a model on this rank from a path and the user's choices; every rank of a job makes the same calls."""

from __future__ import annotations

import dataclasses
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama.backends.base import Backend, choose_backend
from llama.backends.eager import EagerBackend
from llama.chat.formats import choose_chat_format, find_chat_format
from llama.chat.template import TemplateChat, read_template
from llama.checkpoint import StoredCheckpoint, load_weights, open_checkpoint, with_adapters
from llama.checkpoint.base import dtype_name
from llama.checkpoint.context import trained_context_len
from llama.checkpoint.imatrix import read_imatrix
from llama.checkpoint.load import WeightFormat, check_vocab_size, check_weights
from llama.checkpoint.lora import adapters_of
from llama.config import ModelArgs
from llama.distributed.device import choose_device, choose_dtype
from llama.distributed.groups import ModelParallel, join_model_parallel
from llama.distributed.job import agree, from_all_ranks, join_job, local_rank, local_world_size
from llama.engine.options import BuildOptions
from llama.hub.find import local_path
from llama.hub.names import names_model
from llama.memory.available import free_bytes
from llama.memory.estimate import BatchShape
from llama.memory.plan import Planner, table
from llama.model import Transformer
from llama.quantization.weights import LowRank
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")

# What helps where ranks differ.
SAME_FILES = "give every host the same files"
FIXES = {"kernels": "install a C++ compiler, or for GPUs Triton, on every host, or set LLAMA_KERNELS=0 on all"}


def with_local_files(options: BuildOptions) -> BuildOptions:
    """Return options with paths in the place of models' names, whose files one rank of each host has downloaded.

    What is a path on a rank stays as it is there.
    """
    join_job(options.timeout)
    given = {name: getattr(options, name) for name in ("ckpt_dir", "tokenizer_path", "draft_ckpt_dir")}
    names = {name: value for name, value in given.items() if value is not None and names_model(value)}
    found = {}
    with agree():
        if local_rank() == 0:
            found = {name: local_path(value, name == "tokenizer_path") for name, value in names.items()}
    host = socket.gethostname()
    of_host: dict[str, Any] = {}
    for other, paths in from_all_ranks((host, found)):
        of_host |= paths if other == host else {}
    return dataclasses.replace(options, **{name: path for name, path in of_host.items() if name in names})


def build_model(
    options: BuildOptions,
    check: Callable[[Tokenizer, ModelArgs], None] | None = None,
    *,
    by_modules: bool = False,
) -> tuple[Transformer, Tokenizer, str | None]:
    """Load this rank's share of a model; return it with its tokenizer and, where it has one, its chat format's name.

    check: as for `Llama.from_options`. by_modules: have modules, whose hooks run then, compute in floats, whatever
    kernels there are.
    """
    start = time.perf_counter()
    join_job(options.timeout)
    with agree():
        source = open_source(options, by_modules=by_modules)
        chat_format = options.chat_format
        if chat_format is None:
            chat_format = find_chat_format(source.tokenizer, source.model_names)
        chosen = choose_chat_format(source.tokenizer, chat_format, options.template_arguments)
        if options.chat_template is not None and isinstance(chosen, TemplateChat):
            chosen.check()  # before gigabytes are read
    check_alike(source)
    context_len = source.checkpoint.context_len
    if options.max_seq_len is not None and context_len is not None and options.max_seq_len > context_len:
        log.warning(
            "max_seq_len is %d, and %s was trained for %d tokens: what goes beyond may make no sense",
            options.max_seq_len,
            source.checkpoint.path,
            context_len,
        )
    ranks = source.with_ffn_multiple(join_model_parallel(options.model_parallel_size, source.device, options.timeout))
    # In a context of its own, so that no rank loads before all have read the free memory.
    with agree():
        planner = source.planner(ranks, free_bytes(source.device, local_world_size()))
        planner.check_can_run()
    if options.max_seq_len is None:
        source = source.with_context(min(from_all_ranks(planner.longest())))
        if source.args.max_seq_len < planner.args.max_seq_len:
            log.warning("%s", source.context_note(planner.args.max_seq_len))
    with agree():
        if check is not None:
            check(source.tokenizer, source.args)
        with torch.device("meta"):
            model = Transformer(source.args, ranks)
        if options.quantize is not None:
            log.info("quantizing to %s; llama convert --quantize does it once for all", options.quantize)
        changes = load_weights(model, source.checkpoint, source.device, source.weight_format)
        source.backend.bind(model)
    if options.compile and source.backend.own_kernels:
        log.info("--compile changes nothing: the package's own kernels, which are compiled, run the layers")
    for adapter in adapters_of(source.checkpoint):
        log.info("lora %s", adapter)
    beside = sum(isinstance(module, LowRank) for module in model.modules())
    if beside:
        log.info("lora: %d matrices stay quantized, with what is added to their products beside them", beside)
    for (stored, loaded), count in sorted(changes.items()):
        log.info("%s loaded as %s: %d matrices", stored, loaded, count)
    if source.checkpoint.rounding:
        log.info(
            "blocks differ from what the files have by at most %.2g of a matrix's largest value",
            source.checkpoint.rounding,
        )
    log.info(
        "loaded %s in %.2f s: %d rank%s of %.2f GB in %s, computing in %s on %s by %s, threads: %d",
        source.checkpoint.path,
        time.perf_counter() - start,
        ranks.size,
        "s" * (ranks.size > 1),
        model.weight_bytes / 1e9,
        " and ".join(model.weight_types),
        dtype_name(source.weight_format.dtype),
        source.device,
        "own kernels" if source.backend.own_kernels else "torch's operations",
        torch.get_num_threads(),
    )
    return model, source.tokenizer, chat_format


def plan_run(
    options: BuildOptions, prompts: Sequence[str] = (), max_gen_len: int | None = None, scored: bool = False
) -> tuple[str, bool]:
    """Return a table of the memory that each rank would need, and whether one request has it; no weight is read.

    A process alone plans for any model_parallel_size: for that many CUDA devices like its own, or for that many ranks
    on this host's CPU. prompts: plan their completion, too; scored: with the log-probabilities of their tokens.
    """
    options = with_local_files(options)
    world_size = dist.get_world_size()
    with agree():
        source = open_source(options)
        size = world_size if options.model_parallel_size is None else options.model_parallel_size
        if type(size) is not int or size < 1 or (world_size > 1 and world_size % size):
            raise ValueError(f"model_parallel_size must divide the {world_size} ranks of this job, got {size!r}")
        free = free_bytes(source.device, size if world_size == 1 else local_world_size(), local_world_size())
    # The last rank is the one whose share may be padded.
    ranks, free = source.with_ffn_multiple(ModelParallel(size - 1, size)), min(from_all_ranks(free))
    planner = source.planner(ranks, free)
    with agree():
        note = ""
        if options.max_seq_len is None:
            context_len = source.args.max_seq_len
            source = source.with_context(planner.longest() or context_len)
            planner, note = source.planner(ranks, free), "\n" + source.context_note(context_len)
        shapes = {"at most": planner.limits()}
        if prompts:
            shapes = {"these prompts": source.batch_shape(prompts, max_gen_len, scored), **shapes}
        return table(planner, shapes) + note, planner.at_once(next(iter(shapes.values()))) > 0


def build_draft(options: BuildOptions, model: Transformer, tokenizer: Tokenizer) -> Transformer:
    """Load this rank's share of the draft model; raise ValueError where its vocabulary is not that of `model`."""
    assert options.draft_ckpt_dir is not None
    draft = dataclasses.replace(
        options,
        ckpt_dir=options.draft_ckpt_dir,
        tokenizer_path=None,
        model_parallel_size=model.parallel.size,
        device=model.device,
        chat_format=None,
        chat_template=None,
        template_kwargs=None,
        quantize=options.draft_quantize,
        imatrix=None,
        lora=(),
        speculate=None,
        draft_ckpt_dir=None,
        draft_quantize=None,
    )
    with agree():
        source = open_source(draft)
        sizes = source.args.vocab_size, model.args.vocab_size
        if sizes[0] != sizes[1] or not source.tokenizer.has_tokens_of(tokenizer):
            raise ValueError(
                f"the draft model in {source.checkpoint.path} has another vocabulary ({sizes[0]} tokens) than the "
                f"model ({sizes[1]} tokens): give one of the same family"
            )
    return build_model(draft)[0]


def check_alike(source: Source) -> None:
    """Raise ValueError, on every rank, where ranks differ in device, dtype, kernels or the checkpoint at the path."""
    choices = {
        "device": source.device.type,
        "dtype": dtype_name(source.weight_format.dtype),
        "quantize": str(source.weight_format.quantize),
        "imatrix": "some" if source.weight_format.column_weights else "none",
        "kernels": "own kernels" if source.backend.own_kernels else "none",
        "architecture": str(source.args),
        "lora": ", ".join(map(str, adapters_of(source.checkpoint))) or "no adapters",
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
    """An opened checkpoint, and how it will be run: all that is known before ranks join and weights are read."""

    checkpoint: StoredCheckpoint
    tokenizer: Tokenizer
    args: ModelArgs
    backend: Backend
    weight_format: WeightFormat

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @property
    def model_names(self) -> tuple[str, ...]:
        """What the model is called: by its folder or file, by the repository in the hub's cache, and by its files."""
        path = self.checkpoint.path.absolute()
        snapshots = [parent.parent for parent in (path, path.parent) if parent.parent.name == "snapshots"]
        return path.name, *(folder.parent.name for folder in snapshots), self.checkpoint.model_name

    def with_ffn_multiple(self, ranks: ModelParallel) -> ModelParallel:
        """Return the ranks with hidden features split as the blocks of the weights allow."""
        return self.weight_format.with_ffn_multiple(self.checkpoint, ranks)

    def with_context(self, max_seq_len: int) -> Source:
        """Return the same source for texts of at most so many tokens."""
        return dataclasses.replace(self, args=dataclasses.replace(self.args, max_seq_len=max_seq_len))

    def context_note(self, context_len: int) -> str:
        """Say how max_seq_len was chosen for a model that was trained for context_len tokens."""
        length = self.args.max_seq_len
        if length == context_len:
            return f"max_seq_len is {length}, the model's context."
        return f"max_seq_len is {length}: there is no memory for all of the model's context, {context_len} tokens."

    def planner(self, ranks: ModelParallel, free: int) -> Planner:
        """Return a planner of this model's memory on a rank with `free` bytes."""
        return Planner(self.checkpoint, self.args, ranks, self.weight_format, self.backend, free)

    def batch_shape(self, prompts: Sequence[str], max_gen_len: int | None, scored: bool) -> BatchShape:
        """Return the shape of the largest batch when prompts are completed; raise ValueError for too long a prompt."""
        limit = self.args.max_seq_len
        longest = max(1, *(len(self.tokenizer.encode(text, bos=self.tokenizer.add_bos, eos=False)) for text in prompts))
        if longest > limit:
            raise ValueError(f"a prompt has {longest} tokens, max_seq_len is {limit}: raise it or shorten the prompt")
        length = limit if max_gen_len is None else min(limit, longest + max_gen_len)
        return BatchShape(min(len(prompts), self.args.max_batch_size), longest, length, scored)


def open_source(options: BuildOptions, *, by_modules: bool = False) -> Source:
    """Open the files that the options name; raise ValueError or FileNotFoundError where they do not fit together.

    by_modules: as for `build_model`.
    """
    device = choose_device(options.device)
    checkpoint = open_checkpoint(options.ckpt_dir)
    path = options.tokenizer_path
    tokenizer = Tokenizer(local_path(path, tokenizer_only=True)) if path is not None else checkpoint.tokenizer()
    vocab_size = check_vocab_size(checkpoint, tokenizer)
    tokenizer = tokenizer.with_stop_tokens(checkpoint.stop_tokens, vocab_size)
    if options.chat_template is not None:
        tokenizer.chat_template = read_template(options.chat_template)
    args = dataclasses.replace(
        checkpoint.args,
        vocab_size=vocab_size,
        max_seq_len=options.max_seq_len or trained_context_len(checkpoint),
        max_batch_size=options.max_batch_size,
    )
    dtype = choose_dtype(
        options.dtype, device, checkpoint.dtype, checkpoint.is_quantized or options.quantize is not None
    )
    backend = EagerBackend(device) if by_modules else choose_backend(device, args, options.compile)
    if options.quantize is not None and options.quantize not in backend.quantize_modes:
        raise ValueError(
            f"quantize {options.quantize} needs a CUDA device and Triton kernels, got {device}: use int8 instead"
        )
    check_weights(checkpoint, args)
    checkpoint = with_adapters(checkpoint, options.lora, requantizes=options.quantize is not None)
    args = dataclasses.replace(args, tied_embeddings=checkpoint.args.tied_embeddings)
    weight_format = WeightFormat(dtype, options.quantize, backend.weight_cls, backend.keeps_stored_blocks)
    if options.imatrix is not None:
        if args.experts is not None:
            raise ValueError(f"imatrix {options.imatrix} cannot be used for models with experts: leave --imatrix out")
        importance = read_imatrix(Path(options.imatrix))
        importance.check_layers(args.n_layers)
        weight_format = dataclasses.replace(weight_format, column_weights=importance.of)
        if not weight_format.check_column_weights(checkpoint):
            raise ValueError(
                f"imatrix {options.imatrix} has nothing to do, as the weights are blocks that are no larger already: "
                "leave --imatrix out"
            )
    return Source(checkpoint, tokenizer, args, backend, weight_format)
