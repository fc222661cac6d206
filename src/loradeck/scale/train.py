"""A training run by several workers of a Ray cluster: what torchrun starts on one machine, Ray starts on many."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loradeck.errors import TrainingError
from loradeck.scale.cluster import check_ray, cluster

QUIET = {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}  # which prints each line twice, and those of all workers


def train_on_ray(
    run: Callable[[Sequence[str]], int], arguments: Sequence[str], *, workers: int, address: str | None
) -> None:
    """Call `run`, which is the `loradeck` command, in each of the workers, which torch.distributed connects.

    Every worker's machine needs loradeck, the base, the data and the run's folder, by the same paths. Output and errors
    come from the first worker.

    Raises:
        ConfigError: there is no cluster, or Ray Train is not installed.
        TrainingError: a worker has failed.
    """
    check_ray("train")
    with cluster(address):
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        trainer = TorchTrainer(
            _run,
            train_loop_config={"run": run, "arguments": [*arguments], "folder": os.getcwd()},  # noqa: PTH109
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=ray.cluster_resources().get("GPU", 0) >= workers),
            run_config=RunConfig(name="loradeck", worker_runtime_env={"env_vars": QUIET}),
        )
        try:
            trainer.fit()
        except Exception as error:  # Ray's own errors have no common class
            raise TrainingError(f"a worker has failed: {error}", cli="Go on with --resume.") from error


def _run(config: dict[str, Any]) -> None:
    if Path(config["folder"]).is_dir():
        os.chdir(config["folder"])
    if code := config["run"](config["arguments"]):
        raise SystemExit(code)
