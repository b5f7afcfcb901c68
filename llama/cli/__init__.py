"""The `llama` command: a file for each subcommand, and what reads flags, prints help and ends in one line."""
