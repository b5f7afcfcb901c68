"""Chat on the terminal, or answer one message a line from stdin: `python example_chat.py`."""

from llama.cli.chat import main
from llama.cli.runner import run

if __name__ == "__main__":
    run(main)
