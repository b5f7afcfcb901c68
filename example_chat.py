"""Chat on the terminal, or answer one message a line from stdin: `python example_chat.py`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from llama import Llama
from llama.chat.formats import UNSAFE_ERROR, Message, check_system
from llama.cli import flags as cli
from llama.distributed.job import agree, from_first_rank
from llama.engine.build import plan_run
from llama.sampling import SamplingParams


def main(
    *,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    chat_format: str | None = None,
    system: str | None = None,
    max_seq_len: int = 2048,
    max_gen_len: int | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    seed: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    compile: bool = False,
    speculate: str | None = None,
    draft_ckpt_dir: str | None = None,
    draft_quantize: str | None = None,
    model_parallel_size: int | None = None,
    dry_run: bool = False,
) -> None:
    """Talk with a LLaMA model: /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer.

    When stdin or stdout is no terminal, every line of stdin is a message of one conversation. torchrun ends all ranks
    at a Ctrl-C.

    Args:
        ckpt_dir: Meta or Hugging Face folder, or .gguf file; default: the demo model.
        tokenizer_path: tokenizer.model or tokenizer.json; default: the one beside or inside the weights.
        chat_format: template (the model's own), llama2, llama3, chatml or codellama70b; default: told by the model.
        system: how the model is to behave, said before the conversation; default: what the template says by itself.
        max_seq_len: most tokens of the whole conversation.
        max_gen_len: most tokens of an answer; default: as many as max_seq_len leaves room for.
        temperature: 0 is greedy; higher is more varied.
        top_p: probability mass of the nucleus that tokens are drawn from, in (0, 1].
        seed: the same seed gives the same answers to the same messages.
        device: cuda, mps or cpu; default: the first of these that is there.
        dtype: float32, bfloat16 or float16; default: what the device computes well.
        quantize: int8, int4 or, on GPUs, fp8: 8.5, 5 or 8 bits a value; blocks that are no larger stay as they are.
        compile: let torch compile the decode step, which takes a minute once; CPU kernels need no compiling.
        speculate: lookup guesses tokens from what the text said before; texts stay the same, some come faster.
        draft_ckpt_dir: a smaller model of the same vocabulary, which guesses tokens instead.
        draft_quantize: int8, int4 or fp8: hold the draft model so; then it may be the model itself.
        model_parallel_size: ranks that share one copy of the model; default: all.
        dry_run: print how much memory each rank needs and has, and read no weights; exit code 1 if it does not fit.
    """
    SamplingParams(temperature, top_p, max_gen_len)  # what is wrong ends here, before gigabytes are read
    weights = ckpt_dir if ckpt_dir is not None else cli.demo_model(Path(__file__).parent)
    build = (weights, tokenizer_path, max_seq_len, 1, model_parallel_size)
    if dry_run:
        cli.end_with(plan_run(*build, device=device, dtype=dtype, quantize=quantize))
    llm = Llama.build(
        *build,
        seed,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compile=compile,
        chat_format=chat_format,
        speculate=speculate,
        draft_ckpt_dir=draft_ckpt_dir,
        draft_quantize=draft_quantize,
    )
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
            text = answer(llm, dialog, temperature, top_p, max_gen_len)
        except ValueError as error:
            if not interactive:
                raise
            if cli.is_first_rank():
                print(f"error: {error} (or /reset)", file=sys.stderr)
            text = ""
        if text:
            dialog.append(Message(role="assistant", content=text))
        else:
            dialog.pop()
    if cli.is_first_rank():
        cli.report(llm)


def messages(interactive: bool) -> Iterator[str]:
    """What the user types or pipes in, without blank lines: the first rank reads it and tells the others."""
    if interactive and cli.is_first_rank():
        import readline  # noqa: F401  # gives input() a history and an editable line

        ctrl_c = "ends, too" if launched() else "stops an answer"
        print(f"Type a message; /reset forgets, /exit ends, Ctrl-C {ctrl_c}.", file=sys.stderr)
    while True:
        with agree():
            line = read_line(interactive) if cli.is_first_rank() else None
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


def answer(llm: Llama, dialog: list[Message], temperature: float, top_p: float, max_gen_len: int | None) -> str:
    """Print the answer as it comes, and return as much of it as came before Ctrl-C."""
    if llm.chat_format.is_unsafe(dialog):
        say(UNSAFE_ERROR + "\n")
        return ""
    text = ""
    prompts = llm.encode_dialogs([dialog])
    try:
        for step in llm.stream(prompts, max_gen_len, temperature, top_p, at_start=True, keep=True):
            text += step.text
            say(step.text)
    except KeyboardInterrupt:
        if launched():
            raise
        print(" (stopped)", end="", file=sys.stderr, flush=True)
    say("\n")
    return text


def say(text: str) -> None:
    try:
        if cli.is_first_rank():
            print(text, end="", flush=True)
    except BrokenPipeError:
        if not launched():
            raise
        cli.discard_stdout()  # the other ranks are in the middle of an answer


def launched() -> bool:
    """Whether other ranks may be there: they would not stop at the same token, and torchrun ends them all anyway."""
    return "RANK" in os.environ


if __name__ == "__main__":
    cli.run(main)
