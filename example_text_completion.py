"""Complete prompts: `python example_text_completion.py`, or on N ranks `torchrun --nproc_per_node N ...`."""

from llama.cli.complete import main
from llama.cli.runner import run

if __name__ == "__main__":
    run(main)
