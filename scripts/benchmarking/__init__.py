"""The parts of scripts/benchmark.py: workers, prompts, the machine, and the picture."""
