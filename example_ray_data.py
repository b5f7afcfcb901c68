"""Complete the rows of Parquet files on a Ray cluster: `python example_ray_data.py --rows IN/ --out OUT/`."""

from __future__ import annotations

from typing import Annotated

import llama.cli.ctrl_c  # noqa: F401  # Ctrl-C ends the program from here on
from llama.cli.options import build_flags, sampling_flags
from llama.cli.runner import run
from llama.engine.options import BuildOptions
from llama.integrations.ray_data import Completer
from llama.integrations.rows import check_columns
from llama.sampling import SamplingParams


def main(
    options: Annotated[BuildOptions, build_flags()],
    params: Annotated[SamplingParams, sampling_flags("echo", max_gen_len=64)],
    *,
    rows: str,
    out: str,
    actors: int = 1,
    rows_at_once: int = 1000,
) -> None:
    """Complete the rows of Parquet files; started again, go on where it was. Paths, or URIs, are what all nodes see.

    Args:
        rows: folder with Parquet files that have columns index and prompt, messages or tokens.
        out: folder for Parquet files with what was generated; out.done beside it says which rows are there.
        actors: most copies of the model, each on --model_parallel_size GPUs (1), or CPUs where there are no GPUs.
        rows_at_once: rows that an actor takes at once, and does again if it ends before they are done.
    """
    import ray
    from ray.data.checkpoint import CheckpointConfig

    ray.init()
    done = CheckpointConfig("index", f"{out.rstrip('/')}.done", delete_checkpoint_on_success=False)
    ray.data.DataContext.get_current().checkpoint_config = done
    dataset = ray.data.read_parquet(rows)
    check_columns(dataset.columns())
    unit = "num_gpus" if "GPU" in ray.cluster_resources() else "num_cpus"
    dataset.repartition(target_num_rows_per_block=rows_at_once).map_batches(
        Completer,
        fn_constructor_args=(options, params),
        batch_format="pyarrow",
        batch_size=rows_at_once,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),  # as many as there is room for
        **{unit: options.model_parallel_size or 1},
    ).write_parquet(out)


if __name__ == "__main__":
    run(main)
