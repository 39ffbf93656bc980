"""The fit: statistics of every shard, merged into the state that rows are scored against; with the guard's, if there is one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipelines.engine import Driver, Job, each_shard
from data_pipelines.parts import load_arrays, save_arrays
from data_pipelines.scores import BATCH_ROWS, CHARS_A_MIB, row_batches
from data_pipelines.shards import Shard, shard_rows
from data_pipelines.stream import shard_items
from posttrain.core.context import StageContext
from posttrain.errors import DataError

Arrays = dict[str, np.ndarray]
GUARD = "guard/"


def fit(job: Job, raw: list[Shard], targets: list[list[Shard]], driver: Driver, ctx: StageContext) -> None:
    """Writes `state.safetensors`: what the selector's `merge` gave, and the guard's tables under `guard/`.

    Args:
        targets: shards of each target.

    Raises:
        DataError: raw or target rows that cannot be fitted, with a count of what there was to read.
    """
    path, every = job.folder / "state.safetensors", [shard for shards in targets for shard in shards]
    if path.exists():
        return
    each_shard(_fit_shard, job, "target", every, driver, ctx.events)
    each_shard(_fit_shard, job, "raw", raw, driver, ctx.events)
    try:
        state = dict(job.methods.merge(_own(job, "raw", raw), [_own(job, "target", shards) for shards in targets], job.config))
    except DataError as error:
        message = f"{error.message} ({_census(job, {'raw': raw, 'target': every})})"
        raise DataError(message, where=f"stages.{ctx.name}.in", fix=error.fix) from None
    if job.config.guard.salad:
        state.update({GUARD + name: value for name, value in _guard(job, raw, every, driver, ctx).items()})
    save_arrays(path, state)


def _fit_shard(job: Job, step: str, shard: Shard) -> None:
    rows = (item.row for item in shard_items(job, shard, step))
    if not job.config.guard.salad:
        save_arrays(job.part(step, shard), job.methods.fit_shard(rows, job.config, step))
        return
    from data_pipelines import guard

    watched, finish = guard.watch(rows, job.config.guard)
    found = dict(job.methods.fit_shard(watched, job.config, step))
    for _ in watched:
        pass
    save_arrays(job.part(step, shard), {**found, **{GUARD + name: value for name, value in finish().items()}})


def stored(job: Job, step: str, shards: list[Shard]) -> Iterator[Arrays]:
    """The shards' parts, loaded one at a time."""
    for shard in shards:
        yield load_arrays(job.part(step, shard))


def _own(job: Job, step: str, shards: list[Shard]) -> Iterator[Arrays]:
    for part in stored(job, step, shards):
        yield {name: value for name, value in part.items() if not name.startswith(GUARD)}


def _guards(job: Job, step: str, shards: list[Shard]) -> Iterator[Arrays]:
    for part in stored(job, step, shards):
        yield {name.removeprefix(GUARD): value for name, value in part.items() if name.startswith(GUARD)}


def _guard(job: Job, raw: list[Shard], target: list[Shard], driver: Driver, ctx: StageContext) -> Arrays:
    """The guard's tables, and its `threshold` from the target rows judged by them."""
    from data_pipelines import guard

    if not target:
        raise DataError("the guard has no target rows to set its threshold by", where=f"stages.{ctx.name}.guard", fix="set `salad: false`")
    tables = guard.merge(_guards(job, "raw", raw), _guards(job, "target", target), job.config.guard)
    save_arrays(job.folder / "guard.safetensors", tables)
    each_shard(_judge_shard, job, "guard", target, driver, ctx.events)
    figures = np.concatenate([part["order_z"] for part in stored(job, "guard", target)])
    threshold = guard.threshold(figures, job.config.guard)
    if np.isfinite(threshold):
        ctx.events.log(f"guard: rows whose word order is less than {threshold:.3g} deviations from random are left out")
    else:
        ctx.summary["guard_off"] = text = _guard_off(figures, job.config.guard.min_pairs)
        ctx.events.warn(text)
    return {**tables, "threshold": np.array([threshold], np.float64)}


def _guard_off(figures: np.ndarray, min_pairs: int) -> str:
    from data_pipelines.guard import MIN_TARGET_ROWS

    judged = int(np.isfinite(figures).sum())
    return f"the guard is off: {judged} target rows have at least {min_pairs} pairs of words, {MIN_TARGET_ROWS} are needed"


def _judge_shard(job: Job, step: str, shard: Shard) -> None:
    from data_pipelines import guard
    from posttrain.data.rows import row_text

    state, found = job.guard_state(), [np.zeros(0)]
    items = shard_items(job, shard, "target", features=False)
    for batch in row_batches(items, BATCH_ROWS, CHARS_A_MIB * job.config.memory):
        found.append(guard.scores([row_text(item.row) for item in batch], state, job.config.guard))
    save_arrays(job.part(step, shard), {"order_z": np.concatenate(found)})


def _census(job: Job, shards: dict[str, list[Shard]]) -> str:
    """What there was to read and what was left out, for the message of a fit that cannot be done."""
    parts: list[Any] = []
    for role, some in shards.items():
        left: Counter[str] = Counter()
        rows = sum(1 for shard in some for _ in shard_rows(shard, job.heldout, left))
        first = (some[0].path or some[0].label) if some else "none"
        parts.append(f"{role}: {first}{' ...' if len(some) > 1 else ''}, {rows} rows")
        parts += [f"{count} {name}" for name, count in sorted(left.items()) if name != "read"]
    return ", ".join(parts)
