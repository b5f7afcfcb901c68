"""A user's own script: `worker.py JOBS.json OUT` builds the model of each job in turn, on one rank or several.

What every rank got is saved to OUT.RANK.json: a list of {"threads", "answers"}, an answer for each call of a job.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama import Llama


def main(jobs_file: str, out: str) -> None:
    jobs: list[dict[str, Any]] = json.loads(Path(jobs_file).read_text())
    results = []
    for job in jobs:
        if job.get("init_process_group"):
            dist.init_process_group("gloo")
        llm = Llama.build(job["ckpt_dir"], max_seq_len=128, dtype=job.get("dtype"))
        results.append({"threads": torch.get_num_threads(), "answers": [answer(llm, call) for call in job["calls"]]})
    Path(f"{out}.{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results))


def answer(llm: Llama, call: dict[str, Any]) -> Any:
    try:
        return llm.text_completion(**call)
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
    if "RANK" in os.environ:
        os._exit(0)  # as the examples leave: see llama.cli.runner
