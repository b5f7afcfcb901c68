"""What `llama bench` measures: this package and others, on the same prompts, each in a process of its own."""
