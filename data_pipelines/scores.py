"""Score tables: one parquet file a shard, without text, from which picking again is free.

Columns: `id`, `source`, `shard`, `row` (number in the file), `chunk` where rows are cut, `uid` (64-bit hash of the id), the
selector's own (`score`, ...), `words`, `bytes`, `group` under quotas, `order_z` under the guard, and `reason`, why a row cannot
be picked ("" = it can). Under separate targets there is a `score.NAME` for each, and `score` is the largest of them. The
file's metadata counts the rows that were read and those left out before scoring.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.engine import Job
from data_pipelines.ngrams import count_words
from data_pipelines.parts import new_part
from data_pipelines.pick import row_uid
from data_pipelines.shards import Shard
from data_pipelines.stream import Item, shard_items
from data_pipelines.texts import count_bytes, length_reasons

Row = dict[str, Any]

BATCH_ROWS = 1024
CHARS_A_MIB = 1 << 14
"""Characters of a batch for each MiB that `memory` allows."""
SCORE_ROWS = 1 << 14
"""Rows of a row group, and of a score table held in memory at a time."""
TEXT_COLUMNS = ("id", "source", "shard", "reason")


def row_batches(items: Iterable[Item], most_rows: int, most_chars: int) -> Iterator[list[Item]]:
    """Lists of at most so many rows and about so many characters."""
    from posttrain.data.rows import row_text

    held: list[Item] = []
    size = 0
    for item in items:
        held.append(item)
        size += len(row_text(item.row))
        if len(held) >= most_rows or size >= most_chars:
            yield held
            held, size = [], 0
    if held:
        yield held


def score_shard(job: Job, step: str, shard: Shard) -> None:
    """Scores one shard's rows batch by batch into its table."""
    import pyarrow.parquet as pq

    tally: Counter[str] = Counter()
    held = _Groups(_score_table(job, shard, []))
    with new_part(job.part(step, shard)) as path, pq.ParquetWriter(path, held.schema, compression="zstd") as writer:
        for batch in row_batches(shard_items(job, shard, "raw", tally), BATCH_ROWS, CHARS_A_MIB * job.config.memory):
            for group in held.add(_score_table(job, shard, batch)):
                writer.write_table(group)
        writer.write_table(held.rest())
        writer.add_key_value_metadata({"left_out": json.dumps(dict(sorted(tally.items())))})


class _Groups:
    """Cuts tables of any sizes into row groups of one size, so that a file's bytes do not depend on the batches."""

    def __init__(self, empty: Any) -> None:
        self.schema, self._held, self._rows = empty.schema, [empty], 0

    def add(self, table: Any) -> Iterator[Any]:
        self._held.append(table)
        self._rows += table.num_rows
        while self._rows >= SCORE_ROWS:
            whole = self.rest()
            yield whole.slice(0, SCORE_ROWS).combine_chunks()
            self._held, self._rows = [whole.slice(SCORE_ROWS)], whole.num_rows - SCORE_ROWS

    def rest(self) -> Any:
        import pyarrow as pa

        return pa.concat_tables(self._held).combine_chunks()


def _score_table(job: Job, shard: Shard, batch: list[Item]) -> Any:
    import pyarrow as pa

    rows = [item.row for item in batch]
    columns, reason = _scored(job, rows)
    numbers = {"row": pa.array([item.number for item in batch], pa.int64())}
    if job.config.chunks:
        numbers["chunk"] = pa.array([item.chunk for item in batch], pa.int64())
    groups = {"group": pa.array(group_names(job, shard, rows), pa.string())} if job.config.quotas else {}
    return pa.table(
        {
            "id": pa.array([row["id"] for row in rows], pa.string()),
            "source": pa.array([shard.ref.label] * len(rows), pa.string()),
            "shard": pa.array([shard.label] * len(rows), pa.string()),
            **numbers,
            "uid": pa.array([row_uid(row["id"]) for row in rows], pa.uint64()),
            **{name: pa.array(value) for name, value in columns.items()},
            **groups,
            "reason": pa.array(list(reason), pa.string()),
        }
    )


def _scored(job: Job, rows: list[Row]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(columns, reasons) of a batch: the selector's own, the words and bytes, the filters and the guard."""
    from posttrain.data.rows import row_text

    texts = [row_text(row) for row in rows]
    columns = dict(job.methods.score(rows, job.state(), job.config))
    reason = columns.pop("reason", np.full(len(rows), "")).astype(object)
    columns["words"] = columns["words"] if "words" in columns else count_words(texts)
    columns["bytes"] = count_bytes(texts)
    score = columns.pop("score").reshape(len(rows), len(job.targets))
    parts = {f"score.{name}": np.ascontiguousarray(score[:, i]) for i, name in enumerate(job.targets) if name}
    columns = {"score": score.max(axis=1), **parts, **columns}
    finite = np.where(np.isfinite(score).all(axis=1), "", "score not finite")
    checks = [length_reasons(columns["words"], job.config.filters), finite]
    if job.config.filters.quality != "off" or job.config.filters.repetition != "off":
        from data_pipelines.filters import reasons

        checks.insert(1, reasons(texts, columns["words"], job.config.filters))
    if job.config.guard.salad:
        from data_pipelines import guard

        state = job.guard_state()
        columns["order_z"] = guard.scores(texts, state, job.config.guard)
        checks.append(np.where(columns["order_z"] < state["threshold"][0], "word salad", ""))
    for check in checks:
        reason = np.where(reason == "", check, reason)
    return columns, reason


def group_names(job: Job, shard: Shard, rows: list[Row]) -> list[str]:
    """The quota group of each row: its input's name, or the text of a column (absent or null: empty)."""
    by = job.config.quotas.by
    if by == "source":
        return [shard.ref.label] * len(rows)
    return ["" if row.get(by) is None else str(row[by]) for row in rows]


def score_columns(path: Path, *, groups: bool = False, eligible: bool = True) -> Iterator[dict[str, Any]]:
    """Score columns without the text ones, in batches of a bounded number of rows.

    Args:
        groups: also `group`, an array of str.
        eligible: only rows that can be picked.

    Yields:
        `place` int64 (the row's place in the table), and all numeric columns.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    names = [name for name in file.schema_arrow.names if name not in TEXT_COLUMNS and (groups or name != "group")]
    place = 0
    for batch in file.iter_batches(SCORE_ROWS, columns=[*names, "reason"] if eligible else names):
        table = pa.Table.from_batches([batch]).append_column("place", pa.array(np.arange(place, place + batch.num_rows)))
        place += batch.num_rows
        if eligible:
            table = table.filter(pc.equal(table["reason"], "")).drop_columns("reason")
        yield {name: table[name].to_numpy() for name in table.column_names}


def tallies(paths: Iterable[Path], *, chunks: bool = False, groups: bool = False) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """(scored items by `reason`, rows `read` and left out before scoring by why, scored items by group) over all tables.

    The second also counts `scored`, the rows whose items were scored.
    """
    import pyarrow.parquet as pq

    counts: Counter[str] = Counter()
    left: Counter[str] = Counter()
    by_group: Counter[str] = Counter()
    for path in paths:
        file = pq.ParquetFile(path)
        left.update(json.loads(file.metadata.metadata[b"left_out"]))
        for batch in file.iter_batches(SCORE_ROWS, columns=["reason", *(["chunk"] if chunks else []), *(["group"] if groups else [])]):
            counts.update(_counted(batch.column("reason")))
            left["scored"] += int(np.count_nonzero(batch.column("chunk").to_numpy() == 0)) if chunks else batch.num_rows
            if groups:
                by_group.update(_counted(batch.column("group")))
    return counts, left, by_group


def _counted(column: Any) -> dict[str, int]:
    return {str(item["values"]): int(item["counts"]) for item in column.value_counts().to_pylist()}
