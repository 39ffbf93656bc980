"""Datasets as stages use them: mixtures, the held-out guard, and writing.

A mixture is decided by hashes of (seed, part, row id), so it is the same on every machine and after every restart. With
shares s_i over parts of n_i rows, the mixture is the largest without repetition: N = min_i n_i / s_i rows, part i giving
round(N s_i) by largest remainder. With `repeat: r`, floor(r) whole copies and a hash-chosen rest of exactly
round((r - floor r) n_i) rows. Several parts are interleaved in hash order; a single part keeps its order.

The guard: rows whose key lies in the pipeline's validation or test parts never reach selection, training or calibration,
whatever file they come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.core.artifact import InputRef
from posttrain.core.events import dumps
from posttrain.data.rows import normalise, row_key, split_of, unit_hash
from posttrain.data.shards import BadRows, ShardWriter
from posttrain.data.sources import load_rows, open_rows, source_digest, split_shares
from posttrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from posttrain.core.context import StageContext
    from posttrain.core.events import Events

__all__ = [
    "heldout_keys",
    "load_rows",
    "mix_rows",
    "open_rows",
    "repeat_rows",
    "source_digest",
    "training_rows",
    "write_dataset",
]

AnyRow = dict[str, Any]


def mix_rows(
    refs: list[InputRef], seed: int, *, exclude: frozenset[str] = frozenset(), events: Events | None = None
) -> tuple[list[AnyRow], dict[str, Any]]:
    """Rows of a mixture and a report.

    Args:
        refs: parts with `share` or `repeat`; either all or none have a share.
        seed: of the stage.
        exclude: row keys to leave out, before shares are computed.
        events: progress.

    Returns:
        (rows, {"rows", "excluded", "skipped", "parts": {label: {"available", "rows", "epochs", "excluded", "skipped"}}});
        rows get `source` = the part's name where they have none.

    Raises:
        ConfigError: shares that do not sum to 1, or mixed with parts without one.
        DataError: a part without rows.
    """
    _check_shares(refs)
    parts, facts = [], []
    for ref in refs:
        bad = BadRows()
        found = load_rows(ref, events=events, bad=bad)
        kept = [row for row in found if row_key(row) not in exclude] if exclude else found
        if not kept:
            raise DataError(_empty_part(ref, len(found)), where=ref.label, fix="give it more rows or a smaller held-out share")
        for row in kept:
            row["source"] = row.get("source") or ref.name
        parts.append(kept)
        facts.append({"available": len(kept), "excluded": len(found) - len(kept), "skipped": bad.report()})
    taken = _take_shares(refs, parts, seed) if refs[0].share is not None else _take_repeats(refs, parts, seed)
    return _interleaved(taken, seed), _mix_report(refs, facts, taken)


def _empty_part(ref: InputRef, found: int) -> str:
    return f"all {found} rows are held out elsewhere in the pipeline" if found else f"no rows in the part `{ref.split}`"


def _check_shares(refs: list[InputRef]) -> None:
    if not refs:
        raise ConfigError("no data", where="in.data", fix="name a source or a stage")
    shares = [ref.share for ref in refs if ref.share is not None]
    where = f"in.{refs[0].port}"
    if 0 < len(shares) < len(refs):
        raise ConfigError("some parts have a `share` and some do not", where=where, fix="give all of them a share, or use `repeat`")
    if shares and abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(f"the shares sum to {sum(shares):g}, expected 1", where=where)


def _take_shares(refs: list[InputRef], parts: list[list[AnyRow]], seed: int) -> list[list[tuple[int, AnyRow]]]:
    shares = [ref.share or 0.0 for ref in refs]
    total = min(math.floor(len(rows) / share + 1e-9) for share, rows in zip(shares, parts, strict=True))
    exact = [total * share for share in shares]
    counts = [math.floor(value + 1e-9) for value in exact]
    order = sorted(range(len(refs)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] = min(counts[i] + 1, len(parts[i]))
    return [[(0, row) for row in _subset(rows, n, seed, i)] for i, (rows, n) in enumerate(zip(parts, counts, strict=True))]


def _take_repeats(refs: list[InputRef], parts: list[list[AnyRow]], seed: int) -> list[list[tuple[int, AnyRow]]]:
    return [
        _repeated(rows, 1.0 if ref.repeat is None else ref.repeat, seed, i) for i, (ref, rows) in enumerate(zip(refs, parts, strict=True))
    ]


def _repeated(rows: list[AnyRow], times: float, seed: int, part: int) -> list[tuple[int, AnyRow]]:
    whole = math.floor(times)
    rest = _subset(rows, round((times - whole) * len(rows)), seed, part)
    return [(copy, row) for copy in range(whole) for row in rows] + [(whole, row) for row in rest]


def _subset(rows: list[AnyRow], count: int, seed: int, part: int) -> list[AnyRow]:
    if count >= len(rows):
        return rows
    order = sorted(range(len(rows)), key=lambda i: (unit_hash("take", seed, part, rows[i]["id"]), i))
    chosen = set(order[:count])
    return [row for i, row in enumerate(rows) if i in chosen]


def _interleaved(taken: list[list[tuple[int, AnyRow]]], seed: int) -> list[AnyRow]:
    if len(taken) == 1:
        return [row for _, row in taken[0]]
    tagged = [
        (unit_hash("mix", seed, part, copy, row["id"]), part, i, row)
        for part, rows in enumerate(taken)
        for i, (copy, row) in enumerate(rows)
    ]
    return [row for *_, row in sorted(tagged, key=lambda item: item[:3])]


def _mix_report(refs: list[InputRef], facts: list[dict[str, Any]], taken: list[list[Any]]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for ref, fact, rows in zip(refs, facts, taken, strict=True):
        name = ref.label if ref.label not in parts else f"{ref.label}#{len(parts)}"
        parts[name] = {**fact, "rows": len(rows), "epochs": round(len(rows) / fact["available"], 6)}
    return {
        "rows": sum(len(rows) for rows in taken),
        "excluded": sum(fact["excluded"] for fact in facts),
        "skipped": sum(fact["skipped"]["total"] for fact in facts),
        "parts": parts,
    }


def repeat_rows(rows: list[AnyRow], seed: int) -> list[AnyRow]:
    """Rows as often as their `repeat` column says (default 1; the fraction of each row is drawn by its hash)."""
    out: list[AnyRow] = []
    for i, row in enumerate(rows):
        times = row.get("repeat", 1)
        whole = math.floor(times)
        out += [row] * (whole + (unit_hash("repeat", seed, i, row["id"]) < times - whole))
    return out


def heldout_keys(ctx: StageContext) -> frozenset[str]:
    """Keys of all rows in the pipeline's validation and test parts."""
    wanted: dict[str, tuple[InputRef, set[str]]] = {}
    for ref in ctx.heldout:
        place = dumps([ref.origin, ref.path, ref.spec], sort_keys=True)
        wanted.setdefault(place, (ref, set()))[1].add(ref.split)
    return frozenset(key for ref, splits in wanted.values() for key in _keys_of(ref, splits))


def _keys_of(ref: InputRef, splits: set[str]) -> Iterable[str]:
    shares = split_shares(ref)
    whole = InputRef(**{**ref.__dict__, "split": "all"})
    for row in open_rows(whole):
        key = row_key(row)
        if "all" in splits or split_of(key, *shares) in splits:
            yield key


def training_rows(ctx: StageContext, port: str = "data") -> list[AnyRow]:
    """The mixture of a port without held-out rows; writes rows_in, excluded_heldout, skipped and `mix` to the summary.

    Raises:
        DataError: nothing is left of a part.
    """
    rows, report = mix_rows(ctx.refs(port), ctx.seed, exclude=heldout_keys(ctx), events=ctx.events)
    ctx.summary.update(rows_in=len(rows), excluded_heldout=report["excluded"], skipped=report["skipped"], mix=report["parts"])
    parts = ", ".join(f"{name} {part['rows']} rows ({part['epochs']:g} epochs)" for name, part in report["parts"].items())
    ctx.events.log(f"data: {len(rows)} rows: {parts}; {report['excluded']} held out, {report['skipped']} skipped")
    return rows


def write_dataset(
    rows: Iterable[AnyRow], out: Path, row_type: str, *, suffix: str = ".jsonl.zst", rows_per_shard: int = 50_000
) -> dict[str, Any]:
    """Writes `out/rows-00000<suffix>`, ... and `out/dataset.json`; equal rows give equal bytes.

    Args:
        rows: checked against `row_type` and given an `id` where they have none.
        out: folder of the artifact.
        row_type: text, prompt, messages, preference, verifiable.
        suffix: `.jsonl`, `.jsonl.zst` or `.parquet`.
        rows_per_shard: rows a file.

    Returns:
        {"rows", "row_type", "bytes"}, as in dataset.json.

    Raises:
        DataError: a row that is not of the type, naming its number.
    """
    writer = ShardWriter(Path(out), rows_per_shard, suffix)
    for number, row in enumerate(rows, 1):
        writer.write(normalise(row, row_type, getattr(row, "where", "") or f"{Path(out).name} row {number}"))
    files = writer.close()
    facts = {"rows": sum(f["rows"] for f in files), "row_type": row_type, "bytes": sum(f["bytes"] for f in files)}
    (Path(out) / "dataset.json").write_text(dumps({**facts, "files": files}, indent=1) + "\n", encoding="utf-8")
    return facts
