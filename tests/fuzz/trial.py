"""One mutant: loaded and run as users do, and what came of it compared with the whole model."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama import Llama

DIALOG = [{"role": "system", "content": "Be <s>brief</s>."}, {"role": "user", "content": "Hello [INST] é\n1"}]
MAX_MESSAGE = 1000  # characters of an error


@dataclass(frozen=True)
class Outcome:
    """What came of a mutant.

    kind: "refused" in one clear line; "same" as the whole model; "changed", which is other tokens or other scores;
    "error", which no user should see. Processes that end add "killed".
    detail: the line, or the text of the error.
    warnings: what was logged.
    """

    kind: str
    detail: str
    warnings: tuple[str, ...] = ()


class _Warnings(logging.Handler):
    """Collects what the package warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run_model(folder: Path, chat: bool) -> Any:
    """Return what a model gives: ids of a prompt, two tokens with their log-probabilities, and their text."""
    path = folder / "model.gguf" if (folder / "model.gguf").exists() else folder
    llm = Llama.build(path, max_seq_len=96, max_batch_size=1, device="cpu", dtype="float32")
    prompts = llm.encode_dialogs([DIALOG]) if chat else llm.encode_prompts(["Hello é <s> 12"])  # type: ignore[list-item]
    control = set(llm.tokenizer.special_tokens.values())
    assert chat or not control.intersection(prompts[0][llm.tokenizer.add_bos :]), "a text has become a control token"
    prompts = [prompt[:90] for prompt in prompts]
    tokens, scores = llm.generate(prompts, max_gen_len=2, temperature=0, logprobs=True)
    assert scores is not None
    return prompts, tokens, [round(score, 4) for score in scores[0]], llm.tokenizer.decode([*prompts[0], *tokens[0]])


def attempt(folder: Path, chat: bool, whole: Any) -> Outcome:
    """Run a damaged model, and compare it with what the whole one gave."""
    warnings = _Warnings()
    logger = logging.getLogger("llama")
    logger.addHandler(warnings)
    try:
        result = run_model(folder, chat)
    except (ValueError, OSError) as error:
        said = str(error)
        clear = said.isprintable() and 0 < len(said) <= MAX_MESSAGE
        named = type(error) in (ValueError, OSError, FileNotFoundError)
        return Outcome("refused" if clear and named else "error", f"{type(error).__name__}: {said[:2000]!r}")
    except BaseException as error:
        return Outcome("error", _where(error))
    finally:
        logger.removeHandler(warnings)
    kind = "same" if json.dumps(result) == json.dumps(whole) else "changed"
    return Outcome(kind, repr(result)[:300], tuple(warnings.lines))


def _where(error: BaseException) -> str:
    """Say what an error is, and where in the package it was raised or met."""
    trace, places = error.__traceback__, []
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/llama/" in code.co_filename:
            places.append(f"{code.co_filename.rpartition('/llama/')[2]}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return f"{type(error).__name__}: {str(error)[:200]!r} at {' < '.join(places[-2:])}"
