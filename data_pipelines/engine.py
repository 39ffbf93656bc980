"""Doing a step for every shard: what a worker is told, where parts lie, and one process or a pool of them.

A step is a function (job, step, shard) that ends by putting the shard's part in its place. Shards whose part is there
are passed over, which is all there is to resuming.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.shards import Shard
from posttrain.core.events import Events
from posttrain.core.process import die_with_parent
from posttrain.errors import PosttrainError

SUFFIX = {"scores": ".parquet", "picked": ".jsonl"}


@dataclass(frozen=True)
class Job:
    """All that a worker needs; picklable."""

    selector: str
    config: Any
    seed: int
    folder: Path
    heldout: frozenset[str]

    @property
    def methods(self) -> Any:
        """The selector's module."""
        return importlib.import_module(self.selector)

    def part(self, step: str, shard: Shard) -> Path:
        """Name of a shard's part."""
        return self.folder / step / f"{shard.index:06d}{SUFFIX.get(step, '.safetensors')}"

    def done(self, step: str, shard: Shard) -> bool:
        """The shard's part (for picked rows also their statistics) is there."""
        steps = ("picked", "statistics") if step == "picked" else (step,)
        return all(self.part(name, shard).exists() for name in steps)


Step = Callable[[Job, str, Shard], None]


@contextlib.contextmanager
def open_pool(workers: int) -> Iterator[concurrent.futures.Executor | None]:
    """A pool of spawned processes that die with this one; None for one worker, which needs none."""
    if workers == 1:
        yield None
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn, initializer=die_with_parent) as pool:
        yield pool


def each_shard(task: Step, job: Job, step: str, shards: list[Shard], pool: concurrent.futures.Executor | None, events: Events) -> None:
    """Does the shards that have no part yet.

    Raises:
        PosttrainError: a worker process was killed; errors of the task itself come through unchanged.
    """
    todo = [shard for shard in shards if not job.done(step, shard)]
    done = len(shards) - len(todo)
    if done and todo:
        events.log(f"{step}: {done} of {len(shards)} shards were done before")
    for _ in _results(task, job, step, todo, pool):
        done += 1
        events.progress(step, done, len(shards), "shards")


def _results(task: Step, job: Job, step: str, todo: list[Shard], pool: concurrent.futures.Executor | None) -> Iterator[None]:
    if pool is None:
        for shard in todo:
            task(job, step, shard)
            yield
        return
    futures = [pool.submit(task, job, step, shard) for shard in todo]
    try:
        for future in concurrent.futures.as_completed(futures):
            future.result()
            yield
    except BrokenProcessPool:
        fix = "run again with fewer `workers`; finished shards are kept"
        raise PosttrainError("a worker process was killed, most often for lack of memory", where=step, fix=fix) from None
    finally:
        for future in futures:
            future.cancel()
