"""What the examples share on a command line: flags verbatim through fire, reports on stderr, errors in one line."""

from __future__ import annotations

import difflib
import functools
import inspect
import io
import json
import logging
import os
import signal
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llama.distributed.job import agree, local_rank
from llama.engine.metrics import peak_memory_mib
from llama.generation import Llama

DEMO_MODEL = Path("models/SmolLM2-135M-Instruct.Q4_1.gguf")

# Ranks that are not to speak wait this long for torchrun to end them, so that it does not end the one that speaks.
SECONDS_TO_SPEAK = 30


def is_first_rank() -> bool:
    """Whether this is the one process of the job that prints results; before any process group exists, too."""
    return os.environ.get("RANK", "0") == "0"


def demo_model(folder: Path) -> Path:
    """The demo model below `folder`; FileNotFoundError says how to get it."""
    if not (folder / DEMO_MODEL).is_file():
        raise FileNotFoundError(
            f"no --ckpt_dir given, and the demo model {folder / DEMO_MODEL} is not there: get it with "
            "python scripts/get_model.py, or give the folder of your weights"
        )
    return folder / DEMO_MODEL


def report(llm: Llama) -> None:
    """Log what the run cost: speeds, bandwidth and peak memory of this rank, and what speculation gave."""
    metrics, log = llm.metrics, logging.getLogger("llama")
    log.info(
        "prefill %d tokens%s at %.1f tok/s; decode %d tokens at %.1f tok/s, %.2f GB/s of weights; peak memory %.0f MiB",
        metrics.prompt_tokens,
        f" ({metrics.reused_tokens} more reused)" if metrics.reused_tokens else "",
        metrics.prefill_tok_s,
        metrics.decoded_tokens,
        metrics.decode_tok_s,
        metrics.bandwidth_gb_s(llm.model.weight_bytes),
        peak_memory_mib(llm.model.device),
    )
    if metrics.proposed:
        log.info(
            "speculation: %d of %d proposals accepted (%.0f %%)%s%s",
            metrics.accepted,
            metrics.proposed,
            100 * metrics.accepted / metrics.proposed,
            f", {metrics.speculation_gain:.2f} x the plain speed" if metrics.speculation_gain else "",
            f"; off for {metrics.backoff_tokens} tokens, as it lost" if metrics.backoff_tokens else "",
        )


def end_with(plan: tuple[str, bool]) -> typing.NoReturn:
    """Print the table of a plan and exit, with code 1 when it does not fit."""
    table, fits = plan
    with agree():  # all ranks wait: torchrun ends them when the first exits with 1
        if is_first_rank():
            print(table, flush=True)
    sys.exit(0 if fits else 1)


def run(main: Callable[..., None]) -> None:
    """Call main with the flags in sys.argv. A user's error is one line on stderr, from one rank, and exit code 1.

    Parameters of main that are not keyword-only may come as plain words, in their order.
    """
    import fire
    from fire.decorators import SetParseFns

    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if is_first_rank() else logging.ERROR, format="%(message)s"
    )
    if not is_first_rank():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a job of several ranks, and one is enough to say so
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a character the terminal lacks shall not lose the rest
    try:
        hints = typing.get_type_hints(main)
        parsers = {name: functools.partial(_parse, name, hints[name]) for name in hints if name != "return"}
        fire.Fire(SetParseFns(**parsers)(main), command=_normalized(sys.argv[1:], main, hints))
        _leave_together()
    except BrokenPipeError:
        discard_stdout()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        _fail(" ".join(str(error).split()) or type(error).__name__)


def discard_stdout() -> None:
    """Print to nobody from here on: the reader of stdout has seen enough, as `head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave_together() -> None:
    """End all ranks of a finished job at once, without the interpreter's clean-up.

    A rank that ends while another still talks to it can abort there: gloo's threads outlive what they use.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with agree():
            sys.stdout.flush()
        os._exit(0)


def _fail(message: str) -> typing.NoReturn:
    if local_rank() == 0:
        sys.stdout.flush()
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()
    else:
        time.sleep(SECONDS_TO_SPEAK)  # whoever lives on is the only one that failed
        sys.stderr.write(f"error: {message}\n")
    sys.exit(1)


def _help(main: Callable[..., None]) -> str:
    """main's docstring with its arguments, one a line there, as flags; fire's own help names flags that are none."""
    summary, _, arguments = (inspect.getdoc(main) or "").partition("\n\nArgs:\n")
    parameters = inspect.signature(main).parameters
    places = _places(main)
    usage = " ".join([Path(sys.argv[0]).name, *(name.upper() for name in places), "[--flag value]..."])
    lines = [f"usage: {usage}", "", summary, ""]
    for line in arguments.splitlines():
        name, _, meaning = line.strip().partition(": ")
        default = parameters[name].default
        said = "" if default in (None, False, inspect.Parameter.empty) else f" (default: {default})"
        lines.append(f"  {name.upper() if name in places else '--' + name:<17} {meaning}{said}")
    return "\n".join(lines)


def _places(main: Callable[..., None]) -> list[str]:
    """The parameters that may come without a flag."""
    parameters = inspect.signature(main).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]


def _normalized(argv: list[str], main: Callable[..., None], hints: dict[str, Any]) -> list[str]:
    """Flags and words as --name=value, with all values of --prompt in one JSON list.

    fire by itself takes a value that begins with a dash for a flag, keeps the last of repeated flags, and runs a
    whole job before it says that a flag is unknown.
    """
    parameters = inspect.signature(main).parameters.values()
    places = _places(main)
    values: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    words = iter(argv)
    for word in words:
        if word in ("--help", "-h"):
            if is_first_rank():
                print(_help(main))
            sys.exit(0)
        place = next((name for name in places if name not in values), None)
        if not word.startswith("--") and place is not None:
            values[place] = word
            continue
        if not word.startswith("--"):
            example = f", as in --prompt {word!r}" if "prompt" in hints and not word.startswith("-") else ": see --help"
            raise ValueError(f"unexpected argument {word!r}: every value follows its flag{example}")
        flag, given, value = word[2:].partition("=")
        name = flag.replace("-", "_")
        if name not in hints or name == "return":
            close = difflib.get_close_matches(name, hints, 1)
            raise ValueError(f"unknown flag --{flag}" + (f": did you mean --{close[0]}?" if close else ": see --help"))
        if hints[name] is bool:
            value = value or "True"
        elif not given:
            try:
                value = next(words)
            except StopIteration:
                raise ValueError(f"--{flag} needs a value") from None
        if typing.get_origin(hints[name]) is not None and list[str] in typing.get_args(hints[name]):
            lists.setdefault(name, []).extend(_texts(value))
        else:
            values[name] = value
    required = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    missing = [name.upper() if name in places else f"--{name}" for name in hints if name in required - values.keys()]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given: see --help")
    values |= {name: json.dumps(texts) for name, texts in lists.items()}
    return [f"--{name}={value}" for name, value in values.items()]


def _texts(value: str) -> list[str]:
    """One text, verbatim, unless it is a JSON list of texts."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"--prompt is not valid UTF-8: {value!a}") from None
    if value.startswith("["):
        try:
            texts = json.loads(value)
        except json.JSONDecodeError:
            return [value]
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return texts
    return [value]


def _parse(name: str, hint: Any, text: str) -> Any:
    """The value of a flag from its text, by the type of main's parameter."""
    types = typing.get_args(hint) or (hint,)
    if list[str] in types:
        return json.loads(text)
    if str in types:
        return text
    if type(None) in types and text == "None":
        return None
    if bool in types:
        if text not in ("True", "False", "true", "false"):
            raise ValueError(f"--{name} is on or off: give it alone, got {text!r}")
        return text.lower() == "true"
    number = float if float in types else int
    try:
        return number(text)
    except ValueError:
        what = "a number" if number is float else "an integer"
        raise ValueError(f"--{name} must be {what}, got {text!r}") from None
