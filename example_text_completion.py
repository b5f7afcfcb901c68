"""Complete prompts: `python example_text_completion.py`, or on N ranks `torchrun --nproc_per_node N ...`."""

import llama.cli.ctrl_c  # noqa: F401  # Ctrl-C ends the program from here on
from llama.cli.complete import main
from llama.cli.runner import run

if __name__ == "__main__":
    run(main)
