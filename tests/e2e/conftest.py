"""What end-to-end tests share: a Meta checkpoint in 8 shards, and a way to run jobs on ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_meta
from tests.e2e.processes import WORKER, python, torchrun

Jobs = list[dict[str, Any]]
# Runs jobs on so many ranks (0: plain python) and returns, for each job, what all ranks agree on.
RunJobs = Callable[..., Jobs]


@pytest.fixture(scope="session")
def eight_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with 16 heads and 4 KV heads, whose tokens are bytes, as Meta would store it on 8 GPUs."""
    folder = tmp_path_factory.mktemp("eight_shards")
    write_meta(folder, shards=8)
    return folder


@pytest.fixture(scope="session")
def run_jobs(tmp_path_factory: pytest.TempPathFactory) -> RunJobs:
    def run(ranks: int, jobs: Jobs, **options: Any) -> Jobs:
        folder = tmp_path_factory.mktemp("jobs")
        (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
        arguments = (folder / "jobs.json", folder / "out")
        done = torchrun(ranks, WORKER, *arguments, **options) if ranks else python(WORKER, *arguments, **options)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        results = [json.loads((folder / f"out.{rank}.json").read_text()) for rank in range(ranks or 1)]
        assert all(result == results[0] for result in results), "the ranks disagree"
        return results[0]

    return run
