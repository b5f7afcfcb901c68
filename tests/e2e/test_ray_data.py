"""Ray Data's actors complete every row once, and alike, on a cluster of two nodes in which processes are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama.engine.options import BuildOptions
from llama.integrations.ray_data import Completer
from llama.outputs import CompletionPrediction
from llama.sampling import SamplingParams
from tests.e2e.processes import ROOT, TIMEOUT, started
from tests.models import build

ray: Any = pytest.importorskip("ray", reason="Ray is not installed, as it takes 600 MB: pip install -e '.[ray]'")
pa: Any = pytest.importorskip("pyarrow")
parquet: Any = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.slow

FILES, ROWS_A_FILE, ROWS_AT_ONCE, ROWS_A_BATCH = 4, 80, 20, 10
PROMPTS = [f"row {i} says {'so ' * (i % 7)}" for i in range(FILES * ROWS_A_FILE)]
HOT = 1.5  # every third row's own temperature


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster: two nodes, each with room for one model, and two GPUs that only Ray believes in."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "num_gpus": 2, "resources": {"model": 1}, "object_store_memory": 100 << 20}
    nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    nodes.add_node(**node)
    ray.init(address=nodes.address, log_to_driver=False)
    ray.data.DataContext.get_current().wait_for_min_actors_s = 60  # or the first does all before there is another
    yield nodes.address
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet files whose rows are in no order."""
    folder = tmp_path_factory.mktemp("prompts")
    for i in range(FILES):
        numbers = range(i, len(PROMPTS), FILES)
        temperatures = [None if number % 3 else HOT for number in numbers]
        rows = {"index": list(numbers), "prompt": [PROMPTS[n] for n in numbers], "temperature": temperatures}
        parquet.write_table(pa.table(rows), folder / f"{i}.parquet")
    return folder


@pytest.fixture(scope="module")
def expected(tiny_folder: Path) -> list[CompletionPrediction]:
    """What a process alone makes of all prompts at once."""
    llm = build(tiny_folder, max_seq_len=64, max_batch_size=16)
    cool, hot = (llm.text_completion(PROMPTS, each, max_gen_len=12, logprobs=True, seed=5) for each in (0.7, HOT))
    return [cool[i] if i % 3 else hot[i] for i in range(len(PROMPTS))]


def check_all_rows(folder: Path, expected: list[CompletionPrediction]) -> list[dict[str, Any]]:
    rows = sorted(parquet.read_table(folder).to_pylist(), key=lambda row: row["index"])
    assert [row["index"] for row in rows] == list(range(len(PROMPTS)))
    for i, (row, prediction) in enumerate(zip(rows, expected, strict=True)):
        assert (row["prompt"], row["error"]) == (PROMPTS[i], None)
        assert (row["generation"], row["finish_reason"]) == (prediction["generation"], prediction["finish_reason"])
        assert (row["prompt_tokens"], row["completion_tokens"]) == (len(PROMPTS[i]) + 1, len(prediction["tokens"]))
        assert row["logprobs"] == pytest.approx(prediction["logprobs"], abs=1e-4)
    return rows


class MortalCompleter(Completer):
    """Says where it ran, and at its third batch the first that comes so far is killed, or its model's other rank."""

    def __init__(self, mark: Path, *args: Any) -> None:
        super().__init__(*args)
        self.mark, self.batches = mark, 0

    def __call__(self, rows: Any) -> Any:
        self.batches += 1
        dies = self.batches == 3 and not self.mark.exists()
        if dies:
            self.mark.write_text(str(os.getpid()))
        if dies and self.followers:
            self.followers[0].kill()
        results = super().__call__(rows)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        where = f"{os.getpid()} {ray.get_runtime_context().get_node_id()}"
        return results.append_column("where", pa.array([where] * len(results)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_row_is_lost_doubled_or_changed_where_a_process_is_killed(
    cluster: str, prompts: Path, expected: Any, tiny_folder: Path, tmp_path: Path, ranks: int
) -> None:
    params = SamplingParams(temperature=0.7, max_gen_len=12, logprobs=True, seed=5)
    options = BuildOptions(tiny_folder, max_seq_len=64, max_batch_size=4, device="cpu", dtype="float32")
    pieces = ray.data.read_parquet(str(prompts)).repartition(target_num_rows_per_block=ROWS_AT_ONCE)
    pieces.map_batches(
        MortalCompleter,
        fn_constructor_args=(tmp_path / "killed", options, params),
        batch_format="pyarrow",
        batch_size=ROWS_A_BATCH,
        compute=ray.data.ActorPoolStrategy(size=2),
        num_gpus=ranks,
        resources={"model": 1},
    ).write_parquet(str(tmp_path / "out"))

    rows = check_all_rows(tmp_path / "out", expected)
    killed = (tmp_path / "killed").read_text()
    processes, nodes = zip(*(row["where"].split() for row in rows), strict=True)
    assert len(set(nodes)) == 2 and len({killed, *processes}) == 3


def test_an_actor_with_another_number_of_gpus_than_ranks_is_refused(cluster: str, tiny_folder: Path) -> None:
    """Its model would be on one GPU, and the others idle, for as long as the job lasts."""
    options = BuildOptions(tiny_folder, model_parallel_size=1, device="cpu")
    with pytest.raises(ray.exceptions.RayError, match=r"is 1, the actor has 2 GPUs: give num_gpus=1"):
        ray.data.range(1).map_batches(Completer, fn_constructor_args=(options,), num_gpus=2, batch_size=1).take_all()


def test_a_job_that_is_killed_goes_on_where_it_was(
    cluster: str, prompts: Path, expected: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    """It is Ray's checkpoint that knows which rows are written; the example has to give it the rows' numbers."""
    out = tmp_path / "out"
    model = ["--ckpt_dir", tiny_folder, "--device", "cpu", "--dtype", "float32", "--max_seq_len", 64, "--seed", 5]
    sampling = ["--temperature", 0.7, "--max_gen_len", 12, "--logprobs"]
    files = ["--rows", prompts, "--out", out, "--rows_at_once", 4]
    command = [sys.executable, ROOT / "example_ray_data.py", *model, *sampling, *files]
    env = {"RAY_ADDRESS": cluster, "PYTHONPATH": str(ROOT)}
    with started(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
        while len(list(out.glob("*"))) < 2 and job.poll() is None:
            time.sleep(0.005)
        job.kill()
        assert job.wait() == -signal.SIGKILL, "it ended by itself"
    with started(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as job:
        _, stderr = job.communicate(timeout=TIMEOUT)
        assert job.returncode == 0, stderr
    check_all_rows(out, expected)
