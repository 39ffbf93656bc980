"""The passes of deduplication; each resumable by shard.

    list     inputs -> shards, frozen; their stamps and the config name the working folder
    mark     each shard -> marks (keys, bands, ids; no text); of `against` first           KEY/{against,data}/*.safetensors
    fates    equal keys, shared bands, verified clusters -> which rows go and why          KEY/verdict.safetensors
    write    each shard -> its rows that stay, and the table of those that do not          KEY/{kept,duplicates}/*

Workers only change who does a shard. A kill costs the shards in hand, and the fates where it fell among them.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipelines import contamination, dedup_fates
from data_pipelines.dedup import DedupConfig, MinHashConfig
from data_pipelines.dedup_fates import NEAR, WHY
from data_pipelines.engine import Driver, each_shard, open_driver
from data_pipelines.marks import (
    Arrays,
    DedupJob,
    Table,
    collect,
    collect_sets,
    compared_text,
    forget_parts,
    gather,
    known_grams,
    open_arrays,
    rows_of,
    table_of,
)  # fmt: skip
from data_pipelines.meter import Count
from data_pipelines.minhash import shares_a_band
from data_pipelines.parts import new_part, save_arrays
from data_pipelines.shards import Shard, list_shards, rows_at, shard_rows
from posttrain.core.context import StageContext
from posttrain.core.hashing import digest_of
from posttrain.errors import ConfigError, DataError, PosttrainError


def run_dedup(cfg: DedupConfig, ctx: StageContext) -> None:
    """Runs all passes and writes `ctx.out`: rows-*, duplicates-*.parquet.

    Args:
        cfg: the config.
        ctx: the stage; ports `data` and `against`.

    Raises:
        ConfigError: several row types, or several processes.
        DataError: no rows, or none that stays.
    """
    spans = ctx.work / "spans.json"
    data = list_shards(ctx.refs("data"), f"stages.{ctx.name}.in.data", spans)
    against = list_shards(ctx.refs("against"), f"stages.{ctx.name}.in.against", spans) if ctx.refs("against") else []
    _check_inputs(data, ctx)
    job = _new_job(cfg, data, against, ctx)
    if cfg.minhash != "off":
        _say_curve(cfg.minhash, ctx)
    try:
        with open_driver(cfg, max(len(data), len(against)), job.folder) as driver:
            each_shard(_mark_shard, job, "against", against, driver, ctx.events)
            _read_known(job, against, driver, ctx)
            each_shard(_mark_shard, job, "data", data, driver, ctx.events)
            table = table_of(job)
            _count_rows(table, job, ctx)
            if not job.file("verdict").exists():
                dedup_fates.decide(job, table, data, against, driver, ctx.events)
            _summarise(job, table, ctx)
            each_shard(_write_shard, job, "kept", data, driver, ctx.events)
        _finish(job, data, ctx)
    finally:
        forget_parts()


def _new_job(cfg: DedupConfig, data: list[Shard], against: list[Shard], ctx: StageContext) -> DedupJob:
    from posttrain.data.dataset import heldout_keys

    heldout = heldout_keys(ctx)
    semantic = {
        name: value for name, value in cfg.dump().items() if name not in ("name", "workers", "memory", "engine", "in", "launch", "seed")
    }
    stamps = [[shard.stamp() for shard in shards] for shards in (data, against)]
    key = digest_of(["dedup", semantic, *stamps, sorted(heldout)])
    shards = [*against, *data]
    order = [[id(ref) for ref in ctx.refs(port)] for port in ("against", "data")]
    priority = [(order[0] if i < len(against) else order[1]).index(id(shard.ref)) for i, shard in enumerate(shards)]
    names = tuple(shard.ref.name for shard in shards)
    folder = ctx.work / key[:16]
    return DedupJob("data_pipelines.dedup", cfg, 0, folder, heldout, against=len(against), sources=names, priority=tuple(priority))


def _check_inputs(data: list[Shard], ctx: StageContext) -> None:
    kinds = sorted({shard.kind for shard in data})
    if len(kinds) > 1:
        message, fix = f"the inputs have several row types: {', '.join(kinds)}", "deduplicate each by its own stage"
        raise ConfigError(message, where=f"stages.{ctx.name}.in.data", fix=fix)
    if ctx.world.size > 1:
        message = f"deduplication runs in one process, got {ctx.world.size}"
        raise ConfigError(message, where=f"stages.{ctx.name}.launch", fix="set `workers` instead")


def _say_curve(rule: MinHashConfig, ctx: StageContext) -> None:
    curve = {f"{s:g}": round(shares_a_band(s, rule.bands, rule.rows), 4) for s in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)}
    steepest = (1 / rule.bands) ** (1 / rule.rows)
    ctx.summary.update(s_curve=curve, steepest=round(steepest, 4))
    shown = ", ".join(f"{s}: {p:.3f}" for s, p in curve.items())
    ctx.events.log(f"{rule.bands} bands of {rule.rows}: probability that rows of a similarity are candidates: {shown}")


def _mark_shard(job: Any, step: str, shard: Shard) -> None:
    known = open_arrays(job.file("known")) if step == "data" and job.file("known").exists() else None
    tally: Counter[str] = Counter()
    rows = _counted(shard_rows(shard, job.heldout if step == "data" else frozenset(), tally), shard)
    save_arrays(job.part(step, shard), collect(rows, job.config, known, tally))


def _counted(rows: Iterator[tuple[int, Any]], shard: Shard) -> Iterator[tuple[int, Any]]:
    count = Count(shard)
    for number, row in rows:
        count.add(len(compared_text(row)))
        yield number, row
    count.close()


def _grams_shard(job: Any, step: str, shard: Shard) -> None:
    rule = job.config.contamination
    save_arrays(job.part(step, shard), collect_sets(_counted(shard_rows(shard), shard), lambda blob: known_grams(blob, rule)))


def _read_known(job: DedupJob, against: list[Shard], driver: Driver, ctx: StageContext) -> None:
    """The table of the known rows' n-grams; rows are numbered by rank, so that the order of files does not count."""
    rule = job.config.contamination
    if not against or rule == "off":
        return
    if not job.file("known").exists():
        each_shard(_grams_shard, job, "against_grams", against, driver, ctx.events)
        table = Table([job.part("against", shard) for shard in against], len(against), list(job.priority[: len(against)]))
        order = table.ranked(np.arange(table.rows), np.zeros(table.rows, np.int64))
        sets = gather([job.part("against_grams", shard) for shard in against], table.first, rows_of(table.first), order, None)
        save_arrays(job.file("known"), {**contamination.build(sets), "order": order})
    short = int((open_arrays(job.file("known"))["grams"] == 0).sum())
    ctx.summary["against_below_ngram"] = short
    if short:
        ctx.events.warn(f"{short} rows of `against` have fewer than {rule.ngram} {rule.unit}: found as whole rows only, not inside others")


def _count_rows(table: Table, job: DedupJob, ctx: StageContext) -> None:
    """What became of the rows while they were read."""
    left = table.left_out(range(job.against, len(table.parts)))
    bad = {name.removeprefix("bad: "): count for name, count in sorted(left.items()) if name.startswith("bad: ")}
    rows = table.rows - table.against
    ctx.summary.update(rows_in=rows, excluded_heldout=left["held out"], skipped=sum(bad.values()), against_rows=table.against)
    if bad:
        spelled = ", ".join(f"{count} {name}" for name, count in bad.items())
        ctx.events.warn(f"left out {sum(bad.values())} of {rows + sum(bad.values())} rows: {spelled}")
    if not rows:
        raise DataError(
            f"no rows ({sum(bad.values())} skipped, {left['held out']} held out)",
            where=f"stages.{ctx.name}.in.data",
            fix="give at least one source with rows",
        )
    if job.config.minhash != "off" and job.config.minhash.unit == "words":
        _warn_of_long_words(table, job, ctx)


def _warn_of_long_words(table: Table, job: DedupJob, ctx: StageContext) -> None:
    words = sum(int(values.sum()) for values, _ in table.sweep("words"))
    chars = sum(int(values.sum()) for values, _ in table.sweep("size"))
    if words and chars / words > 12:
        message = f"words have {chars / words:.0f} characters on average, as in text without spaces: set minhash.unit: chars"
        ctx.events.warn(message)


def _summarise(job: DedupJob, table: Table, ctx: StageContext) -> None:
    """Counts, which must add up."""
    verdict = open_arrays(job.file("verdict"))
    goes = verdict["row"] >= table.against
    why = np.bincount(verdict["why"][goes], minlength=len(WHY))
    copies = goes & (verdict["why"] <= NEAR)
    cluster, row = np.tile(verdict["cluster"][copies], 2), np.concatenate([verdict["row"][copies], verdict["kept"][copies]])
    order = np.lexsort((row, cluster))
    fresh = np.append(True, np.diff(row[order]) != 0) | np.append(True, np.diff(cluster[order]) != 0)
    size = np.unique(cluster[order][fresh[: len(order)]], return_counts=True)[1]
    removed = {name: int(count) for name, count in zip(WHY, why, strict=True)}
    rows_out = ctx.summary["rows_in"] - int(goes.sum())
    more = {name: int(verdict[name][0]) for name in ("tried", "untried", "large", "largest") if name in verdict}
    names = {"tried": "pairs_verified", "untried": "not_fully_verified", "large": "large_clusters", "largest": "largest_candidate_cluster"}
    ctx.summary.update(removed=removed, clusters=len(size), largest_cluster=int(size.max(initial=0)))
    ctx.summary.update({names[name]: value for name, value in more.items()})
    ctx.events.log(f"{rows_out} of {ctx.summary['rows_in']} rows stay; " + ", ".join(f"{n} {name}" for name, n in removed.items() if n))
    if more.get("large"):
        rule = job.config.minhash
        message = f"{more['large']} candidate clusters have more than {rule.max_cluster} rows (the largest {more['largest']})"
        ctx.events.warn(f"{message}: their rows were compared with kept rows only")
    if rows_out == 0:
        fix = "is `against` the same data as `data`?" if table.against else "look at the rule in the summary"
        raise DataError(f"all {ctx.summary['rows_in']} rows are duplicates", where=f"stages.{ctx.name}", fix=fix)


def _write_shard(job: Any, step: str, shard: Shard) -> None:
    from posttrain.data.shards import json_line

    table, place = table_of(job), job.place(step, shard)
    verdict = open_arrays(job.file("verdict"))
    begin, end = table.first[place : place + 2]
    inside = slice(*np.searchsorted(verdict["row"], [begin, end]))
    numbers = open_arrays(job.part("data", shard))["row"]
    stays = np.ones(len(numbers), bool)
    stays[verdict["row"][inside] - begin] = False
    _write_duplicates(job, table, shard, {name: verdict[name][inside] for name in ("row", "kept", "why", "similarity", "cluster")})
    with new_part(job.part(step, shard)) as path, open(path, "wb") as file:
        for _, row in _counted(rows_at(shard, numbers[stays].tolist()), shard):
            file.write(json_line({**row, "source": row.get("source") or shard.ref.name}))


def _write_duplicates(job: DedupJob, table: Table, shard: Shard, gone: Arrays) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def ids(rows: np.ndarray) -> Any:
        return pa.array([name.decode("utf-8", "replace") for name in table.ids(rows)], pa.string())

    names = np.array([*job.sources, ""])
    part = table.part_of(gone["row"])
    columns = {
        "id": ids(gone["row"]),
        "source": pa.array(list(names[part]), pa.string()),
        "shard": pa.array([shard.label] * len(part), pa.string()),
        "row": pa.array(np.asarray(table.take("row", gone["row"]), np.int64)),
        "cluster": pa.array(np.asarray(gone["cluster"])),
        "kept": ids(gone["kept"]),
        "kept_source": pa.array(list(names[table.part_of(gone["kept"])]), pa.string()),
        "similarity": pa.array(np.asarray(gone["similarity"]), from_pandas=True),
        "why": pa.array([WHY[code] for code in gone["why"].tolist()], pa.string()),
    }
    with new_part(job.part("duplicates", shard)) as path:
        pq.write_table(pa.table(columns), path, compression="zstd")


def _finish(job: DedupJob, data: list[Shard], ctx: StageContext) -> None:
    from posttrain.data.dataset import write_dataset
    from posttrain.data.shards import read_shard

    rows = (row for shard in data for _, row in read_shard(job.part("kept", shard)))
    facts = write_dataset(rows, ctx.out, data[0].kind, suffix=job.config.suffix)
    for shard in data:
        shutil.copyfile(job.part("duplicates", shard), ctx.out / f"duplicates-{shard.index:05d}.parquet")
    expected = ctx.summary["rows_in"] - sum(ctx.summary["removed"].values())
    if facts["rows"] != expected:
        raise PosttrainError(f"{facts['rows']} rows were written, expected {expected}", where=f"stages.{ctx.name}", fix="run again")
    ctx.summary["rows_out"] = facts["rows"]
    ctx.meta.update(row_type=facts["row_type"], rows=facts["rows"], split={})
