"""`llama chat`: a conversation on the terminal, or one message a line from a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Annotated

from llama import Llama
from llama.chat.dialog import Message
from llama.chat.formats import check_system
from llama.chat.llama2_tags import UNSAFE_ERROR
from llama.cli.options import build_flags, sampling_flags
from llama.cli.plan import end_with_plan
from llama.cli.report import report
from llama.cli.runner import discard_stdout, is_first_rank
from llama.distributed.job import agree, from_first_rank
from llama.engine.options import BuildOptions
from llama.sampling import SamplingParams


def main(
    options: Annotated[BuildOptions, build_flags("max_batch_size", max_batch_size=1)],
    params: Annotated[SamplingParams, sampling_flags("logprobs", "echo")],
    *,
    system: str | None = None,
    dry_run: bool = False,
) -> None:
    """Talk with a LLaMA model: /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer.

    When stdin or stdout is no terminal, every line of stdin is a message of one conversation. torchrun ends all ranks
    at a Ctrl-C.

    Args:
        system: how the model is to behave, said before the conversation; default: what the template says by itself.
        dry_run: print how much memory each rank needs and has, and read no weights; exit code 1 if it does not fit.

    Examples:
        llama chat
        llama chat --ckpt_dir Meta-Llama-3-8B-Instruct --system "Answer in French."
        echo "What is the capital of France?" | llama chat --temperature 0
    """
    if dry_run:
        end_with_plan(options)
    llm = Llama.from_options(options)
    opening = [Message(role="system", content=system)] if system is not None else []
    with agree():
        if system is not None:
            check_system(llm.chat_format, system)
    dialog = list(opening)
    interactive = from_first_rank(sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty())
    for line in messages(interactive):
        if line == "/exit":
            break
        if line == "/reset":
            dialog = list(opening)
            continue
        dialog.append(Message(role="user", content=line))
        try:
            text = answer(llm, dialog, params)
        except ValueError as error:
            if not interactive:
                raise
            if is_first_rank():
                print(f"error: {error} (or /reset)", file=sys.stderr)
            text = ""
        if text:
            dialog.append(Message(role="assistant", content=text))
        else:
            dialog.pop()
    if is_first_rank():
        report(llm)


def messages(interactive: bool) -> Iterator[str]:
    """What the user types or pipes in, without blank lines: the first rank reads it and tells the others."""
    if interactive and is_first_rank():
        import readline  # noqa: F401  # gives input() a history and an editable line

        ctrl_c = "ends, too" if launched() else "stops an answer"
        print(f"Type a message; /reset forgets, /exit ends, Ctrl-C {ctrl_c}.", file=sys.stderr)
    while True:
        with agree():
            line = read_line(interactive) if is_first_rank() else None
        line = from_first_rank(line)
        if line is None:
            return
        if line.strip():
            yield line.strip()


def read_line(interactive: bool) -> str | None:
    """One line, None at the end of the input; Ctrl-C gives an empty one."""
    if not interactive:
        return sys.stdin.readline() or None if sys.stdin is not None else None
    try:
        return input("> ")
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        if launched():
            raise
        print()
        return ""


def answer(llm: Llama, dialog: list[Message], params: SamplingParams) -> str:
    """Print the answer as it comes, and return as much of it as came before Ctrl-C."""
    if llm.chat_format.is_unsafe(dialog):
        say(UNSAFE_ERROR + "\n")
        return ""
    text = ""
    prompts = llm.encode_dialogs([dialog])
    try:
        for step in llm.stream(
            prompts, params.max_gen_len, params.temperature, params.top_p, add_prefix_space=True, keep_cache=True
        ):
            text += step.text
            say(step.text)
    except KeyboardInterrupt:
        if launched():
            raise
        print(" (stopped)", end="", file=sys.stderr, flush=True)
    say("\n")
    return text


def say(text: str) -> None:
    """Print a piece of an answer on the first rank; whoever reads it may have gone."""
    try:
        if is_first_rank():
            print(text, end="", flush=True)
    except BrokenPipeError:
        if not launched():
            raise
        discard_stdout()  # the other ranks are in the middle of an answer


def launched() -> bool:
    """Whether other ranks may be there: they would not stop at the same token, and torchrun ends them all anyway."""
    return "RANK" in os.environ
