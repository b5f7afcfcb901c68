"""`llama chat`: a conversation on the terminal, or one message a line from a pipe."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

from llama import Llama
from llama.cli.chat_commands import NOT_OF_A_CHAT, Next, completions, perform, word_of
from llama.cli.chat_input import LineReader, terminal_reader
from llama.cli.chat_session import Session
from llama.cli.constraints import read_constraints
from llama.cli.conversation import OVERFLOWS, Conversation, TooLongError, check_opening, has_other_ranks, tell
from llama.cli.flags import decode_text
from llama.cli.options import build_flags, sampling_flags
from llama.cli.plan import end_with_plan
from llama.cli.printing import say
from llama.cli.report import report
from llama.cli.runner import is_first_rank
from llama.cli.signals import signals_raise
from llama.distributed.job import agree, from_first_rank
from llama.engine.options import BuildOptions
from llama.errors import error_line
from llama.sampling import SamplingParams

log = logging.getLogger("llama")

# What lines of a pipe may say beside messages.
PIPED_COMMANDS = ("/reset", "/exit")


def main(
    options: Annotated[BuildOptions, build_flags("max_batch_size", max_batch_size=1)],
    params: Annotated[SamplingParams, sampling_flags(*NOT_OF_A_CHAT)],
    *,
    system: str | None = None,
    session: Path | None = None,
    overflow: str = "forget",
    dry_run: bool = False,
) -> None:
    """Talk with a LLaMA model: /help tells the commands, /exit or Ctrl-D ends it, Ctrl-C stops an answer.

    When stdin or stdout is no terminal, every line of stdin is a message of one conversation, but for /reset and
    /exit. A line that the context has no room for is left out, and the exit code is 1. torchrun ends all ranks at a
    Ctrl-C.

    Args:
        system: how the model is to behave, said before the conversation; default: what the template says by itself.
        session: a file that keeps the conversation; beside it, FILE.rank0 and so on keep what was computed of it.
        overflow: where the context is full, forget the oldest messages but for the system prompt, or error: refuse
            the new one.
        dry_run: print how much memory each rank needs and has, and read no weights; exit code 1 if none fits.

    Examples:
        llama chat
        llama chat --ckpt_dir Meta-Llama-3-8B-Instruct --system "Answer in French."
        llama chat --session talk.session
        echo "What is the capital of France?" | llama chat --temperature 0
    """
    if overflow not in OVERFLOWS:
        raise ValueError(f"--overflow must be {' or '.join(OVERFLOWS)}, got {overflow!r}")
    if dry_run:
        end_with_plan(options)
    params = read_constraints(params, options.timeout)
    stored = None if session is None else Session.open(session, options)
    llm = Llama.from_options(options)
    check_opening(llm, system)
    chat = Conversation(llm, params, system, overflow)
    if stored is not None:
        stored.restore(chat)
    interactive = from_first_rank(sys.stdin.isatty() and sys.stdout.isatty())
    try:
        left_out = converse(chat, stored, interactive)
    except BaseException:
        if not has_other_ranks():  # they may be anywhere
            keep(stored, chat, is_last=True)
        raise
    keep(stored, chat, is_last=True)
    if is_first_rank():
        report(llm)
    if left_out and not interactive:
        sys.exit(1)


def converse(chat: Conversation, session: Session | None, interactive: bool) -> bool:
    """Answer what is typed or piped in until it ends; return whether a message was left out."""
    reader = greet() if interactive and is_first_rank() else None
    number, left_out, draft = 0, False, ""
    while (line := next_line(reader, interactive, draft)) is not None:
        is_edit, draft = bool(draft), ""
        if not line.strip():
            continue
        before = chat.turns, chat.n_forgotten
        is_command = word_of(line) is not None if interactive else line.strip() in PIPED_COMMANDS
        try:
            if is_command:
                then = perform(chat, line.strip())
                if then is Next.LEAVE:
                    break
                if then is Next.EDIT:
                    draft = chat.last_message
                if then is not Next.ANSWER:
                    number = number if chat.turns else 0
                    keep(session, chat)
                    continue
            else:
                number += 1
                if is_edit:
                    chat.undo()
                chat.ask(line.strip())
            is_answered = bool(chat.answer())
        except TooLongError as error:
            tell(f"error: message {number} {error}")
            if not interactive:
                say("\n")
            is_answered, left_out = False, True
        except (ValueError, OSError) as error:
            if not interactive or isinstance(error, ConnectionError | BrokenPipeError):
                raise
            tell(f"error: {error_line(error)}")
            is_answered = False
        if is_answered:
            keep(session, chat)
        else:
            chat.turns, chat.n_forgotten = before
    return left_out


def keep(session: Session | None, chat: Conversation, is_last: bool = False) -> None:
    """Write a conversation to the files of its session, if it has any; is_last: before the chat ends."""
    if session is not None:
        session.save(chat, is_last)


def greet() -> LineReader:
    """Say how to begin, and return what reads messages from the terminal."""
    ctrl_c = "ends, too" if has_other_ranks() else "stops an answer"
    print(f"Type a message; /help tells the commands, /exit ends, Ctrl-C {ctrl_c}.", file=sys.stderr)
    return terminal_reader(completions)


def next_line(reader: LineReader | None, interactive: bool, draft: str = "") -> str | None:
    """What the user types or pipes in next, None at the end: the first rank reads it and tells the others.

    A line of a pipe begins and ends without spaces.
    """
    line: str | None = None
    with agree():
        if reader is not None:
            line = typed_line(reader, draft)
        elif is_first_rank():
            line = piped_line()
    line = from_first_rank(line)
    return line if line is None or interactive else line.strip()


def typed_line(reader: LineReader, draft: str) -> str | None:
    """A message from the terminal, None for Ctrl-D; Ctrl-C gives an empty one, as does one that nobody can read.

    Ctrl-C where nothing was typed is told how to leave.
    """
    try:
        with signals_raise():  # so that the terminal is left in order
            return reader.read(draft)
    except UnicodeDecodeError as error:
        print(f"error: {unreadable(error)}", file=sys.stderr)
        return ""
    except EOFError:
        return None
    except KeyboardInterrupt:
        if has_other_ranks():
            raise
        if not reader.left:
            print("/help tells the commands, /exit or Ctrl-D ends the chat", file=sys.stderr)
        return ""


def piped_line() -> str | None:
    """A line of stdin, None at its end; ValueError where it is no text."""
    try:
        return decode_text(sys.stdin.buffer.readline(), sys.stdin.encoding) or None
    except UnicodeDecodeError as error:
        raise ValueError(unreadable(error)) from None


def unreadable(error: UnicodeDecodeError) -> str:
    """Say which line of stdin is in another encoding."""
    return f"a line of stdin is not {error.encoding}: {error.object[:40]!r}; convert it, with iconv for example"
