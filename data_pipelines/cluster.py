"""datatrove's executors as the driver of the passes: local processes, Slurm arrays, Ray (`engine: {with: datatrove-...}`).

Each pass is one datatrove pipeline of one step; task i of N does the shards i, i + N, ... that have no part yet. Our part
files stay the truth about what is done; datatrove's own completion markers are not asked (`skip_completed: false`), since
they are kept for tasks instead of shards and do not know the config. For Slurm and Ray the folder of parts, the inputs and
this package must be reachable from the nodes under the same paths.

datatrove pickles its executor, with the config and the list of shards, to hand it to its processes and nodes; rows, scores
and states are never pickled. Slurm and Ray executors return before their tasks end, so finished parts are waited for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.engine import Job, Step
from posttrain.errors import ConfigError, PosttrainError

if TYPE_CHECKING:
    from data_pipelines.selector import Engine
    from data_pipelines.shards import Shard

OURS = ("pipeline", "tasks", "logging_dir", "skip_completed")
EXECUTORS = {
    "datatrove-local": ("datatrove.executor", "LocalPipelineExecutor"),
    "datatrove-slurm": ("datatrove.executor.slurm", "SlurmPipelineExecutor"),
    "datatrove-ray": ("datatrove.executor.ray", "RayPipelineExecutor"),
}


def shard_step(task: Step, job: Job, step: str, shards: list[Shard]) -> Any:
    """The datatrove PipelineStep that does one rank's shards."""
    from data_pipelines.cluster_step import ShardStep

    return ShardStep(task, job, step, shards)


def make_executor(engine: Engine, pipeline: list[Any], logging_dir: Path, workers: int = 1) -> Any:
    """A datatrove executor out of the config's options.

    Args:
        engine: `with` names the executor; `options` are its arguments.
        pipeline: its steps.
        logging_dir: where it keeps its logs and markers.
        workers: processes of the local executor, where the options do not say.

    Raises:
        ConfigError: datatrove (or ray) is not installed, an option that it does not have, or one that is decided here.
    """
    import importlib

    module, name = EXECUTORS[engine.with_]
    if taken := [option for option in engine.options if option in OURS]:
        raise ConfigError(f"`{taken[0]}` is set by the passes", where="engine.options", fix="drop it; `engine.tasks` sets the tasks")
    try:
        executor = getattr(importlib.import_module(module), name)
    except ImportError as error:
        fix = "pip install 'posttrain[datatrove]'" + (" ray" if engine.with_ == "datatrove-ray" else "")
        raise ConfigError(f"datatrove's {name} cannot be imported ({error})", where="engine.with", fix=fix) from None
    options = {"workers": workers, **engine.options} if engine.with_ == "datatrove-local" else engine.options
    try:
        return executor(pipeline=pipeline, tasks=engine.tasks, logging_dir=str(logging_dir), skip_completed=False, **options)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}", where="engine.options", fix="see datatrove's documentation of this executor") from None


class ClusterDriver:
    """See `engine.Driver`; one datatrove run a step.

    Args:
        engine: the config.
        folder: for datatrove's logs.
        workers: processes of the local executor.
    """

    def __init__(self, engine: Engine, folder: Path, workers: int = 1) -> None:
        self._engine, self._folder, self._workers = engine, folder, workers

    def run(self, task: Step, job: Job, step: str, shards: list[Shard]) -> Iterator[Shard | None]:
        """See `engine.Driver`.

        Raises:
            PosttrainError: parts are missing after a local run, or none was finished for `engine.stall_s`.
        """
        if not shards:
            return
        make_executor(self._engine, [shard_step(task, job, step, shards)], self._folder / step, self._workers).run()
        waits = self._engine.with_ != "datatrove-local"
        missing, last = list(shards), time.monotonic()
        while missing:
            done = [shard for shard in missing if job.done(step, shard)]
            missing = [shard for shard in missing if shard not in done]
            yield from done
            last = time.monotonic() if done else last
            if missing and (not waits or time.monotonic() - last > self._engine.stall_s):
                message = f"{len(missing)} of {len(shards)} shards have no part"
                raise PosttrainError(message, where=step, fix=f"see the logs in {self._folder / step}, then run again")
            if missing:
                yield None
                time.sleep(self._engine.poll_s)
