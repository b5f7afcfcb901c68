"""Damaged and hostile files of every format, thousands of them: each loads, or is refused in one line.

`seeds` writes whole models, `damage` and `structures` make mutants of their files, `trial` loads one and says what came
of it, and `runner` does so in processes with limits. `python -m tests.fuzz gguf 1234` runs one mutant again.
"""
