"""Draw several benchmarks of one machine into one picture: how near each system comes to the speed of memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarking import roofline
from llama.cli import runner as cli


def main(results: str, png: str) -> None:
    """Draw the RESULTS of scripts/benchmark.py --json into PNG.

    Args:
        results: a file with what any number of runs printed; lines that are not JSON objects are skipped.
        png: the picture.
    """
    roofline.check_can_draw(Path(png))
    roofline.draw(read_results(Path(results)), Path(png))


def read_results(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; ValueError when there is none, or one that scripts/benchmark.py did not print."""
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("{"):
            continue
        try:
            result = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if "bytes_per_token" not in result or "machine" not in result:
            raise ValueError(f"{path}, line {number} is not a result of scripts/benchmark.py --json")
        results.append(result)
    if not results:
        raise ValueError(f"{path} holds no result: append to it what scripts/benchmark.py --json prints")
    return results


if __name__ == "__main__":
    cli.run(main)
