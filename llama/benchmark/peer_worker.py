"""Another library as a worker of `llama bench`: options as JSON in argv, then jobs from stdin, each answered by a line.

Runs in the interpreter that has the library, which need not have this package: it imports nothing but the library.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_BATCHED = 2048  # positions of one call of llama.cpp, and its own default
MICRO_BATCH = 512  # positions computed at once: its default, and 2048 was no faster
ERROR_LEVEL = 4  # of ggml's log
BLOCK_SIZE = 128  # positions of a block of vLLM's cache: its CPU build's default


class LlamaCpp:
    """llama-cpp-python with a model of its own and a context of one sequence, on a CPU."""

    def __init__(self, path: str, max_seq_len: int, threads: int) -> None:
        import llama_cpp
        import numpy as np

        self.api: Any = llama_cpp
        self.as_array = np.ctypeslib.as_array
        self.errors: list[str] = []
        self.keep_error = llama_cpp.llama_log_callback(self.log)  # C does not keep a Python object alive
        llama_cpp.llama_log_set(self.keep_error, None)
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max_seq_len
        params.n_batch, params.n_ubatch = min(MOST_BATCHED, max_seq_len), MICRO_BATCH
        params.n_threads = params.n_threads_batch = threads
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
        self.context = llama_cpp.llama_init_from_model(self.model, params) if self.model else None
        if not self.context:
            raise ValueError(f"llama.cpp cannot run {path}: {' '.join(self.errors[:1]) or 'it does not say why'}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def log(self, level: int, text: bytes, _: object) -> None:
        if level == ERROR_LEVEL:
            self.errors.append(text.decode(errors="replace").strip())

    def run(self, prompts: list[list[int]], gen_len: int) -> dict[str, Any]:
        """Complete the one prompt greedily by exactly gen_len tokens, which no end token ends."""
        (prompt,) = prompts
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        start = time.perf_counter()
        for i in range(0, len(prompt), MOST_BATCHED):
            self.decode(prompt[i : i + MOST_BATCHED])
        tokens, times = [self.best()], [time.perf_counter()]
        while len(tokens) < gen_len:
            self.decode(tokens[-1:])
            tokens.append(self.best())
        times.append(time.perf_counter())
        return reply(start, times, gen_len, [tokens])

    def decode(self, tokens: list[int]) -> None:
        """Read tokens; logits are computed for the last alone."""
        array = (self.api.llama_token * len(tokens))(*tokens)
        code = self.api.llama_decode(self.context, self.api.llama_batch_get_one(array, len(tokens)))
        if code:
            raise ValueError(f"llama_decode failed with code {code}")

    def best(self) -> int:
        # An argmax over the logits where they lie: llama.cpp's greedy sampler would first copy them into structures.
        logits = self.as_array(self.api.llama_get_logits_ith(self.context, -1), (self.vocab_size,))
        return int(logits.argmax())

    def peak_mib(self) -> float:
        return resident_peak_mib()


class Transformers:
    """transformers' `generate` on a Hugging Face folder."""

    def __init__(self, path: str, dtype: str, device: str, threads: int) -> None:
        import torch
        import transformers

        self.torch = torch
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self.model = model.to(device=self.device).eval()
        self.vocab_size = model.config.vocab_size

    def run(self, prompts: list[list[int]], gen_len: int) -> dict[str, Any]:
        longest = max(map(len, prompts))
        pads = [[0] * (longest - len(prompt)) for prompt in prompts]
        tokens = [pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]
        mask = [pad + [1] * len(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
        times: list[float] = []

        def note_time(ids: Any, _: object, **__: object) -> Any:
            ids[:, -1].tolist()  # waits for the device
            times.append(time.perf_counter())
            return self.torch.zeros(len(ids), dtype=self.torch.bool, device=ids.device)  # none is to stop

        start = time.perf_counter()
        made = self.model.generate(
            self.torch.tensor(tokens, device=self.device),
            attention_mask=self.torch.tensor(mask, device=self.device),
            max_new_tokens=gen_len,
            min_new_tokens=gen_len,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            stopping_criteria=[note_time],
        )
        return reply(start, times, gen_len, made[:, longest:].tolist())

    def peak_mib(self) -> float:
        cuda = self.device.type == "cuda"
        return self.torch.cuda.max_memory_allocated(self.device) / 2**20 if cuda else resident_peak_mib()


class Vllm:
    """vLLM's engine, stepped in this process, on a Hugging Face folder: on CUDA, or its CPU build."""

    def __init__(self, path: str, dtype: str, max_seq_len: int, max_batch_size: int, threads: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's memory and steps are this process's own
        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm

        self.api: Any = vllm
        self.llm: Any = vllm.LLM(
            path,
            dtype=dtype,
            max_model_len=max_seq_len,
            max_num_seqs=max_batch_size,
            block_size=BLOCK_SIZE,
            num_gpu_blocks_override=1 + max_batch_size * (1 + max_seq_len // BLOCK_SIZE),  # not 4 GiB, as by default
            skip_tokenizer_init=True,
            enable_prefix_caching=False,  # each run reads its whole prompt
            disable_log_stats=True,
        )
        self.vocab_size = self.llm.llm_engine.model_config.get_vocab_size()

    def run(self, prompts: list[list[int]], gen_len: int) -> dict[str, Any]:
        engine = self.llm.llm_engine
        params = self.api.SamplingParams(temperature=0, max_tokens=gen_len, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        made: dict[str, list[int]] = {}
        times: list[float] = []
        while engine.has_unfinished_requests():
            made |= {each.request_id: list(each.outputs[0].token_ids) for each in engine.step()}
            if len(made) == len(prompts):  # all have their first token
                times.append(time.perf_counter())
        return reply(start, times, gen_len, [made[str(i)] for i in range(len(prompts))])

    def peak_mib(self) -> float:
        return resident_peak_mib()


PEERS: dict[str, Callable[..., Any]] = {"llama_cpp": LlamaCpp, "transformers": Transformers, "vllm": Vllm}


def reply(start: float, times: list[float], gen_len: int, tokens: list[list[int]]) -> dict[str, Any]:
    """Return the answer to a job. times: when the first tokens were there, and when the last were."""
    seconds = {"prefill_s": times[0] - start, "decode_s": times[-1] - times[0]}
    return {**seconds, "decode_steps": gen_len - 1, "tokens": tokens}


def resident_peak_mib() -> float:
    """Return this process's peak of memory, 0 if unknown, as `llama.engine.metrics.peak_memory_mib` does."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path("/proc/self/status").read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0]) / 2**10
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def serve(load: Callable[[dict[str, Any]], Any], known_errors: type[Exception] | tuple[type[Exception], ...]) -> None:
    """Answer jobs until stdin ends; errors that are known end it with one line for the process that asked.

    load: makes of the options what has `vocab_size`, `run` and `peak_mib`; what else it is, `loaded` tells.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        system = load(json.loads(sys.argv[1]))
        answer({"vocab_size": system.vocab_size, **getattr(system, "loaded", {})})
        for line in sys.stdin:
            answer({**system.run(**json.loads(line)), "peak_mib": system.peak_mib()})
    except KeyboardInterrupt:
        sys.exit(130)
    except known_errors as error:
        answer({"error": f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules are none of the library's
    serve(lambda options: PEERS[options.pop("peer")](**options), Exception)
