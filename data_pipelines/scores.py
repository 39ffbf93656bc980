"""Score tables: one parquet file a shard, without text, from which picking again is free.

Columns: `id`, `source`, `shard`, `row` (number in the shard), `uid` (64-bit hash of the id), the selector's own (`score`,
`words`, `bytes`, ...), and `reason`, why a row cannot be picked ("" = it can). The file's metadata counts the rows that
were left out before scoring.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.engine import Job
from data_pipelines.parts import load_arrays, new_part
from data_pipelines.pick import row_uid
from data_pipelines.shards import Shard, shard_rows
from data_pipelines.texts import count_bytes, count_words, length_reasons

Row = dict[str, Any]

BATCH_ROWS = 1024
BATCH_CHARS = 1 << 22
SCORE_ROWS = 1 << 16
"""Rows of a score table held in memory at a time."""


def row_batches(rows: Iterable[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
    """Lists of at most BATCH_ROWS rows and about BATCH_CHARS characters."""
    from posttrain.data.rows import row_text

    held: list[tuple[int, Row]] = []
    size = 0
    for number, row in rows:
        held.append((number, row))
        size += len(row_text(row))
        if len(held) >= BATCH_ROWS or size >= BATCH_CHARS:
            yield held
            held, size = [], 0
    if held:
        yield held


def score_shard(job: Job, step: str, shard: Shard) -> None:
    """Scores one shard's rows batch by batch into its table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    state = load_arrays(job.folder / "state.safetensors")
    tally: Counter[str] = Counter()
    held = [_score_table(job, shard, [], state)]
    with new_part(job.part(step, shard)) as path, pq.ParquetWriter(path, held[0].schema, compression="zstd") as writer:
        for batch in row_batches(shard_rows(shard, job.heldout, tally)):
            held.append(_score_table(job, shard, batch, state))
            if sum(table.num_rows for table in held) >= SCORE_ROWS:
                writer.write_table(pa.concat_tables(held))
                held = held[:1]
        writer.write_table(pa.concat_tables(held))
        writer.add_key_value_metadata({"left_out": json.dumps(dict(sorted(tally.items())))})


def _score_table(job: Job, shard: Shard, batch: list[tuple[int, Row]], state: dict[str, np.ndarray]) -> Any:
    import pyarrow as pa

    from posttrain.data.rows import row_text

    rows = [row for _, row in batch]
    texts = [row_text(row) for row in rows]
    columns = dict(job.methods.score(rows, state, job.config))
    columns["score"] = columns["score"].reshape(len(rows))
    columns = {"words": count_words(texts) if "words" not in columns else columns["words"], "bytes": count_bytes(texts), **columns}
    own = columns.get("reason", np.full(len(rows), ""))
    reason = np.where(own != "", own, length_reasons(columns["words"], job.config.filters))
    reason = np.where(np.isfinite(columns["score"]) | (reason != ""), reason, "score not finite")
    where = [shard.label] * len(rows)
    return pa.table(
        {
            "id": pa.array([row["id"] for row in rows], pa.string()),
            "source": pa.array([shard.ref.label] * len(rows), pa.string()).dictionary_encode(),
            "shard": pa.array(where, pa.string()).dictionary_encode(),
            "row": pa.array([number for number, _ in batch], pa.int64()),
            "uid": pa.array([row_uid(row["id"]) for row in rows], pa.uint64()),
            **{name: pa.array(value) for name, value in columns.items() if name != "reason"},
            "reason": pa.array(list(reason), pa.string()).dictionary_encode(),
        }
    )


def score_columns(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """Eligible rows' score columns without the text ones, in batches of a bounded number of rows."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    names = [name for name in file.schema_arrow.names if name not in ("id", "source", "shard")]
    for batch in file.iter_batches(SCORE_ROWS, columns=names):
        table = pa.Table.from_batches([batch])
        table = table.filter(pc.equal(pc.cast(table["reason"], "string"), "")).drop_columns("reason")
        yield {name: table[name].to_numpy() for name in table.column_names}


def tallies(paths: Iterable[Path]) -> tuple[Counter[str], Counter[str]]:
    """(scored rows by `reason`, rows left out before scoring by why) over all tables."""
    import pyarrow.parquet as pq

    counts: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for path in paths:
        file = pq.ParquetFile(path)
        left.update(json.loads(file.metadata.metadata[b"left_out"]))
        for batch in file.iter_batches(SCORE_ROWS, columns=["reason"]):
            counts.update(batch.column("reason").to_pylist())
    return counts, left
