"""The passes every selector shares: list shards, fit, score, pick, write; each resumable by shard.

    list      inputs -> shards, frozen; their stamps and the config name the working folder, so nothing stale is reused
    features  each raw and target shard -> vectors, where the selector has any            work/features-KEY/ROLE/*.npy
    fit       each raw and target shard -> arrays; all of them merged -> the state        work/KEY/{raw,target}/*.safetensors
    score     each raw shard -> a score table without text                                work/KEY/scores/*.parquet
    pick      score tables -> where the order of all rows is cut                          work/KEY/choice.json
    write     each raw shard -> its picked rows; all of them, in input order -> the dataset   work/KEY/picked/*.jsonl

A selector is a module of functions (see `selector.Selector`); it never sees shards, files or processes. Memory holds a
batch of rows or scores whatever the corpus; separate targets and a selector's own ranking add the rows that they pick.
Workers only change who does a shard, never what comes out: parts are merged in shard order, and sums are of integers.

Where to look: `shards`, `chunks`, `stream` (reading), `feature_files`, `fit`, `scores` (a table a shard), `orders`, `pick`,
`targets`, `ranking`, `choice` (which rows), `figures`, `write` (what comes out), `engine`, `meter`, `cluster` (who does it).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from data_pipelines.choice import Choice, choose, load_choice, save_choice
from data_pipelines.engine import Driver, Job, each_shard, open_driver
from data_pipelines.figures import Figures, measure
from data_pipelines.fit import fit, stored
from data_pipelines.pick import cut_to_json
from data_pipelines.scores import score_shard, tallies
from data_pipelines.shards import Shard, list_shards
from data_pipelines.write import shown_examples, write_out, write_shard
from posttrain.core.artifact import InputRef
from posttrain.core.context import StageContext
from posttrain.core.durable import write_json
from posttrain.core.hashing import digest_of
from posttrain.errors import ConfigError, DataError

SHORT = 0.5
"""Picked rows whose median length is below this share of the raw rows' are worth a warning."""


def run_selector(selector: str, cfg: Any, ctx: StageContext) -> None:
    """Runs all passes and writes `ctx.out`: rows-*, scores-*.parquet, state.safetensors, selection.json, README.md.

    Args:
        selector: name of the module with the `Selector` functions.
        cfg: its config, a SelectorConfig.
        ctx: the stage; ports `raw`, `target` where the method has it, and any others for its features.

    Raises:
        ConfigError: a config that does not fit the inputs or the selector.
        DataError: no rows, no target text, nothing eligible, or a budget too small for the best row.
    """
    spans = ctx.work / "spans.json"
    raw = list_shards(ctx.refs("raw"), f"stages.{ctx.name}.in.raw", spans)
    named = _target_refs(cfg, ctx)
    targets = _by_target(list_shards([ref for _, ref in named], f"stages.{ctx.name}.in.target", spans) if named else [], named, cfg)
    _check(raw, cfg, ctx)
    job = _job(selector, cfg, ctx, raw, targets, tuple(name for name, _ in named) if cfg.targets == "separate" else ("",))
    _check_selector(job, ctx)
    every = [shard for shards in targets for shard in shards]
    with open_driver(cfg, max(len(raw), len(every)), job.folder / "engine") as driver:
        if job.vectors:
            _features(job, raw, every, driver, ctx)
        fit(job, raw, targets, driver, ctx)
        each_shard(score_shard, job, "scores", raw, driver, ctx.events)
        groups = _reconcile(job, raw, ctx)
        choice = _pick(job, raw, targets, groups, ctx)
        figures = measure(job, raw, choice)
        write_json(job.folder / "examples.json", figures.examples)
        each_shard(write_shard, job, "picked", raw, driver, ctx.events)
    _finish(job, raw, choice, figures, ctx)


def _target_refs(cfg: Any, ctx: StageContext) -> list[tuple[str, InputRef]]:
    """(name, reference) of each target input; under `separate` by name, so that the order written does not matter."""
    refs = ctx.refs("target")
    if cfg.targets == "merged":
        return [("", ref) for ref in refs]
    where = f"stages.{ctx.name}.in.target"
    named = {ref.label: ref for ref in refs}
    if len(named) < len(refs) or not refs:
        raise ConfigError("separate targets need names of their own", where=where, fix="give each target as a source or stage of its own")
    if cfg.target_shares and cfg.target_shares.keys() != named.keys():
        message = f"shares are given for {', '.join(cfg.target_shares)}; the targets are {', '.join(named)}"
        raise ConfigError(message, where=f"stages.{ctx.name}.target_shares", fix="give each target a share")
    return sorted(named.items())


def _by_target(shards: list[Shard], named: list[tuple[str, InputRef]], cfg: Any) -> list[list[Shard]]:
    if not named:
        return []
    if cfg.targets == "merged":
        return [shards]
    return [[shard for shard in shards if shard.ref is ref] for _, ref in named]


def _check(raw: list[Shard], cfg: Any, ctx: StageContext) -> None:
    kinds = sorted({shard.kind for shard in raw})
    where = f"stages.{ctx.name}"
    if len(kinds) > 1:
        message, fix = f"the raw rows are of several row types: {', '.join(kinds)}", "select each type in a stage of its own"
        raise ConfigError(message, where=f"{where}.in.raw", fix=fix)
    if cfg.chunks and kinds != ["text"]:
        raise ConfigError(f"only text rows can be cut into chunks, these are `{kinds[0]}`", where=f"{where}.chunks", fix="drop `chunks`")
    if ctx.world.size > 1:
        message = f"a selector runs in one process, got {ctx.world.size}"
        raise ConfigError(message, where=f"{where}.launch", fix="set `workers` instead")


def _check_selector(job: Job, ctx: StageContext) -> None:
    if job.config.budget.auto and not job.hook("rank"):
        fix = "give rows, tokens, bytes or share"
        raise ConfigError(f"`{job.config.method}` has no best size of its own", where=f"stages.{ctx.name}.budget.auto", fix=fix)


def _job(selector: str, cfg: Any, ctx: StageContext, raw: list[Shard], targets: list[list[Shard]], names: tuple[str, ...]) -> Job:
    from data_pipelines.feature_files import FORMAT
    from posttrain.config.pipeline import semantic
    from posttrain.data.dataset import heldout_keys

    heldout = heldout_keys(ctx)
    content = [[shard.stamp() for shard in raw], [[shard.stamp() for shard in shards] for shards in targets], sorted(heldout)]
    inputs, digests = _other_inputs(ctx)
    key = digest_of([selector, semantic(cfg), ctx.seed, content, names, digests])
    job = Job(selector, cfg, ctx.seed, ctx.work / key[:16], heldout, inputs=inputs, targets=names or ("",))
    if job.hook("feature_maker") is None:
        return job
    own = job.hook("feature_key")
    chunks = cfg.chunks and cfg.chunks.dump()
    features = digest_of([FORMAT, selector, own(cfg) if own else semantic(cfg), content, chunks, digests])
    kept = Path(cfg.feature_cache) if cfg.feature_cache else ctx.work
    return dataclasses.replace(job, vectors=kept / f"features-{features[:16]}")


def _other_inputs(ctx: StageContext) -> tuple[dict[str, list[str]], list[list[str]]]:
    if not set(ctx.inputs) - {"raw", "target"}:
        return {}, []
    from data_pipelines.feature_files import input_digests, input_paths

    return input_paths(ctx), input_digests(ctx)


def _features(job: Job, raw: list[Shard], target: list[Shard], driver: Driver, ctx: StageContext) -> None:
    from data_pipelines.feature_files import feature_shard

    each_shard(feature_shard, job, "features.target", target, driver, ctx.events)
    each_shard(feature_shard, job, "features.raw", raw, driver, ctx.events)


def _reconcile(job: Job, shards: list[Shard], ctx: StageContext) -> Counter[str]:
    """Counts what became of the rows and returns the groups; says why none can be picked before anything is picked."""
    paths = (job.part("scores", shard) for shard in shards)
    counts, left, groups = tallies(paths, chunks=job.config.chunks is not None, groups=job.config.quotas is not None)
    items, bad = counts.total(), sum(n for name, n in left.items() if name.startswith("bad: "))
    _add_up("rows read", left["read"], left["scored"] + bad + left["held out"] + left["other part"])
    reasons = {name: n for name, n in sorted(counts.items()) if name}
    ctx.summary.update(rows_read=left["read"], rows_in=items, excluded_heldout=left["held out"], other_part=left["other part"])
    ctx.summary.update(skipped=bad, eligible=counts[""], not_eligible=reasons)
    if bad:
        why = {name.removeprefix("bad: "): n for name, n in sorted(left.items()) if name.startswith("bad: ")}
        ctx.events.warn(f"left out {bad} of {left['read']} raw rows: {spelled(why)}")
    if not counts[""]:
        fix = "loosen the filters" if reasons else "give raw rows"
        raise DataError(f"none of {items} rows is eligible: {spelled(reasons)}", where=f"stages.{ctx.name}", fix=fix)
    return groups


def _add_up(what: str, given: int, found: int) -> None:
    if given != found:
        raise DataError(
            f"the counts do not add up: {given} {what}, {found} accounted for", fix="the input changed while it was read; run again"
        )


def spelled(reasons: dict[str, int]) -> str:
    """`3 without words, 1 word salad`."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())


def _pick(job: Job, shards: list[Shard], targets: list[list[Shard]], groups: Counter[str], ctx: StageContext) -> Choice:
    budget, where = job.config.budget, f"stages.{ctx.name}.budget"
    asked = None if budget.auto else budget.amount(ctx.summary["rows_in"])
    if job.hook("rank"):
        from data_pipelines.ranking import rank_rows

        ctx.summary.update(rank_rows(job, shards, targets, f"stages.{ctx.name}"))
    if not (job.folder / "choice.json").exists():
        save_choice(job, choose(job, shards, asked, groups))
    choice = load_choice(job)
    unit = "rows" if budget.unit in ("share", "auto") else budget.unit
    if not choice.rows:
        raise DataError(f"the best row alone exceeds the budget of {asked} {unit}", where=where, fix="raise the budget")
    if asked is not None and all(cut.last is None for cut in choice.last.cuts) and choice.weight < asked:
        _short(asked, unit, choice, job, ctx)
    return choice


def _short(asked: int, unit: str, choice: Choice, job: Job, ctx: StageContext) -> None:
    reasons = ctx.summary["not_eligible"]
    why = f" ({spelled(reasons)})" if reasons else ""
    what = "ranked" if job.hook("rank") else "eligible"
    message = f"asked for {asked} {unit}, only {choice.weight} are {what} of {ctx.summary['rows_in']} rows{why}"
    if job.config.budget.on_short == "stop":
        raise DataError(message, where=f"stages.{ctx.name}.budget", fix="lower the budget or give more raw rows")
    ctx.summary["short"] = message
    ctx.events.warn(f"budget: {message}; taking them all, none twice")


def _finish(job: Job, shards: list[Shard], choice: Choice, figures: Figures, ctx: StageContext) -> None:
    facts = write_out(job, shards, ctx.out)
    _add_up("rows picked", choice.rows, figures.rows)
    _add_up("rows picked", choice.rows, facts["rows"])
    tell = job.hook("report")
    report = dict(tell(job.state(), stored(job, "statistics", shards), job.config)) if tell else {}
    for warning in report.get("warnings", []):
        ctx.events.warn(warning)
    parts = {"groups": dict(sorted(figures.groups.items())), "targets": dict(sorted(figures.targets.items()))}
    known = {name: counts for name, counts in parts.items() if counts}
    examples = shown_examples(job, shards)
    features = _where_features(job, shards)
    noted = {"feature_notes": features["features"]["notes"]} if "notes" in features.get("features", {}) else {}
    ctx.summary.update(rows_out=facts["rows"], tokens=figures.words, **known, **noted, **report, **figures.summary, examples=examples)
    state = {"selector": job.selector, "seed": job.seed, "cuts": _cuts(choice), **features, **known, **report}
    write_json(ctx.out / "selection.json", {**state, "examples": examples, **figures.summary})
    _warn_short(ctx, figures)
    ctx.events.log(f"picked {facts['rows']} of {ctx.summary['rows_in']} rows, {figures.words} words; {_numbers(report)}")
    ctx.meta.update(row_type=facts["row_type"], rows=facts["rows"], split={})


def _cuts(choice: Choice) -> list[dict[str, Any]]:
    return [{"order": item.order.name, "groups": item.groups, "cuts": [cut_to_json(cut) for cut in item.cuts]} for item in choice.rounds]


def _where_features(job: Job, shards: list[Shard]) -> dict[str, Any]:
    """Name of the folder with the feature files, their shape and what was noted of raw rows; nothing where the selector has none."""
    if job.vectors is None:
        return {}
    from data_pipelines.feature_files import notes_of, open_vectors

    files = [job.part("features.raw", shard) for shard in shards]
    shapes, notes = [open_vectors(file).shape for file in files], notes_of(files)
    found = {"folder": Path(job.vectors).name, "rows": sum(s[0] for s in shapes), "width": max(s[1] for s in shapes)}
    return {"features": {**found, **({"notes": notes} if notes else {})}}


def _warn_short(ctx: StageContext, figures: Figures) -> None:
    medians = figures.summary["median_words"]
    if medians["picked"] < SHORT * medians["raw"]:
        ctx.events.warn(
            f"the picked rows are short: {medians['picked']} words at the median, {medians['raw']} in all eligible rows; "
            "set filters.min_words, or a budget of tokens, if length is not what you want to select by"
        )


def _numbers(report: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in report.items() if isinstance(value, int | float))
