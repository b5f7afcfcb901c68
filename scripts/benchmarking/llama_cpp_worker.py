"""llama.cpp as a worker of scripts/benchmark.py: reads jobs from stdin, as torch_worker.py does.

Runs in the interpreter that has llama-cpp-python, which need not have torch or this package: it must import neither.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

MOST_BATCHED = 2048  # positions of one call, and llama.cpp's own default
MICRO_BATCH = 512  # positions computed at once: its default, and 2048 was no faster
ERROR_LEVEL = 4  # of ggml's log


class LlamaCpp:
    """A model of its own and a context of one sequence; ValueError when the file cannot be loaded."""

    def __init__(self, path: str, threads: int, max_seq_len: int) -> None:
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

    def run(self, prompt: list[int], gen_len: int) -> dict[str, Any]:
        """A greedy completion of exactly gen_len tokens, which no end token ends."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        start = time.perf_counter()
        for i in range(0, len(prompt), MOST_BATCHED):
            self.decode(prompt[i : i + MOST_BATCHED])
        tokens = [self.best()]
        prefilled = time.perf_counter()
        while len(tokens) < gen_len:
            self.decode(tokens[-1:])
            tokens.append(self.best())
        end = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "prefill_s": prefilled - start,
            "decode_s": end - prefilled,
            "decode_steps": gen_len - 1,
            "peak_mib": peak / 2**20 if sys.platform == "darwin" else peak / 2**10,  # macOS counts bytes, Linux KiB
            "tokens": [tokens],
        }

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


def main() -> None:
    options = json.loads(sys.argv[1])
    try:
        try:
            system = LlamaCpp(options["path"], options["threads"], options["max_seq_len"])
        except ImportError as error:
            raise ValueError(
                f"{sys.executable} cannot import llama_cpp ({error}): pip install '.[bench]', or name an interpreter "
                "that has it with --peer_python"
            ) from None
        print(json.dumps({"vocab_size": system.vocab_size}), flush=True)
        for line in sys.stdin:
            job = json.loads(line)
            (prompt,) = job["prompts"]
            print(json.dumps(system.run(prompt, job["gen_len"])), flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main()
