"""`python -m llama` is the `llama` command."""

from llama.cli.main import main

if __name__ == "__main__":
    main()
