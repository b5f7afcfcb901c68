"""What a user chooses when a model is built, as one frozen object that is checked where it is made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llama.checks import check_int
from llama.distributed.job import NO_TIMEOUT, TIMEOUT

QUANTIZE_MODES = ("int8", "int4", "fp8")


@dataclass(frozen=True)
class BuildOptions:
    """How to load a model; wrong values raise ValueError, and files are looked at only by the build itself.

    Args:
        ckpt_dir: Meta or Hugging Face folder, .gguf file, or a model's name on the hub, which is downloaded once:
            org/name, org/name:Q4_K_M, org/name@revision.
        tokenizer_path: tokenizer.model or tokenizer.json, or a model's name; default: the one beside or inside the
            weights.
        max_seq_len: most tokens of a prompt and its completion together; default: the model's context.
        max_batch_size: most prompts to run at once; more are run in turn.
        model_parallel_size: ranks that share one copy of the model; default: all.
        seed: the same seed gives the same texts.
        device: cuda, mps or cpu; default: the first of these that is there.
        dtype: float32, bfloat16 or float16; default: what the device computes well.
        chat_format: template (the model's own), llama2, llama3, chatml, codellama70b, or vicuna, alpaca, zephyr,
            openchat, tulu, solar, koala, mistral-v1, mistral-v3 or mistral-v7; default: what the files tell, or else
            the model's name.
        chat_template: a file with a jinja template in place of the model's own; in Python also its text.
        template_kwargs: what the template reads beside messages and tools, as JSON: {"enable_thinking": false}.
        quantize: int8, int4 or, on GPUs, fp8: 8.5, 5 or 8 bits a value; blocks that are no larger stay as they are.
        imatrix: what llama calibrate or llama-imatrix has measured of this model, by which quantize int4 rounds.
        lora: adapter of the model, PATH or PATH:SCALE, a folder of peft's or a GGUF file; may be given several times.
            It is merged into floats, and stays beside quantized weights unless quantize is given, too.
        compile: let torch compile the decode step, which takes a minute once; CPU kernels need no compiling.
        speculate: lookup proposes tokens from what the text said before; texts stay the same, some come faster.
        draft_ckpt_dir: a smaller model of the same vocabulary, by path or name, which proposes tokens instead.
        draft_quantize: int8, int4 or fp8 for the draft model, which may then be the model itself.
        timeout: seconds without a step after which ranks that wait for each other give up.
    """

    ckpt_dir: str | os.PathLike[str]
    tokenizer_path: str | os.PathLike[str] | None = None
    max_seq_len: int | None = None
    max_batch_size: int = 32
    model_parallel_size: int | None = None
    seed: int = 1
    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    chat_format: str | None = None
    chat_template: str | os.PathLike[str] | None = None
    template_kwargs: str | Mapping[str, Any] | None = None
    quantize: str | None = None
    imatrix: str | os.PathLike[str] | None = None
    lora: tuple[str, ...] = ()
    compile: bool = False
    speculate: str | None = None
    draft_ckpt_dir: str | os.PathLike[str] | None = None
    draft_quantize: str | None = None
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        if self.max_seq_len is not None:
            check_int("max_seq_len", self.max_seq_len)
        check_int("max_batch_size", self.max_batch_size)
        for name in ("ckpt_dir", "tokenizer_path", "chat_template", "imatrix", "draft_ckpt_dir"):
            if getattr(self, name) == "":  # an unset variable; as a path it would be the current folder
                raise ValueError(f"{name} must be a path, got ''")
        if self.chat_template is not None and self.chat_format not in (None, "template"):
            raise ValueError(f"chat_format {self.chat_format} and a chat_template exclude each other: give one of them")
        if self.template_kwargs is not None:
            _json_object("template_kwargs", self.template_kwargs)
        if isinstance(self.lora, str):
            raise ValueError(f"lora must be a list of adapters, got the text {self.lora!r}: put it into one")
        for name in ("quantize", "draft_quantize"):
            mode = getattr(self, name)
            if mode is not None and mode not in QUANTIZE_MODES:
                raise ValueError(f"{name} must be one of {', '.join(QUANTIZE_MODES)}, got {mode!r}")
        if self.imatrix is not None and self.quantize != "int4":
            raise ValueError(f"imatrix {self.imatrix} is for quantize int4 alone, got {self.quantize}: give that, too")
        if self.draft_quantize is not None and self.draft_ckpt_dir is None:
            raise ValueError(f"draft_quantize {self.draft_quantize} needs a draft model: give --draft_ckpt_dir, too")
        if (
            isinstance(self.timeout, bool)
            or not isinstance(self.timeout, int | float)
            or not 0 < self.timeout <= NO_TIMEOUT.total_seconds()
        ):
            raise ValueError(f"timeout must be a number of seconds, more than 0, at most a week, got {self.timeout!r}")
        check_speculation(self.speculate, self.draft_ckpt_dir is not None)

    @property
    def template_arguments(self) -> dict[str, Any] | None:
        """template_kwargs as a dictionary."""
        return None if self.template_kwargs is None else _json_object("template_kwargs", self.template_kwargs)


def _json_object(name: str, value: Any) -> dict[str, Any]:
    """Return an object from itself or from its JSON; raise ValueError where it is none."""
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ValueError(f'{name} must be a JSON object, as {{"enable_thinking": false}} is, got {value!r:.80}')
    return dict(found)


def check_speculation(speculate: str | None, has_draft: bool) -> None:
    """Raise ValueError unless there is one way of proposing tokens at most, and a known one."""
    if speculate not in (None, "lookup"):
        raise ValueError(f"speculate must be lookup, or left out, got {speculate!r}")
    if speculate is not None and has_draft:
        raise ValueError(f"speculate {speculate} and a draft model both propose tokens: give one of them")
