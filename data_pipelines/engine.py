"""Doing a step for every shard: what a worker is told, where parts lie, and one process or a pool of them.

A step is a function (job, step, shard) that ends by putting the shard's part in its place. Shards whose part is there
are passed over, which is all there is to resuming; so any driver will do that calls the step once for every shard: the
loop and the pool of this file, or a cluster's (`data_pipelines.cluster`).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data_pipelines import meter
from data_pipelines.shards import Shard
from posttrain.core.durable import write_json
from posttrain.core.events import Events
from posttrain.core.process import die_with_parent
from posttrain.errors import PosttrainError

SUFFIX = {"scores": ".parquet", "picked": ".jsonl", "examples": ".json", "features": ".npy"}
WITH_PICKED = ("statistics", "examples")
"""Parts that the write step makes beside a shard's picked rows."""
LOOK_EVERY_S = 0.25
KEYS_SENT = 1000
"""More held-out keys than this go to the workers by a file."""


@dataclass(frozen=True)
class Job:
    """All that a worker needs; picklable.

    Args:
        selector: name of its module.
        config, seed: of the stage.
        folder: where the parts lie.
        heldout: keys of rows that are never read.
        vectors: folder of the feature files; None where the selector has no features.
        inputs: port -> paths, of the ports beside raw and target.
        targets: names of separate targets; one empty name under `merged`.
    """

    selector: str
    config: Any
    seed: int
    folder: Path
    heldout: frozenset[str] = field(repr=False)
    vectors: Path | None = None
    inputs: dict[str, list[str]] = field(default_factory=dict)
    targets: tuple[str, ...] = ("",)

    def __getstate__(self) -> dict[str, Any]:
        """Without many held-out keys, which workers read from a file once instead of with every shard."""
        state = dict(self.__dict__)
        if len(self.heldout) > KEYS_SENT:
            state["heldout"] = path = self.folder / "heldout.json"
            if not path.exists():
                write_json(path, sorted(self.heldout), indent=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["heldout"], Path):
            state = {**state, "heldout": _keys(state["heldout"])}
        self.__dict__.update(state)

    @property
    def methods(self) -> Any:
        """The selector's module."""
        return importlib.import_module(self.selector)

    def hook(self, name: str) -> Any:
        """An optional function of the selector's module, or None."""
        return getattr(self.methods, name, None)

    def part(self, step: str, shard: Shard) -> Path:
        """Name of a shard's part; `features.ROLE` are the feature files."""
        kind, _, role = step.partition(".")
        folder = self.vectors / role if kind == "features" and self.vectors else self.folder / step
        return folder / f"{shard.index:06d}{SUFFIX.get(kind, '.safetensors')}"

    def state(self) -> dict[str, Any]:
        """The fitted state, without the guard's tables; read once a process."""
        return {name: value for name, value in _arrays(self.folder / "state.safetensors").items() if not name.startswith("guard/")}

    def guard_state(self) -> dict[str, Any]:
        """The guard's tables; with its `threshold` once that is known."""
        whole = self.folder / "state.safetensors"
        if not whole.exists():
            return _arrays(self.folder / "guard.safetensors")
        return {name.removeprefix("guard/"): value for name, value in _arrays(whole).items() if name.startswith("guard/")}

    def maker(self) -> Any:
        """The selector's feature maker; opened once a process."""
        assert self.vectors is not None
        if self.vectors not in _makers:
            _makers.clear()
            _makers[self.vectors] = self.methods.feature_maker(self.config, self.inputs)
        return _makers[self.vectors]

    def done(self, step: str, shard: Shard) -> bool:
        """The shard's part (for picked rows also what is made with them) is there."""
        steps = (step, *WITH_PICKED) if step == "picked" else (step,)
        return all(self.part(name, shard).exists() for name in steps)


@functools.lru_cache(maxsize=1)
def _keys(path: Path) -> frozenset[str]:
    return frozenset(json.loads(path.read_text(encoding="utf-8")))


@functools.lru_cache(maxsize=1)
def _arrays(path: Path) -> dict[str, Any]:
    from data_pipelines.parts import load_arrays

    return load_arrays(path)


_makers: dict[Path, Any] = {}

Step = Callable[[Job, str, Shard], None]


class Driver(Protocol):
    """Gets a step done for every shard that it is given."""

    def run(self, task: Step, job: Job, step: str, shards: list[Shard]) -> Iterator[Shard | None]:
        """Yields each shard that is done, and None now and then while nothing is."""


class Inline:
    """One shard after the other in this process."""

    def run(self, task: Step, job: Job, step: str, shards: list[Shard]) -> Iterator[Shard | None]:
        """See `Driver`."""
        for shard in shards:
            task(job, step, shard)
            yield shard


class Pool:
    """Spawned processes that die with this one."""

    def __init__(self, pool: concurrent.futures.Executor) -> None:
        self._pool = pool

    def run(self, task: Step, job: Job, step: str, shards: list[Shard]) -> Iterator[Shard | None]:
        """See `Driver`.

        Raises:
            PosttrainError: a worker process was killed; errors of the task itself come through unchanged.
        """
        futures = {self._pool.submit(task, job, step, shard): shard for shard in shards}
        waiting = set(futures)
        try:
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, LOOK_EVERY_S, concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    future.result()
                    yield futures[future]
                if not done:
                    yield None
        except BrokenProcessPool:
            fix = "run again with fewer `workers`; finished shards are kept"
            raise PosttrainError("a worker process was killed, most often for lack of memory", where=step, fix=fix) from None
        finally:
            for future in futures:
                future.cancel()


@contextlib.contextmanager
def open_driver(cfg: Any, shards: int, folder: Path) -> Iterator[Driver]:
    """The driver that `cfg.workers` and `cfg.engine` ask for.

    Args:
        cfg: with `workers`, and `engine` where a cluster may be asked for.
        shards: most shards that a step has.
        folder: scratch folder of the cluster drivers.
    """
    engine = getattr(cfg, "engine", None)
    if engine is not None and engine.with_ != "pool":
        from data_pipelines.cluster import ClusterDriver

        yield ClusterDriver(engine, folder, cfg.workers)
        return
    counters = meter.new_counters(shards)
    meter.use(counters)
    try:
        if cfg.workers == 1:
            yield Inline()
        else:
            spawn = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(cfg.workers, spawn, _start, (counters,)) as pool:
                yield Pool(pool)
    finally:
        meter.use(None)


def _start(counters: Any) -> None:
    die_with_parent()
    meter.use(counters)


def each_shard(task: Step, job: Job, step: str, shards: list[Shard], driver: Driver, events: Events) -> None:
    """Does the shards that have no part yet, and tells how far it is.

    Raises:
        PosttrainError: see the driver; errors of the task itself.
    """
    todo = [shard for shard in shards if not job.done(step, shard)]
    done = [shard for shard in shards if job.done(step, shard)]
    if done and todo:
        events.log(f"{step}: {len(done)} of {len(shards)} shards were done before")
    with meter.watching(events, step, shards, done) as watch:
        for shard in driver.run(task, job, step, todo):
            watch.look(shard)
