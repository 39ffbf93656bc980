"""The rows of a shard as a selector sees them: in chunks if asked for, with their feature vectors, counted for progress."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from data_pipelines.chunks import chunks_of
from data_pipelines.engine import Job
from data_pipelines.meter import Count
from data_pipelines.selector import FEATURES
from data_pipelines.shards import Shard, rows_at, shard_rows
from posttrain.data.rows import row_text

Row = dict[str, Any]


class Item(NamedTuple):
    """A row or a chunk of one: its place among the shard's items, its row's number, the chunk's number (-1: whole), the row."""

    place: int
    number: int
    chunk: int
    row: Row


def shard_items(job: Job, shard: Shard, role: str, tally: Counter[str] | None = None, *, features: bool = True) -> Iterator[Item]:
    """The items of a shard, the same at every reading.

    Args:
        role: raw, whose rows are cut into chunks where the config says so, or target.
        tally: see `shard_rows`.
        features: put each item's vector under `row[FEATURES]` where the selector has features.
    """
    vectors = _vectors(job, shard, role) if features else None
    chunks = job.config.chunks if role == "raw" else None
    count, place = Count(shard), 0
    for number, row in shard_rows(shard, job.heldout, tally):
        for chunk, item in chunks_of(row, chunks.words) if chunks else ((-1, row),):
            count.add(len(row_text(item)))
            yield Item(place, number, chunk, _with_vector(item, vectors, place))
            place += 1
    count.close()


def items_at(job: Job, shard: Shard, wanted: Iterable[tuple[int, int, int]]) -> Iterator[Item]:
    """The raw items with these (place, number, chunk), ascending; rows behind the last of them are not read."""
    vectors, chunks = _vectors(job, shard, "raw"), job.config.chunks
    count, queue = Count(shard), deque[tuple[int, list[tuple[int, int]]]]()

    def numbers() -> Iterator[int]:
        for number, items in itertools.groupby(wanted, lambda item: item[1]):
            queue.append((number, [(place, chunk) for place, _, chunk in items]))
            yield number

    for number, row in rows_at(shard, numbers()):
        items = dict(chunks_of(row, chunks.words)) if chunks else {-1: row}
        while queue[0][0] != number:
            queue.popleft()
        for place, chunk in queue.popleft()[1]:
            count.add(len(row_text(items[chunk])))
            yield Item(place, number, chunk, _with_vector(items[chunk], vectors, place))
    count.close()


def _vectors(job: Job, shard: Shard, role: str) -> Any:
    if job.vectors is None:
        return None
    from data_pipelines.feature_files import open_vectors

    return open_vectors(job.part(f"features.{role}", shard))


def _with_vector(row: Row, vectors: Any, place: int) -> Row:
    return row if vectors is None else {**row, FEATURES: vectors[place]}
