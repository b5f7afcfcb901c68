"""Chat on the terminal, or answer one message a line from stdin: `python example_chat.py`."""

import llama.cli.ctrl_c  # noqa: F401  # Ctrl-C ends the program from here on
from llama.cli.chat import main
from llama.cli.runner import run

if __name__ == "__main__":
    run(main)
