"""`llama chat`: a conversation on the terminal, or one message a line from a pipe."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from typing import Annotated

from llama import Llama
from llama.chat.dialog import Message
from llama.chat.formats import check_system
from llama.chat.llama2_tags import UNSAFE_ERROR
from llama.cli.flags import decode_text
from llama.cli.options import build_flags, sampling_flags
from llama.cli.plan import end_with_plan
from llama.cli.printing import say
from llama.cli.report import report
from llama.cli.runner import is_first_rank
from llama.cli.signals import signals_raise
from llama.distributed.job import agree, from_first_rank
from llama.distributed.torchrun_env import read_torchrun_env
from llama.engine.options import BuildOptions
from llama.sampling import SamplingParams

log = logging.getLogger("llama")

# The part of the context that is kept free for an answer, unless --max_gen_len asks for less.
ANSWER_SHARE = 1 / 4
CHAT_COMMANDS = "/reset forgets the conversation, /exit or Ctrl-D ends it"
WORD_ALONE = re.compile(r"/[A-Za-z?]\w*")


class TooLongError(ValueError):
    """A message that the context has no room for, even alone; those after it may have."""


def main(
    options: Annotated[BuildOptions, build_flags("max_batch_size", max_batch_size=1)],
    params: Annotated[SamplingParams, sampling_flags("logprobs", "echo")],
    *,
    system: str | None = None,
    dry_run: bool = False,
) -> None:
    """Talk with a LLaMA model: /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer.

    When stdin or stdout is no terminal, every line of stdin is a message of one conversation. Where the context is
    full, the oldest messages are forgotten; a line that is too long by itself is left out, and the exit code is 1.
    torchrun ends all ranks at a Ctrl-C.

    Args:
        system: how the model is to behave, said before the conversation; default: what the template says by itself.
        dry_run: print how much memory each rank needs and has, and read no weights; exit code 1 if none fits.

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
        if is_first_rank():
            check_opening(llm, system)
    dialog = list(opening)
    interactive = from_first_rank(sys.stdin.isatty() and sys.stdout.isatty())
    number, left_out = 0, False
    for line in messages(interactive):
        if line == "/exit":
            break
        if line == "/reset":
            dialog, number = list(opening), 0
            continue
        if interactive and WORD_ALONE.fullmatch(line):
            tell(f"{line} is no command, and was not sent: {CHAT_COMMANDS}")
            continue
        dialog.append(Message(role="user", content=line))
        number += 1
        try:
            text = answer(llm, dialog, len(opening), params)
        except TooLongError as error:
            tell(f"error: message {number} {error}")
            if not interactive:
                say("\n")
            text, left_out = "", True
        except ValueError as error:
            if not interactive:
                raise
            tell(f"error: {error}")
            text = ""
        if text:
            dialog.append(Message(role="assistant", content=text))
        else:
            dialog.pop()
    if is_first_rank():
        report(llm)
    if left_out and not interactive:
        sys.exit(1)


def tell(line: str) -> None:
    """Say something that is no answer, once for all ranks."""
    if is_first_rank():
        print(line, file=sys.stderr)


def check_opening(llm: Llama, system: str | None) -> None:
    """ValueError where the format has no place for the system prompt, or the context no room for a message after it."""
    what, fixes, dialog = "the chat format", "give a larger one", [Message(role="user", content="Hello")]
    if system is not None:
        check_system(llm.chat_format, system)
        what, fixes = "--system", "shorten it, or give a larger --max_seq_len"
        dialog.insert(0, Message(role="system", content=system))
    used, max_seq_len = len(llm.chat_format.encode(dialog)), llm.model.args.max_seq_len
    if used >= max_seq_len:
        raise ValueError(
            f"{what} leaves no room for a message: with 'Hello' it has {used} tokens, --max_seq_len is {max_seq_len}: "
            f"{fixes}"
        )


def messages(interactive: bool) -> Iterator[str]:
    """What the user types or pipes in, without blank lines: the first rank reads it and tells the others."""
    if interactive and is_first_rank():
        with contextlib.suppress(ImportError):  # Windows, whose input() has both
            import readline  # noqa: F401  # gives input() a history and an editable line

        ctrl_c = "ends, too" if has_other_ranks() else "stops an answer"
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
    """One line, None at the end of the input; Ctrl-C gives an empty one, as does a line that nobody can read.

    Ctrl-C where nothing was typed is told how to leave.
    """
    try:
        if not interactive:
            return decode_text(sys.stdin.buffer.readline(), sys.stdin.encoding) or None
        with signals_raise():  # so that readline leaves the terminal in order
            return input("> ")
    except UnicodeDecodeError as error:
        unreadable = (
            f"a line of stdin is not {error.encoding}: {error.object[:40]!r}; convert it, with iconv for example"
        )
        if not interactive:
            raise ValueError(unreadable) from None
        print(f"error: {unreadable}", file=sys.stderr)
        return ""
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        if has_other_ranks():
            raise
        print()
        readline = sys.modules.get("readline")
        if readline is None or not readline.get_line_buffer():
            print(CHAT_COMMANDS, file=sys.stderr)
        return ""


def answer(llm: Llama, dialog: list[Message], n_opening: int, params: SamplingParams) -> str:
    """Print the answer as it comes, and return as much of it as came before Ctrl-C.

    The oldest turns after the first n_opening messages are removed from the dialog where it no longer fits.
    """
    if llm.chat_format.is_unsafe(dialog):
        say(UNSAFE_ERROR + "\n")
        return ""
    max_seq_len = llm.model.args.max_seq_len
    text, n_tokens, last = "", 0, None
    with contextlib.nullcontext() if has_other_ranks() else signals_raise():
        try:
            kept, tokens = fit(llm, dialog, n_opening, params.max_gen_len)
            events = llm.stream([tokens], params.max_gen_len, params.temperature, params.top_p, add_prefix_space=True)
            if len(kept) < len(dialog):
                forgotten = len(dialog) - len(kept)
                log.warning(
                    "the context of %d tokens is full: the oldest %d messages are forgotten", max_seq_len, forgotten
                )
                dialog[:] = kept
            for last in events:
                text += last.text
                n_tokens += last.token is not None
                say(last.text)
        except KeyboardInterrupt:
            print(" (stopped)", end="", file=sys.stderr, flush=True)
            last = None
    say("\n")
    if last is not None and last.finish_reason == "length" and len(tokens) + n_tokens == max_seq_len:
        log.warning("the context of %d tokens is full, and the answer was cut: --max_seq_len makes room", max_seq_len)
    return text


def fit(llm: Llama, dialog: list[Message], n_opening: int, max_gen_len: int | None) -> tuple[list[Message], list[int]]:
    """A dialog without the oldest of its turns that leave no room for an answer, and its tokens.

    TooLongError, which goes on from the message's number, where the newest message alone leaves none at all.
    """
    max_seq_len = llm.model.args.max_seq_len
    room = int(max_seq_len * ANSWER_SHARE)
    if max_gen_len is not None:
        room = min(room, max_gen_len)
    kept = list(dialog)
    [tokens] = llm.encode_dialogs([kept])
    while len(tokens) + room > max_seq_len and len(kept) > n_opening + 1:
        del kept[n_opening : n_opening + 2]
        [tokens] = llm.encode_dialogs([kept])
    if len(tokens) >= max_seq_len:
        system = " and the system prompt" if n_opening else ""
        raise TooLongError(
            f"is too long for the context: with what the chat format writes{system} it has {len(tokens)} tokens, "
            f"--max_seq_len is {max_seq_len}: shorten it, or give a larger --max_seq_len"
        )
    return kept, tokens


def has_other_ranks() -> bool:
    """Whether other ranks may be there: they would not stop at the same token, and torchrun ends them all anyway."""
    env = read_torchrun_env()
    return env.torchrun or env.world_size > 1
