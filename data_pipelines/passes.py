"""The passes every selector shares: list shards, fit, score, pick, write; each resumable by shard.

    list    inputs -> shards, frozen; their stamps and the config name the working folder, so nothing stale is reused
    fit     each raw and each target shard -> arrays; all of them merged -> state            work/KEY/{raw,target}/*.safetensors
    score   each raw shard -> a score table without text                                     work/KEY/scores/*.parquet
    pick    score tables -> one cut through the order of all rows (`pick.find_cut`)           work/KEY/cut.json
    write   each raw shard -> its picked rows; all of them, in input order -> the dataset     work/KEY/picked/*.jsonl

A selector is a module of functions (see `selector.Selector`); it never sees shards, files or processes. Memory holds one batch of
rows or scores and one shard's picks, whatever the corpus. Workers only change who does a shard, never what comes out:
parts are merged in shard order, and their sums are integers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.budget import Budget
from data_pipelines.engine import Job, each_shard, open_pool
from data_pipelines.parts import load_arrays, new_part, save_arrays
from data_pipelines.pick import Cut, Keys, cut_from_json, cut_to_json, find_cut, picked, rank_of
from data_pipelines.scores import score_columns, score_shard, tallies
from data_pipelines.shards import Shard, list_shards, rows_at, shard_rows
from posttrain.core.context import StageContext
from posttrain.core.durable import write_json
from posttrain.core.hashing import digest_of
from posttrain.errors import ConfigError, DataError

Row = dict[str, Any]
Arrays = dict[str, np.ndarray]


def run_selector(selector: str, cfg: Any, ctx: StageContext) -> None:
    """Runs all passes and writes `ctx.out`: rows-*, scores-*.parquet, state.safetensors, state.json.

    Args:
        selector: name of the module with the `Selector` functions.
        cfg: its config, with `budget` and `workers`.
        ctx: the stage; ports `raw` and `target`.

    Raises:
        DataError: no rows, no target text, nothing eligible, or a budget too small for the best row.
    """
    from posttrain.config.pipeline import semantic
    from posttrain.data.dataset import heldout_keys

    raw = list_shards(ctx.refs("raw"), f"stages.{ctx.name}.in.raw")
    target = list_shards(ctx.refs("target"), f"stages.{ctx.name}.in.target")
    _check_inputs(raw, ctx)
    heldout = heldout_keys(ctx)
    key = digest_of([selector, semantic(cfg), ctx.seed, [s.stamp() for s in raw], [s.stamp() for s in target], sorted(heldout)])
    job = Job(selector, cfg, ctx.seed, ctx.work / key[:16], heldout)
    with open_pool(cfg.workers) as pool:
        state = _fit(job, raw, target, pool, ctx)
        each_shard(score_shard, job, "scores", raw, pool, ctx.events)
        rows = _reconcile(job, raw, ctx)
        cut = _pick(job, raw, cfg.budget, rows, ctx)
        each_shard(_write_shard, job, "picked", raw, pool, ctx.events)
    _finish(job, raw, state, cut, ctx)


def _check_inputs(raw: list[Shard], ctx: StageContext) -> None:
    kinds = sorted({shard.kind for shard in raw})
    if len(kinds) > 1:
        message, fix = f"the raw inputs have several row types: {', '.join(kinds)}", "select from each by its own stage"
        raise ConfigError(message, where=f"stages.{ctx.name}.in.raw", fix=fix)
    if ctx.world.size > 1:
        message = f"a selector runs in one process, got {ctx.world.size}"
        raise ConfigError(message, where=f"stages.{ctx.name}.launch", fix="set `workers` instead")


def _fit(job: Job, raw: list[Shard], target: list[Shard], pool: Any, ctx: StageContext) -> Arrays:
    path = job.folder / "state.safetensors"
    if not path.exists():
        each_shard(_fit_shard, job, "target", target, pool, ctx.events)
        each_shard(_fit_shard, job, "raw", raw, pool, ctx.events)
        try:
            save_arrays(path, job.methods.merge(_stored(job, "raw", raw), [_stored(job, "target", target)], job.config))
        except DataError as error:
            raise DataError(f"{error.message} ({_census(job, raw, target)})", where=f"stages.{ctx.name}.in", fix=error.fix) from None
    return load_arrays(path)


def _census(job: Job, raw: list[Shard], target: list[Shard]) -> str:
    """What there was to read and what was left out, for the message of a fit that cannot be done."""
    parts = []
    for role, shards in (("raw", raw), ("target", target)):
        left: Counter[str] = Counter()
        rows = sum(1 for shard in shards for _ in shard_rows(shard, job.heldout, left))
        parts.append(f"{role}: {shards[0].path or shards[0].label}{' ...' if len(shards) > 1 else ''}, {rows} rows")
        parts += [f"{count} {name}" for name, count in sorted(left.items())]
    return ", ".join(parts)


def _stored(job: Job, step: str, shards: list[Shard]) -> Iterator[Arrays]:
    for shard in shards:
        yield load_arrays(job.part(step, shard))


def _fit_shard(job: Job, step: str, shard: Shard) -> None:
    rows = (row for _, row in shard_rows(shard, job.heldout))
    save_arrays(job.part(step, shard), job.methods.fit_shard(rows, job.config, step))


def _reconcile(job: Job, shards: list[Shard], ctx: StageContext) -> int:
    """Counts what became of the rows and returns their number; says why none can be picked before anything is picked."""
    counts, left = tallies(job.part("scores", shard) for shard in shards)
    rows, bad = counts.total(), sum(n for name, n in left.items() if name.startswith("bad: "))
    reasons = {name: n for name, n in sorted(counts.items()) if name}
    ctx.summary.update(rows_in=rows, excluded_heldout=left["held out"], skipped=bad, eligible=counts[""], not_eligible=reasons)
    if bad:
        why = {name.removeprefix("bad: "): n for name, n in sorted(left.items()) if name.startswith("bad: ")}
        ctx.events.warn(f"left out {bad} of {rows + bad} raw rows: {_spelled(why)}")
    if not counts[""]:
        raise DataError(f"none of {rows} rows is eligible: {_spelled(reasons)}", where=f"stages.{ctx.name}", fix="lower the length limits")
    return rows


def _spelled(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in reasons.items())


def _keys(job: Job, shards: list[Shard], unit: str) -> Iterator[tuple[Keys, dict[str, np.ndarray]]]:
    """Keys of all eligible rows, weighed in `unit`, with the columns they come from."""
    for shard in shards:
        for columns in score_columns(job.part("scores", shard)):
            order = getattr(job.methods, "order", None)
            key = order(columns, job.config, job.seed) if order else columns["score"]
            weight = {"tokens": columns["words"], "bytes": columns["bytes"]}.get(unit, np.ones(len(key), np.int64))
            yield Keys(rank_of(key), columns["uid"], shard.index, columns["row"], weight), columns


def _pick(job: Job, shards: list[Shard], budget: Budget, rows: int, ctx: StageContext) -> Cut:
    path = job.folder / "cut.json"
    asked = budget.amount(rows)
    if not path.exists():
        write_json(path, cut_to_json(find_cut(lambda: (keys for keys, _ in _keys(job, shards, budget.unit)), asked)))
    cut = cut_from_json(json.loads(path.read_text(encoding="utf-8")))
    unit = "rows" if budget.unit == "share" else budget.unit
    if not cut.rows:
        message = f"the best row alone exceeds the budget of {asked} {unit}"
        raise DataError(message, where=f"stages.{ctx.name}.budget", fix="raise the budget")
    if cut.last is None and cut.eligible_weight < asked:
        _short(asked, unit, cut, budget, ctx)
    return cut


def _short(asked: int, unit: str, cut: Cut, budget: Budget, ctx: StageContext) -> None:
    reasons = ctx.summary["not_eligible"]
    why = f" ({_spelled(reasons)})" if reasons else ""
    message = f"asked for {asked} {unit}, only {cut.eligible_weight} are eligible of {ctx.summary['rows_in']} rows{why}"
    if budget.on_short == "stop":
        raise DataError(message, where=f"stages.{ctx.name}.budget", fix="lower the budget or give more raw rows")
    ctx.summary["short"] = message
    ctx.events.warn(f"budget: {message}; taking them all, none twice")


def _write_shard(job: Job, step: str, shard: Shard) -> None:
    cut = cut_from_json(json.loads((job.folder / "cut.json").read_text(encoding="utf-8")))
    score: dict[int, float] = {}
    for keys, columns in _keys(job, [shard], "rows"):
        mask = picked(keys, cut)
        score.update(zip(keys.row[mask].tolist(), columns["score"][mask].tolist(), strict=True))
    with new_part(job.part(step, shard)) as path, open(path, "wb") as file:
        save_arrays(job.part("statistics", shard), job.methods.fit_shard(_picked_rows(job, shard, score, file), job.config, step))


def _picked_rows(job: Job, shard: Shard, score: dict[int, float], file: Any) -> Iterator[Row]:
    """Writes the wanted rows as they pass by on their way into the statistics."""
    from posttrain.data.shards import json_line

    for number, row in rows_at(shard, score) if score else ():
        file.write(json_line(with_score(row, score[number], shard.ref.name, job.config.score_as)))
        yield row


def with_score(row: Row, score: float, source: str, name: str) -> Row:
    """The row with all its columns plus `source`, `weight` (1 where it has none) and its score.

    A column that already has the score's name is kept as `NAME_before` (or `NAME_before_before`, ...).
    """
    before = name
    while before in row:
        before += "_before"
    kept = {before: row[name]} if name in row else {}
    return {**row, **kept, "source": row.get("source") or source, "weight": row.get("weight", 1.0), name: score}


def _finish(job: Job, shards: list[Shard], state: Arrays, cut: Cut, ctx: StageContext) -> None:
    from posttrain.data.dataset import write_dataset
    from posttrain.data.shards import read_shard

    parts = [job.part("picked", shard) for shard in shards]
    rows = (row for part in parts for _, row in read_shard(part))
    facts = write_dataset(rows, ctx.out, shards[0].kind, suffix=job.config.suffix)
    for shard in shards:
        _link(job.part("scores", shard), ctx.out / f"scores-{shard.index:05d}.parquet")
    _link(job.folder / "state.safetensors", ctx.out / "state.safetensors")
    words = _picked_words(job, shards, cut)
    tell = getattr(job.methods, "report", None)
    report = tell(state, _stored(job, "statistics", shards), job.config) if tell else {}
    write_json(ctx.out / "state.json", {"selector": job.selector, "seed": job.seed, "cut": cut_to_json(cut), **report})
    ctx.summary.update(rows_out=facts["rows"], tokens=words, **report)
    ctx.events.log(f"picked {facts['rows']} of {ctx.summary['rows_in']} rows, {words} words; {_spelled_facts(report)}")
    ctx.meta.update(row_type=facts["row_type"], rows=facts["rows"], split={})


def _spelled_facts(report: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in report.items())


def _picked_words(job: Job, shards: list[Shard], cut: Cut) -> int:
    if job.config.budget.unit == "tokens":
        return cut.weight
    return sum(int(keys.weight[picked(keys, cut)].sum()) for keys, _ in _keys(job, shards, "tokens"))


def _link(source: Path, to: Path) -> None:
    """The same file under a second name; a copy where the file system cannot."""
    try:
        os.link(source, to)
    except OSError:
        shutil.copyfile(source, to)
