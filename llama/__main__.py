"""`python -m llama` is the `llama` command."""

import llama.cli.ctrl_c  # noqa: F401  # Ctrl-C ends the program from here on
from llama.cli.main import main

if __name__ == "__main__":
    main()
